"""A sandbox as a deployment of SWE-ReX, for SWE-agent and what else is written against it (``pip install swe-rex``).

    from nautile.sandbox.adapters.swerex import deployment
    runtime = deployment(kind="container").runtime      # after await start()

Sessions keep their working directory and variables between commands, as theirs do: each command runs in one living shell.
Interactive programs in a session, and strings to expect beside the prompt, are not offered: asking for them says so.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nautile.sandbox.driver import Terminal
from nautile.sandbox.errors import InvalidRequest, SandboxError, SubstrateUnavailable, Unsupported
from nautile.sandbox.limits import Limits
from nautile.sandbox.sandbox import Sandbox

if TYPE_CHECKING:
    from nautile.sandbox.result import RunResult

__all__ = ["Shell", "deployment"]

_FOREVER = 86_400.0  # seconds of a command for which no time limit was given
_REST = 60.0  # seconds for the rest of a line whose beginning has come


class Shell:
    """Commands in one living bash: the working directory and the variables of one are there for the next."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._terminal: Terminal = sandbox.session(["/bin/bash", "--noprofile", "--norc"], pty=False)

    def run(self, command: str, timeout: float | None) -> tuple[str, int]:
        """(what it wrote on stdout and stderr, its exit status). Raises SandboxError when it does not end in time."""
        mark = secrets.token_hex(12)
        # On lines of their own, so that a comment or a here-document of the command ends before the mark.
        self._terminal.send(f"{{ {command}\n}} 2>&1 </dev/null\nprintf '%s:%s:' {mark} $?\n")
        said = self._terminal.until(f"{mark}:", timeout or _FOREVER)
        output, _, status = said.partition(f"{mark}:")
        while ":" not in status:
            more = self._terminal.read(_REST)
            if not more:
                raise SandboxError("the shell has ended")
            status += more.decode("utf-8", "replace")
        return output, int(status.partition(":")[0])

    def close(self) -> None:
        """End the shell with everything that it started."""
        self._terminal.close()


def deployment(kind: str = "container", *, limits: Limits | None = None, **options: Any) -> Any:
    """An ``AbstractDeployment`` whose runtime is a sandbox; ``options`` are those of ``Sandbox.create``.

    Raises SubstrateUnavailable when swe-rex is not installed.
    """
    try:
        from swerex.deployment.abstract import AbstractDeployment  # noqa: PLC0415
        from swerex.exceptions import DeploymentNotStartedError  # noqa: PLC0415
        from swerex.runtime import abstract  # noqa: PLC0415
    except ImportError as error:
        raise SubstrateUnavailable("swe-rex", f"it is not installed ({error})", "pip install swe-rex") from None
    runtime_class = _runtime(abstract)

    class SandboxDeployment(AbstractDeployment):  # type: ignore[misc, unused-ignore]
        """One sandbox, from ``start`` to ``stop``."""

        def __init__(self) -> None:
            self.logger = logging.getLogger(__name__)
            self._hooks: list[Any] = []
            self._runtime: Any = None

        def add_hook(self, hook: Any) -> None:
            """Tell ``hook`` about the start."""
            hook.on_deployment_added(self)
            self._hooks.append(hook)

        async def is_alive(self, *, timeout: float | None = None) -> Any:
            """Whether it runs."""
            return await self.runtime.is_alive(timeout=timeout)

        async def start(self, *_: Any, **__: Any) -> None:
            """Make the sandbox."""
            for hook in self._hooks:
                hook.on_custom_step("Creating sandbox")
            self._runtime = runtime_class(await asyncio.to_thread(_create, kind, limits, options))

        async def stop(self, *_: Any, **__: Any) -> None:
            """End it."""
            runtime, self._runtime = self._runtime, None
            if runtime is not None:
                await runtime.close()

        @property
        def runtime(self) -> Any:
            """What commands go to. Raises DeploymentNotStartedError."""
            if self._runtime is None:
                raise DeploymentNotStartedError()  # type: ignore[no-untyped-call, unused-ignore]
            return self._runtime

    return SandboxDeployment()


def _create(kind: str, limits: Limits | None, options: dict[str, Any]) -> Sandbox:
    return Sandbox.create(kind, limits=limits, **options)


