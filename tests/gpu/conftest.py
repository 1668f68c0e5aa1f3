"""Kernels in Triton: on a GPU where there is one, else through Triton's interpreter (make test sets TRITON_INTERPRET=1)."""

import math
import os

import pytest
import torch
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _with_index(tensor, scope):
    """Triton 3.6 turns one-element arrays into loop bounds with int(), which NumPy 2.4 refuses."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _with_index


@pytest.fixture(scope="session")
def device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.fail("no GPU: run these tests as make test does, TRITON_INTERPRET=1 pytest tests/gpu")
    return torch.device("cpu")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(torch.initial_seed() % 2**31)


@pytest.fixture(scope="session")
def dtype(device):
    """What activations are held in: bfloat16 on a GPU; the interpreter's bfloat16 product is wrong, so float32 there."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(scope="session")
def bound(device):
    """Largest relative error ||out - ref|| / ||ref||: bfloat16 operands against float32 ones."""
    return 8e-3 if device.type == "cuda" else 2e-6


def relative(out, reference):
    """||out - ref|| / ||ref||; NaN counts as infinity."""
    error = ((out.double() - reference.double()).norm() / reference.double().norm()).item()
    return float("inf") if math.isnan(error) else error


@pytest.fixture(autouse=True)
def _poison():
    """Memory that nothing has written reads as NaN or as the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def hopper(device):
    """Tests of kernels that Triton's interpreter cannot run."""
    if device.type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    return device
