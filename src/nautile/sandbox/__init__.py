"""Where tools run. This is the first piece of what becomes DSec: one-shot requests, confined by bubblewrap."""

from nautile.sandbox.base import Sandbox, SandboxError
from nautile.sandbox.confine import (
    BubblewrapMissingError,
    Confined,
    DirectoryError,
    NamespacesRefusedError,
    Unconfined,
    open_sandbox,
)

__all__ = [
    "BubblewrapMissingError",
    "Confined",
    "DirectoryError",
    "NamespacesRefusedError",
    "Sandbox",
    "SandboxError",
    "Unconfined",
    "open_sandbox",
]
