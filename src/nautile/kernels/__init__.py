"""Operations with more than one implementation: one op a file, the plain PyTorch meaning first, faster ones below it."""
