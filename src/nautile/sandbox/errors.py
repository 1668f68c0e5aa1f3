"""Every way in which a sandbox can say no. The text names the part, the reason and the remedy."""

from __future__ import annotations

__all__ = [
    "AccessDenied",
    "EdgeGone",
    "FileRefused",
    "FleetFull",
    "ImageRefused",
    "InvalidRequest",
    "LimitUnavailable",
    "LogCorrupt",
    "LogFenced",
    "OutcomeUnknown",
    "QuotaExceeded",
    "SandboxClosed",
    "SandboxError",
    "SandboxLost",
    "SubstrateUnavailable",
    "TrajectoryDiverged",
    "Unsupported",
]


class SandboxError(RuntimeError):
    """The sandbox itself failed; the text says what to do. A failing tool is not this: it is an answer."""


class InvalidRequest(SandboxError):  # noqa: N818
    """The caller asked for something that has no meaning: a limit of zero, an empty command, a name with a NUL byte."""


class Unsupported(SandboxError):  # noqa: N818
    """The substrate cannot do this, whatever the machine."""

    def __init__(self, substrate: str, feature: str, why: str, remedy: str) -> None:
        super().__init__(f"{substrate}: no {feature}: {why}; {remedy}")
        self.substrate, self.feature, self.why, self.remedy = substrate, feature, why, remedy


class SubstrateUnavailable(SandboxError):  # noqa: N818
    """This machine lacks something that the substrate needs."""

    def __init__(self, substrate: str, why: str, remedy: str) -> None:
        super().__init__(f"{substrate}: {why}; {remedy}")
        self.substrate, self.why, self.remedy = substrate, why, remedy


class LimitUnavailable(SandboxError):  # noqa: N818
    """A limit that was asked for cannot be enforced here, and nobody allowed to go without it."""

    def __init__(self, limit: str, why: str, remedy: str) -> None:
        super().__init__(f"the limit on {limit} cannot be enforced: {why}; {remedy}")
        self.limit, self.why, self.remedy = limit, why, remedy


class ImageRefused(SandboxError):  # noqa: N818
    """An image or a layer is corrupt, hostile, of another architecture, or not there."""

    def __init__(self, image: str, why: str, remedy: str) -> None:
        super().__init__(f"image {image}: {why}; {remedy}")
        self.image, self.why, self.remedy = image, why, remedy


class SandboxClosed(SandboxError):  # noqa: N818
    """The sandbox was closed by its owner."""


class SandboxLost(SandboxError):  # noqa: N818
    """The sandbox, or the process that keeps it, has died. What it held is gone."""


class EdgeGone(SandboxLost):
    """No gateway, or not the edge that holds the sandbox, answers. The sandbox may live on: try again, or give it up."""

    untouched = False  # nothing of what was asked has been begun: it may be asked again, whatever it was


class FleetFull(SandboxError):  # noqa: N818
    """No edge of the fleet takes another sandbox now."""


class QuotaExceeded(SandboxError):  # noqa: N818
    """The project has as many sandboxes, or as much memory, as it may have."""


class AccessDenied(SandboxError):  # noqa: N818
    """The token is not known, or the sandbox belongs to another project."""


class FileRefused(SandboxError):  # noqa: N818
    """A file inside the sandbox was not touched: it is not there, not a plain file, or its path leads through a link."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path, self.why = path, why


class LogCorrupt(SandboxError):  # noqa: N818
    """A trajectory log was changed after it was written, or is none."""


class LogFenced(SandboxError):  # noqa: N818
    """Another writer has taken over this trajectory log; this one may write no more."""


class OutcomeUnknown(SandboxError):  # noqa: N818
    """An operation was begun, and nobody can say whether it finished. Only one declared idempotent is run again."""

    def __init__(self, operation: str, sequence: int, why: str) -> None:
        super().__init__(
            f"operation {sequence} ({operation}) was begun, and its outcome is unknown: {why}; start from a snapshot before "
            "it, or declare operations that may run twice with idempotent=True"
        )
        self.operation, self.sequence, self.why = operation, sequence, why


class TrajectoryDiverged(SandboxError):  # noqa: N818
    """A client that fast-forwards asks for something else than what the log has at this place."""

    def __init__(self, sequence: int, expected: str, got: str) -> None:
        super().__init__(
            f"operation {sequence} differs from the log: it has {expected}, the caller asked for {got}; no recorded result was "
            "given. Use a new log for a new course, or fork the old one before this operation"
        )
        self.sequence, self.expected, self.got = sequence, expected, got
