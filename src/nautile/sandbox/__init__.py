"""Where tools run. This is the first piece of what becomes DSec: one-shot requests, confined by bubblewrap."""

from nautile.sandbox.base import Sandbox, SandboxError
from nautile.sandbox.confine import (
    BubblewrapMissing,
    Confined,
    NamespacesRefused,
    NotADirectory,
    Unconfined,
    open_sandbox,
)

__all__ = [
    "BubblewrapMissing",
    "Confined",
    "NamespacesRefused",
    "NotADirectory",
    "Sandbox",
    "SandboxError",
    "Unconfined",
    "open_sandbox",
]
