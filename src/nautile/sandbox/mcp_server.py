"""One sandbox as an MCP server on stdin and stdout: any MCP client gets tools that cannot touch its machine."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from nautile.sandbox.errors import SandboxError, Unsupported
from nautile.sandbox.sandbox import Sandbox

__all__ = ["build", "serve"]

_SHOWN = 60_000  # characters of an output that a client's model gets; head and tail
_INSTRUCTIONS = "Commands run in a sandbox: no network unless allowed, /usr read-only, files in /workspace stay between calls."


def build(sandbox: Sandbox) -> MCPServer[object]:
    """The server for one sandbox. A sandbox that fails, or refuses, is an error text for the client's model."""
    server: MCPServer[object] = MCPServer("nautile-sandbox", instructions=_INSTRUCTIONS)

    def run(command: str, timeout: float = 60.0, stdin: str = "") -> str:
        """Run a shell command in the sandbox. What it leaves running is killed when it ends."""
        result = sandbox.run(command, min(max(timeout, 0.1), 3600.0), stdin)
        if result.infrastructure_error is not None:
            raise SandboxError(result.infrastructure_error)
        notes = [f"exit {result.exit_code}"]
        notes += [f"killed after {timeout:g} s"] if result.timed_out else []
        notes += ["killed at the memory limit"] if result.memory_killed else []
        parts = [_short(result.stdout), f"stderr:\n{_short(result.stderr)}" if result.stderr else "", f"[{', '.join(notes)}]"]
        return "\n".join(part for part in parts if part)

    def read(path: str) -> str:
        """Read a file; one that is not UTF-8 comes in base64."""
        data = sandbox.read(path)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "base64: " + base64.b64encode(data).decode()

    def write(path: str, content: str) -> str:
        """Make or replace a text file."""
        sandbox.write(path, content)
        return f"wrote {len(content.encode()):,} bytes to {path}"

    def list_directory(path: str = "/workspace") -> str:
        """List a directory: kind, size, name."""
        return "\n".join(f"{entry.kind:9} {entry.size:10} {entry.name}" for entry in sandbox.list(path)) or "(empty)"

    server.add_tool(_told(run), name="run")
    if sandbox.capabilities.files:
        for tool, name in ((read, "read"), (write, "write"), (list_directory, "list")):
            server.add_tool(_told(tool), name=name)
    return server


def serve(kind: str, workspace: Path | None, allow: Sequence[str] | None) -> None:
    """Serve until the client hangs up, then end the sandbox. Raises what ``Sandbox.create`` raises."""
    if kind == "function" and workspace is None:
        raise Unsupported(
            "function", "files between calls", "each call starts empty", "give --workspace DIRECTORY, or use --kind container"
        )
    with Sandbox.create(kind, workspace=workspace, network=allow) as sandbox:
        build(sandbox).run("stdio")


def _told(tool: Callable[..., str]) -> Callable[..., str]:
    """The same tool, whose sandbox errors reach the client's model with their text."""

    @functools.wraps(tool)
    def call(*arguments: object, **named: object) -> str:
        try:
            return tool(*arguments, **named)
        except SandboxError as error:
            raise ToolError(str(error)) from None

    return call


def _short(text: str) -> str:
    text = text.rstrip("\n")
    if len(text) <= _SHOWN:
        return text
    half = _SHOWN // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters omitted ...]\n{text[-half:]}"