def _runtime(abstract: Any) -> Any:
    """The class of a runtime; made here because its base class may not be installed."""
    from swerex import exceptions  # noqa: PLC0415

    class SandboxRuntime(abstract.AbstractRuntime):  # type: ignore[misc, unused-ignore]
        """Every method is one call of a ``Sandbox``, in a thread."""

        def __init__(self, sandbox: Sandbox) -> None:
            self.logger = logging.getLogger(__name__)
            self.sandbox = sandbox
            self._shells: dict[str, Shell] = {}

        async def is_alive(self, *, timeout: float | None = None) -> Any:
            """Whether a command runs in it."""
            try:
                result = await asyncio.to_thread(self.sandbox.run, ["/bin/true"], timeout or 10.0)
            except SandboxError as error:
                return abstract.IsAliveResponse(is_alive=False, message=str(error))
            return abstract.IsAliveResponse(is_alive=result.ok, message=result.infrastructure_error or "")

        async def create_session(self, request: Any) -> Any:
            """A shell of a name, with files sourced into it."""
            if request.session in self._shells:
                raise exceptions.SessionExistsError(f"session {request.session} exists")
            shell = await asyncio.to_thread(Shell, self.sandbox)
            self._shells[request.session] = shell
            output = ""
            for source in request.startup_source:
                output += (await asyncio.to_thread(shell.run, f"source {source}", request.startup_timeout))[0]
            return abstract.CreateBashSessionResponse(output=output)

        async def run_in_session(self, action: Any) -> Any:
            """One command in a shell."""
            if action.action_type != "bash" or action.is_interactive_command or action.is_interactive_quit or action.expect:
                why = "commands run to their end, without a terminal"
                raise Unsupported("swe-rex", "interaction in a session", why, "use Sandbox.session for interactive programs")
            if action.session not in self._shells:
                raise exceptions.SessionDoesNotExistError(f"session {action.session!r} does not exist")
            try:
                output, status = await asyncio.to_thread(self._shells[action.session].run, action.command, action.timeout)
            except SandboxError as error:
                if "did not write" not in str(error):
                    raise
                self._shells.pop(action.session).close()  # what it runs cannot be told from what comes next
                said = f"{action.command!r} did not end within {action.timeout:g} s; its session is closed"
                raise exceptions.CommandTimeoutError(said) from None
            if action.check == "raise" and status != 0:
                message = f"{action.error_msg or 'command failed'}: {action.command!r} exited with {status}: {output[-2000:]}"
                raise exceptions.NonZeroExitCodeError(message)
            return abstract.BashObservation(output=output, exit_code=None if action.check == "ignore" else status)

        async def close_session(self, request: Any) -> Any:
            """End a shell."""
            if request.session not in self._shells:
                raise exceptions.SessionDoesNotExistError(f"session {request.session!r} does not exist")
            await asyncio.to_thread(self._shells.pop(request.session).close)
            return abstract.CloseBashSessionResponse()

        async def execute(self, command: Any) -> Any:
            """One command by itself."""
            result = await asyncio.to_thread(self._executed, command)
            if result.infrastructure_error is not None:
                raise SandboxError(result.infrastructure_error)
            if result.timed_out:
                raise exceptions.CommandTimeoutError(f"{command.command!r} did not end within {command.timeout:g} s")
            if command.check and result.exit_code != 0:
                said = f"{command.error_msg or 'command failed'}: exit status {result.exit_code}: {result.stderr[-2000:]}"
                raise exceptions.NonZeroExitCodeError(said)
            return abstract.CommandResponse(stdout=result.stdout, stderr=result.stderr, exit_code=result.exit_code)

        def _executed(self, command: Any) -> RunResult:
            given = command.command
            if command.shell != isinstance(given, str):
                raise InvalidRequest("give a string with shell=True, or a list of strings without")
            argv = ["/bin/sh", "-c", given] if command.shell else list(given)
            if command.merge_output_streams:
                argv = ["/bin/sh", "-c", 'exec "$@" 2>&1', "sh", *argv]
            return self.sandbox.run(argv, command.timeout or _FOREVER, cwd=command.cwd, env=command.env)

        async def read_file(self, request: Any) -> Any:
            """A file as text."""
            data = await asyncio.to_thread(self.sandbox.read, request.path)
            return abstract.ReadFileResponse(content=data.decode(request.encoding or "utf-8", request.errors or "strict"))

        async def write_file(self, request: Any) -> Any:
            """A file from text."""
            await asyncio.to_thread(self.sandbox.write, request.path, request.content)
            return abstract.WriteFileResponse()

        async def upload(self, request: Any) -> Any:
            """A file or a directory of this machine."""
            await asyncio.to_thread(self.sandbox.upload, Path(request.source_path), request.target_path)
            return abstract.UploadResponse()

        async def close(self) -> Any:
            """End the sandbox."""
            self._shells.clear()
            await asyncio.to_thread(self.sandbox.close)
            return abstract.CloseResponse()

    return SandboxRuntime
