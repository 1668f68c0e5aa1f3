"""The Walsh-Hadamard transform against its definition, entry (i, j) = (-1)^popcount(i & j) / sqrt(n)."""

from __future__ import annotations

import pytest
import torch

from nautile.quant import hadamard


@pytest.mark.parametrize("n", [1, 2, 4, 32, 64, 128])
def test_definition_and_inverse(n: int) -> None:
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)], dtype=torch.float64)
    x = torch.randn(3, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    y = hadamard.transform(x)
    torch.testing.assert_close(y, x @ matrix / n**0.5, rtol=0, atol=1e-14)
    torch.testing.assert_close(hadamard.transform(y), x, rtol=0, atol=1e-14)
    assert hadamard.transform(x.float()).dtype == torch.float32


def test_products_do_not_change() -> None:
    q, k = torch.randn(2, 10, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((hadamard.transform(q) * hadamard.transform(k)).sum(-1), (q * k).sum(-1))


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two, got 96"):
        hadamard.transform(torch.ones(2, 96))
