"""MXFP4 words to operands of a matrix instruction, in PTX: what the kernels that keep FP4 in registers share."""

__all__ = ["FP4_PAIRS"]

# Operands $0 to $7: eight pairs of bfloat16, the pair j made of code j of both words. $8 and $9: two words of eight e2m1 codes.
# $10: the scale of each word as bfloat16, times 2^126, because the bits of a code moved under a bfloat16's exponent are its
# value / 2^126. The least significant code comes first.
FP4_PAIRS = """
{
.reg .b32 lo, hi, t, u, z;
mov.b32 z, 0x80008000;
prmt.b32 lo, $8, $9, 0x5410;
prmt.b32 hi, $8, $9, 0x7632;
shl.b32 t, lo, 12;
shl.b32 u, lo, 6;
and.b32 u, u, 0x01C001C0;
lop3.b32 t, t, 0x80008000, u, 0xEA;
fma.rn.bf16x2 $0, t, $10, z;
shl.b32 t, lo, 8;
shl.b32 u, lo, 2;
and.b32 u, u, 0x01C001C0;
lop3.b32 t, t, 0x80008000, u, 0xEA;
fma.rn.bf16x2 $1, t, $10, z;
shl.b32 t, lo, 4;
shr.b32 u, lo, 2;
and.b32 u, u, 0x01C001C0;
lop3.b32 t, t, 0x80008000, u, 0xEA;
fma.rn.bf16x2 $2, t, $10, z;
mov.b32 t, lo;
shr.b32 u, lo, 6;
and.b32 u, u, 0x01C001C0;
lop3.b32 t, t, 0x80008000, u, 0xEA;
fma.rn.bf16x2 $3, t, $10, z;
shl.b32 t, hi, 12;
shl.b32 u, hi, 6;
and.b32 u, u, 0x01C001C0;
lop3.b32 t, t, 0x80008000, u, 0xEA;
fma.rn.bf16x2 $4, t, $10, z;
shl.b32 t, hi, 8;
shl.b32 u, hi, 2;
and.b32 u, u, 0x01C001C0;
lop3.b32 t, t, 0x80008000, u, 0xEA;
fma.rn.bf16x2 $5, t, $10, z;
shl.b32 t, hi, 4;
shr.b32 u, hi, 2;
and.b32 u, u, 0x01C001C0;
lop3.b32 t, t, 0x80008000, u, 0xEA;
fma.rn.bf16x2 $6, t, $10, z;
mov.b32 t, hi;
shr.b32 u, hi, 6;
and.b32 u, u, 0x01C001C0;
lop3.b32 t, t, 0x80008000, u, 0xEA;
fma.rn.bf16x2 $7, t, $10, z;
}
"""
