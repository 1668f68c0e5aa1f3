"""Operations of a decode step: a few tokens, one of each sequence, fused so that a step is few launches.

Every op takes tensors of fixed shapes and reads positions from the device, so a CUDA graph can hold it.
"""
