"""Compile every kernel ahead of time for sm_80, sm_90 and sm_100 with the sizes of Flash; prints one line each.

A script of its own because a process that interprets kernels cannot compile them.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nautile.kernels import fp4_experts, index_select, sparse_attention

COUNTS = {"near_count": "i32", "far_count": "i32", "heads": "i32", "splits": "i32", "tiles": "i32", "near_tiles": "i32"}
ATTEND = {
    "q": "*bf16", "near": "*u8", "near_ids": "*i32", "far": "*u8", "far_ids": "*i32", "sink": "*fp32", "out": "*bf16",
    "partial": "*fp32", "weight": "*fp32", "scale": "fp32", "far_tiles": "i32", **COUNTS,
}  # fmt: skip
ATTEND_SIZES = {"C": 512, "PLAIN": 448, "BLOCK_H": 0, "BLOCK_N": 0, "PACKED": True, "NEAR_STRIDE": 584, "FAR_STRIDE": 584}
INDEX = {
    "q": "*bf16", "weights": "*fp32", "keys": "*u8", "visible": "*i32", "scores": "*fp32", "counts": "*i32",
    "taken": "*i32", "candidates": "*i32", "count": "i32", "k": "i32", "per": "i32",
}  # fmt: skip
EXPERTS = {
    "x": "*bf16", "w1": "*u8", "s1": "*u8", "w3": "*u8", "s3": "*u8", "w2": "*u8", "s2": "*u8", "weights": "*fp32",
    "middle": "*bf16", "parts": "*fp32", "out": "*fp32", "pair": "*i32", "expert": "*i32", "first": "*i32", "count": "*i32",
    "inner": "i32", "hidden": "i32", "top": "i32", "limit": "fp32",
}  # fmt: skip
FEW = {"BYTES": 64, "BLOCK_P": 16, "ASM": True}
KERNELS = [  # module, kernel, argument types, constants, warps
    (sparse_attention, "_attend_kernel", ATTEND, {**ATTEND_SIZES, "SINGLE": True}, 8),
    (sparse_attention, "_attend_kernel", ATTEND, {**ATTEND_SIZES, "SINGLE": False}, 8),
    (sparse_attention, "_join_kernel", ATTEND, {"C": 512, "BLOCK_H": 8}, 4),
    (index_select, "_score_kernel", INDEX, {"HEADS": 64, "HALF": 64, "BLOCK": 128, "BINS": 2048}, 4),
    (index_select, "_histogram_kernel", INDEX, {"BINS": 2048, "TILE": 4096}, 8),
    (index_select, "_split_kernel", INDEX, {"BINS": 2048, "TILE": 4096}, 8),
    (index_select, "_settle_kernel", INDEX, {"BINS": 2048, "TILE": 1024, "K": 512}, 8),
    (fp4_experts, "_gate_up_kernel", EXPERTS, {"HIDDEN": 4096, "BLOCK_N": 32, **FEW}, 4),
    (fp4_experts, "_down_kernel", EXPERTS, {"INNER": 2048, "BLOCK_N": 64, **FEW}, 4),
    (fp4_experts, "_sum_kernel", EXPERTS, {"TOP": 6, "BLOCK": 1024}, 4),
]


def compiled(module, name, types, constants, warps, capability):
    kernel = getattr(module, name)
    if "NATIVE" in kernel.arg_names:
        constants = {**constants, "NATIVE": capability >= 89}
    if name == "_attend_kernel":
        heads, rows = sparse_attention.tile_sizes(divmod(capability, 10))
        constants = {**constants, "BLOCK_H": heads, "BLOCK_N": rows}
    signature = {argument: "constexpr" if argument in constants else types[argument] for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names) if signature[argument][0] == "*"}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def main(capabilities):
    for module, name, types, constants, warps in KERNELS:
        for capability in capabilities:
            code = compiled(module, name, types, constants, warps, capability).asm
            if "trap;" in code["ptx"]:  # what Triton makes of a kernel that does not fit the machine
                sys.exit(f"{module.__name__}.{name} sm_{capability} is a trap")
            print(f"{module.__name__}.{name} sm_{capability}: {len(code['cubin'])} bytes", flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
