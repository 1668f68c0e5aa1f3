"""The whole forward pass on a CPU as one small C++ library, built on first use; ``nautile.model`` stays the meaning."""

from nautile.kernels.native.build import NativeUnavailable, library_path
from nautile.kernels.native.library import Kinds, NativeModel, NativeStep, StatePools, features

__all__ = ["Kinds", "NativeModel", "NativeStep", "NativeUnavailable", "StatePools", "features", "library_path"]
