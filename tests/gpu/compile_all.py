"""Compile every kernel ahead of time for sm_80, sm_90 and sm_100 with the sizes of Flash; prints one line each.

A script of its own because a process that interprets kernels cannot compile them.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from nautile.kernels import (
    few_experts,
    fp4_experts,
    hopper_attention,
    index_scores,
    index_select,
    many_experts,
    sparse_attention,
)

POINTERS = {
    "bf16": "q x out middle halves", "fp32": "sink partial weight weights scores best parts shares",
    "u8": "near far w1 w3 w2", "i32": "near_ids far_ids visible found taken pair expert first count keys s1 s3 s2 chosen",
}  # fmt: skip
TYPES = {name: f"*{kind}" for kind, names in POINTERS.items() for name in names.split()}
SCALARS = (
    "stride tokens together near_count far_count heads splits tiles near_tiles far_tiles k per maxima inner hidden top pairs "
    "most experts size blocks"
)
TYPES |= dict.fromkeys(SCALARS.split(), "i32") | {"table": "*i64", "rows": "i32", "scale": "fp32", "limit": "fp32"}
WORDS = dict.fromkeys(["near", "far", "w1", "w3", "w2", "wa", "sa", "wb", "sb"], "*i32")  # kernels that read words
PLAIN, NUMBER, FLOATS = {"near": "*bf16", "far": "*bf16"}, {"count": "i32"}, {"out": "*fp32"}
BLOCK = {"C": 512, "PLAIN": 448, "BLOCK_H": 0, "BLOCK_N": 0}
PACKED = {**BLOCK, "PACKED": True, "NEAR_STRIDE": 584, "FAR_STRIDE": 584}
UNPACKED = {**BLOCK, "PACKED": False, "NEAR_STRIDE": 512, "FAR_STRIDE": 512}
HOPPER = {"STRIDE": 146, "W": 8, "R": 72, "SERIAL": False, "HALF": False}
SERIAL = {**HOPPER, "R": 80, "SERIAL": True, "N": 64, "S": 2}
SCORE, FEW = {"HEADS": 64, "GROUP": 128, "PDL": 90}, {"WORDS": 32, "ROWS": 32, "SPLIT": 1, "PDL": 90}
CUT = {"WORDS": 16, "ROWS": 64, "SPLIT": 2, "ONE": True, "PDL": 90}
PREPARE = {"PAIRS": 256, "BLOCKS": 256, "EXPERTS": 256, "WAYS": 2, "PDL": 90}
PORTABLE = {"BYTES": 64, "BLOCK_P": 16, "ASM": True, "PDL": 90}
MANY = {"W": 8, "R": 96, "SPREAD": False}
KERNELS = [  # module, kernel, other argument types, constants, warps, capabilities
    (sparse_attention, "_attend_kernel", {}, {**PACKED, "SINGLE": True}, 8, (80, 90, 100)),
    (sparse_attention, "_attend_kernel", {}, {**PACKED, "SINGLE": False}, 8, (80, 90, 100)),
    (sparse_attention, "_attend_kernel", PLAIN, {**UNPACKED, "SINGLE": True}, 8, (80, 90, 100)),
    (sparse_attention, "_join_kernel", {}, {"C": 512, "SPLITS": 16, "WIDTH": 128, "PDL": 90}, 4, (80, 90, 100)),
    (hopper_attention, "_attend_kernel", WORDS, {**HOPPER, "SINGLE": True, "N": 64, "S": 2}, 8, (90,)),
    (hopper_attention, "_attend_kernel", WORDS, {**HOPPER, "SINGLE": False, "N": 64, "S": 2}, 8, (90,)),
    (hopper_attention, "_attend_kernel", WORDS, {**SERIAL, "SINGLE": True}, 8, (90,)),
    (hopper_attention, "_attend_kernel", {**WORDS, "partial": "*bf16"}, {**SERIAL, "SINGLE": False, "HALF": True}, 8, (90,)),
    (index_select, "_score_kernel", NUMBER, {**SCORE, "BLOCK": 128, "ASM": True}, 4, (80, 90)),  # on sm_100 a trap, but unused
    (index_select, "_many_kernel", NUMBER, {"HEADS": 64, "BLOCK": 128, "GROUP": 128, "ASM": True}, 8, (80, 90)),
    (index_select, "_collect_kernel", NUMBER, {"MAXIMA": 2048, "GROUP": 128, "TILE": 4096, "PDL": 90}, 8, (80, 90, 100)),
    (index_select, "_settle_kernel", NUMBER, {"TILE": 1024, "K": 512, "PAGED": True, "PDL": 90}, 8, (80, 90, 100)),
    (index_scores, "_score_kernel", NUMBER, {**SCORE, "HOPPER": False}, 8, (80, 90, 100)),
    (index_scores, "_score_kernel", NUMBER, {**SCORE, "HOPPER": True}, 8, (90,)),
    (fp4_experts, "_prepare_kernel", {}, PREPARE, 8, (80, 90, 100)),
    (fp4_experts, "_gate_up_kernel", {}, {"HIDDEN": 4096, "BLOCK_N": 32, **PORTABLE}, 4, (80, 90, 100)),
    (fp4_experts, "_down_kernel", {}, {"INNER": 2048, "BLOCK_N": 64, **PORTABLE}, 4, (80, 90, 100)),
    (fp4_experts, "_sum_kernel", FLOATS, {"TOP": 6, "BLOCK": 512, "PDL": 90}, 4, (80, 90, 100)),
    (few_experts, "_gate_up_kernel", {**WORDS, "x": "*i32"}, {"HIDDEN": 4096, "ONE": False, **FEW}, 2, (80, 90, 100)),
    (few_experts, "_down_kernel", {**WORDS, "middle": "*i32"}, {"INNER": 2048, "ONE": False, **FEW}, 2, (80, 90, 100)),
    (few_experts, "_gate_up_kernel", {**WORDS, "x": "*i32"}, {"HIDDEN": 4096, **CUT}, 4, (80, 90, 100)),
    (few_experts, "_down_kernel", {**WORDS, "middle": "*i32"}, {"INNER": 2048, **CUT}, 4, (90,)),
    (many_experts, "_experts_kernel", WORDS, {"WIDTH": 4096, "GATED": True, **MANY}, 8, (90,)),
    (many_experts, "_experts_kernel", {**WORDS, **FLOATS}, {"WIDTH": 2048, "GATED": False, **MANY}, 8, (90,)),
    (many_experts, "_experts_kernel", WORDS, {"WIDTH": 4096, "GATED": True, **MANY, "R": 88, "SPREAD": True}, 8, (90,)),
]  # fmt: skip


def compiled(module, name, types, constants, warps, capability):
    """A constant of PDL is the capability from which a kernel waits for the one before it by itself."""
    kernel = getattr(module, name)
    constants = {key: capability >= value if key == "PDL" else value for key, value in constants.items()}
    if "NATIVE" in kernel.arg_names:
        constants["NATIVE"] = capability >= 89
    if "BLOCK_H" in constants:
        size = sparse_attention.AttentionTiles.of(divmod(capability, 10))
        constants |= {"BLOCK_H": size.heads, "BLOCK_N": size.rows}
    types = {**TYPES, **types}
    signature = {argument: "constexpr" if argument in constants else types[argument] for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names) if signature[argument][0] == "*"}
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, places, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def main(capabilities):
    for module, name, types, constants, warps, meant in KERNELS:
        for capability in [capability for capability in capabilities if capability in meant]:
            code = compiled(module, name, types, constants, warps, capability).asm
            if "trap;" in code["ptx"]:  # what Triton makes of a kernel that does not fit the machine
                sys.exit(f"{module.__name__}.{name} sm_{capability} is a trap")
            print(f"{module.__name__}.{name} sm_{capability}: {len(code['cubin'])} bytes", flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
