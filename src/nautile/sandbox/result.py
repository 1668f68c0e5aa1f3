"""What came out of a command, and what a sandbox can do: the plain data between the SDK and its callers."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Capabilities", "Entry", "Info", "RunResult"]


@dataclass(frozen=True)
class RunResult:
    """The outcome of one command. A command that fails is a result; so is a sandbox that fails under it."""

    exit_code: int  # 128 + n after signal n; -1 with an infrastructure error
    stdout: str  # UTF-8; what is not becomes U+FFFD, the bytes themselves are in stdout_bytes
    stderr: str
    truncated: bool  # stdout or stderr exceeded the limit: its middle is missing, and a line in its place says how much
    timed_out: bool  # killed, with everything it had started, at its time limit
    infrastructure_error: str | None  # the sandbox failed, not the command; the text says how
    memory_killed: bool = False  # the kernel killed something at the memory limit
    seconds: float = 0.0  # wall time inside
    stdout_bytes: bytes = field(default=b"", repr=False)
    stderr_bytes: bytes = field(default=b"", repr=False)

    @property
    def ok(self) -> bool:
        """Ended by itself with status 0."""
        return self.exit_code == 0 and not self.timed_out and self.infrastructure_error is None


@dataclass(frozen=True)
class Capabilities:
    """What a substrate can do at all. Asking for more raises Unsupported; ``reasons`` says why and what does it instead."""

    files: bool
    session: bool
    pause: bool
    snapshot: bool
    fork: bool
    pack_diff: bool
    network: bool
    memory_snapshot: bool = False


@dataclass(frozen=True)
class Info:
    """What a sandbox is, for reports."""

    id: str
    kind: str
    runtime: str  # bubblewrap, crun
    accel: str  # native, or the emulator of a virtual machine
    limits_enforced: tuple[str, ...]  # by cgroups; rlimits and tmpfs sizes come on top


@dataclass(frozen=True)
class Entry:
    """One name in a directory of a sandbox."""

    name: str
    kind: str  # file, directory, link, other
    size: int
    mode: int
