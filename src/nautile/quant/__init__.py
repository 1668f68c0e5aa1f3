"""The number formats of the checkpoint and of the caches: FP8 e4m3 and MXFP4 e2m1 with e8m0 scales, and Hadamard."""

from nautile.quant import fp8, hadamard, mxfp4

__all__ = ["fp8", "hadamard", "mxfp4"]
