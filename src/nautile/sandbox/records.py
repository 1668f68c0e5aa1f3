"""Errors and results as plain data, for whoever sends them to another process: a host of machines, an edge, a gateway."""

from __future__ import annotations

import dataclasses
from typing import Any

from nautile.sandbox import errors
from nautile.sandbox.errors import SandboxError
from nautile.sandbox.result import RunResult

__all__ = ["error_record", "rebuilt", "result_record", "run_result"]

_NAMES = tuple(field.name for field in dataclasses.fields(RunResult) if not field.name.startswith("std"))


def error_record(error: BaseException) -> dict[str, Any]:
    """An error for the wire. One that is not the sandboxes' own becomes a SandboxError with its text."""
    if not isinstance(error, SandboxError):
        return {"error": "SandboxError", "text": f"{type(error).__name__}: {error}", "fields": {}}
    return {"error": type(error).__name__, "text": str(error), "fields": vars(error)}


def rebuilt(record: dict[str, Any]) -> SandboxError:
    """The error of a record, as the same class. What is no sandbox error by name becomes a plain SandboxError."""
    kind = getattr(errors, str(record.get("error")), None)
    if not isinstance(kind, type) or not issubclass(kind, SandboxError):
        kind = SandboxError
    error: SandboxError = kind.__new__(kind)
    RuntimeError.__init__(error, str(record.get("text")))
    fields = record.get("fields")
    vars(error).update(fields if isinstance(fields, dict) else {})
    return error


def result_record(result: RunResult) -> tuple[dict[str, Any], bytes]:
    """A result as a header and a body."""
    header = {name: getattr(result, name) for name in _NAMES}
    return {**header, "stdout": len(result.stdout_bytes)}, result.stdout_bytes + result.stderr_bytes


def run_result(header: dict[str, Any], body: bytes) -> RunResult:
    """The result of a header and a body."""
    out, err = body[: header["stdout"]], body[header["stdout"] :]
    return RunResult(
        stdout=out.decode("utf-8", "replace"),
        stderr=err.decode("utf-8", "replace"),
        stdout_bytes=out,
        stderr_bytes=err,
        **{name: header[name] for name in _NAMES},
    )
