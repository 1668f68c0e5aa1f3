"""DSec: where tools run. One object, ``Sandbox``, over several substrates; and the seam through which the agent uses them.

    with Sandbox.create("container") as sandbox:
        print(sandbox.run("echo hello").stdout)

docs/sandbox.md is the manual, docs/security.md says what each substrate promises and what it does not.
"""

from nautile.sandbox.base import ToolSandbox
from nautile.sandbox.confine import (
    BubblewrapMissingError,
    Confined,
    DirectoryError,
    NamespacesRefusedError,
    Unconfined,
    open_sandbox,
)
from nautile.sandbox.errors import (
    AccessDenied,
    EdgeGone,
    FileRefused,
    FleetFull,
    InvalidRequest,
    LimitUnavailable,
    LogCorrupt,
    LogFenced,
    OutcomeUnknown,
    QuotaExceeded,
    SandboxClosed,
    SandboxError,
    SandboxLost,
    SubstrateUnavailable,
    TrajectoryDiverged,
    Unsupported,
)
from nautile.sandbox.image import Image
from nautile.sandbox.limits import MIB, Limits
from nautile.sandbox.policy import NetworkPolicy, Rule
from nautile.sandbox.pool import SandboxPool
from nautile.sandbox.result import Capabilities, Entry, Info, RunResult
from nautile.sandbox.sandbox import Sandbox

__all__ = [
    "MIB",
    "AccessDenied",
    "BubblewrapMissingError",
    "Capabilities",
    "Confined",
    "DirectoryError",
    "EdgeGone",
    "Entry",
    "FileRefused",
    "FleetFull",
    "Image",
    "Info",
    "InvalidRequest",
    "LimitUnavailable",
    "Limits",
    "LogCorrupt",
    "LogFenced",
    "NamespacesRefusedError",
    "NetworkPolicy",
    "OutcomeUnknown",
    "QuotaExceeded",
    "Rule",
    "RunResult",
    "Sandbox",
    "SandboxClosed",
    "SandboxError",
    "SandboxLost",
    "SandboxPool",
    "SubstrateUnavailable",
    "ToolSandbox",
    "TrajectoryDiverged",
    "Unconfined",
    "Unsupported",
    "open_sandbox",
]
