"""Compile the fused operations of a decode step ahead of time with the sizes of Flash; prints one line each.

A script of its own because a process that interprets kernels cannot compile them.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nautile.kernels.decode import linear, query, routing, rows, streams

FLOATS = {"eps", "norm_eps", "factor", "limit", "shrink"}
POINTERS = {
    "x": "*bf16", "q": "*fp32", "streams": "*fp32", "fn": "*fp32", "partial": "*fp32", "base": "*fp32", "scale": "*fp32",
    "norm": "*fp32", "post": "*fp32", "matrix": "*fp32", "one": "*fp32", "two": "*fp32", "three": "*fp32", "four": "*fp32",
    "out": "*fp32",
    "projected": "*fp32", "q_norm": "*fp32", "kv_norm": "*fp32", "cos": "*fp32", "sin": "*fp32", "window": "*u8",
    "rows": "*i64", "kv": "*fp32", "gate": "*fp32", "ape": "*fp32", "ring_kv": "*fp32", "ring_gate": "*fp32", "pool": "*u8",
    "signs": "*fp32", "slots": "*i64", "positions": "*i64", "weights": "*fp32", "scaled": "*fp32", "logits": "*fp32",
    "ids": "*i64", "bias": "*fp32", "table": "*i64", "chosen": "*i32", "both": "*fp32", "scales": "*u8",
    "words": "*i32",
}  # fmt: skip
LINEAR = {"INPUTS": 4096, "LINES": 32, "BLOCK_N": 16, "BLOCK_T": 16, "BLOCK_K": 128, "ASM": True}
VECTOR = {"INPUTS": 4096, "BLOCK_N": 8, "WORDS": 1024}
COMPRESS = {"ROTATED": 64, "LAYERS": 21}
KERNELS = [  # module, kernel, constants, pointers of other types
    (linear, "_linear_kernel", {**LINEAR, "FP8": True}, {"weights": "*fp8e4nv", "rows": "i32"}),
    (
        linear,
        "_linear_kernel",
        {**LINEAR, "FP8": False, "ASM": False, "LINES": 64},
        {"weights": "*bf16", "scales": "*bf16", "rows": "i32"},
    ),
    (linear, "_linear_kernel", {**LINEAR, "BLOCK_N": 32, "BLOCK_T": 64, "FP8": True}, {"weights": "*fp8e4nv", "rows": "i32"}),
    (linear, "_vector_kernel", {**VECTOR, "SIZE": 1}, {}),
    (streams, "_partial_kernel", {"CHUNK": 512}, {}),
    (streams, "_mix_kernel", {"D": 4096, "BLOCK_D": 4096, "CHUNKS": 32, "STEPS": 19}, {}),
    (streams, "_mix_kernel", {"D": 7168, "BLOCK_D": 8192, "CHUNKS": 64, "STEPS": 19}, {}),
    (streams, "_join_kernel", {"PARTS": 3, "BLOCK": 512}, {}),
    (rows, "_window_kernel", {"LOW": 1024, "BLOCK_LOW": 1024, "C": 512, "ROTATED": 64, "ROW": 584}, {"out": "*bf16"}),
    (rows, "_compress_kernel", {**COMPRESS, "M": 4, "RING": 8, "WIDTH": 1024, "C": 512, "ROW": 584, "KEY": False}, {}),
    (rows, "_compress_kernel", {**COMPRESS, "M": 4, "RING": 8, "WIDTH": 256, "C": 128, "ROW": 68, "KEY": True}, {}),
    (rows, "_compress_kernel", {**COMPRESS, "M": 128, "RING": 128, "WIDTH": 512, "C": 512, "ROW": 584, "KEY": False}, {}),
    (query, "_turn_kernel", {"C": 512, "ROTATED": 64, "BLOCK": 4, "NORM": True, "BACK": False}, {"x": "*fp32", "out": "*bf16"}),
    (query, "_turn_kernel", {"C": 512, "ROTATED": 64, "BLOCK": 4, "NORM": False, "BACK": True}, {"out": "*bf16"}),
    (query, "_index_kernel", {"C": 128, "ROTATED": 64}, {"out": "*bf16"}),
    (routing, "_route_kernel", {"E": 256, "BLOCK": 256, "TOP": 6, "HASHED": False}, {}),
    (routing, "_route_kernel", {"E": 384, "BLOCK": 512, "TOP": 6, "HASHED": True}, {}),
    (routing, "_gated_kernel", {"BLOCK": 256}, {"out": "*bf16"}),
]


def compiled(module, name, constants, other, capability):
    kernel = getattr(module, name)
    constants = {**constants, "PDL": capability >= 90}  # as it is launched chained
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        else:
            signature[argument] = other.get(argument) or POINTERS.get(argument) or ("fp32" if argument in FLOATS else "i32")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name_ in enumerate(kernel.arg_names) if signature[name_][0] == "*"}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


def waits_first(ptx, early):
    """Whether a chained kernel waits before its first access to memory; what it brings into the L2 before that are weights,
    and so are its first loads where ``early``."""
    places = [ptx.find(text) for text in ("ld.global", "st.global", "cp.async.c", "red.global", "atom.global")]
    wait = ptx.find("griddepcontrol.wait")
    return 0 < wait < min(place for place in places[early:] if place > 0) and ptx.find("ld.global", wait) > 0


def main(capabilities):
    for module, name, constants, other in KERNELS:
        for capability in capabilities:
            if capability < 89 and "*fp8e4nv" in other.values():
                continue  # no e4m3 conversion there; the weights are decoded once instead
            code = compiled(module, name, constants, other, capability).asm
            if "trap;" in code["ptx"]:
                sys.exit(f"{module.__name__}.{name} sm_{capability} is a trap")
            if capability >= 90 and not waits_first(code["ptx"], int(name == "_vector_kernel")):
                sys.exit(f"{module.__name__}.{name} sm_{capability} touches memory before the kernel before it has ended")
            print(f"{module.__name__}.{name} sm_{capability}: {len(code['cubin'])} bytes", flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
