"""One request, one process: confined by bubblewrap, or on the caller's word not confined at all.

Inside, the program sees the directory at /workspace (read-write), the host's /usr (read-only), an empty /tmp and /proc of
its own processes. There is no network, no environment, no capability, no home directory. Whatever is left when the answer
has been written, or at the time limit, is killed with the process namespace.

What this file does not know: tools. What it trusts: nothing that comes out, so the answer's size is bounded.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nautile.sandbox.base import SandboxError, ToolSandbox

__all__ = ["BubblewrapMissingError", "Confined", "DirectoryError", "NamespacesRefusedError", "Unconfined", "open_sandbox"]

_ANSWER_LIMIT = 64 * 2**20  # bytes of an answer; a flood is cut off here
_PROBE_LIMIT = 20.0  # seconds
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp", "LANG": "C.UTF-8"}
_LIBRARIES = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")  # links into /usr, or directories on older systems
_SETTINGS = ("/etc/alternatives", "/etc/ld.so.cache")  # without them awk and a Python in /usr/local do not start


class BubblewrapMissingError(SandboxError):
    """There is no ``bwrap`` on this machine."""


class NamespacesRefusedError(SandboxError):
    """``bwrap`` is there, but the kernel or the container around us does not let it make its namespaces."""


class DirectoryError(SandboxError):
    """The directory to work on does not exist or is something else."""


def open_sandbox(directory: Path, *, unconfined: bool = False, bwrap: str | None = None) -> ToolSandbox:
    """The sandbox for ``directory``, tried out once so that a machine which cannot confine says so before any work.

    ``bwrap`` is the program's path (default: found on PATH). Nothing runs unconfined unless ``unconfined`` is True. Raises
    DirectoryError, BubblewrapMissingError, NamespacesRefusedError.
    """
    if not directory.exists():
        raise DirectoryError(f"{directory} does not exist: give --dir an existing directory")
    if not directory.is_dir():
        raise DirectoryError(f"{directory} is not a directory: give --dir the directory to work on")
    root = directory.resolve()
    if unconfined:
        return Unconfined(root)
    found = bwrap or shutil.which("bwrap")
    if found is None or not os.access(found, os.X_OK):
        raise BubblewrapMissingError(
            "tools run confined by bubblewrap, which is missing: apt-get install bubblewrap "
            "(or pass --unconfined to let them run with your rights)"
        )
    sandbox = Confined(root, found)
    sandbox.probe()
    return sandbox


@dataclass(frozen=True)
class Confined:
    """Each request in a bubblewrap of its own. Make one with ``open_sandbox``, which checks that it works."""

    root: Path
    bwrap: str
    confinement: str = "bubblewrap"

    def call(self, program: Path, request: Mapping[str, Any], *, time_limit: float) -> dict[str, Any]:
        """See ``Sandbox.call``."""
        inside = f"/nautile/{program.name}"
        bound = ["--ro-bind", str(program), inside, "--remount-ro", "/"]
        command = [_python(), "-I", "-S", inside, "/workspace"]
        # bubblewrap gets the same small environment: its own first process can be read from inside.
        return _exchange([*self._argv(), *bound, "--", *command], request, time_limit, env=_ENVIRONMENT)

    def probe(self) -> None:
        """Start and end one empty sandbox. Raises NamespacesRefusedError with the remedy for this machine."""
        argv = [*self._argv(), "--", _python(), "-I", "-S", "-c", ""]
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_LIMIT, check=False)
        except subprocess.TimeoutExpired:
            raise NamespacesRefusedError(f"bubblewrap did not start within {_PROBE_LIMIT:g} s") from None
        if done.returncode:
            raise NamespacesRefusedError(_refusal(done.stderr.decode("utf-8", "replace").strip()))

    def _argv(self) -> list[str]:
        argv = [self.bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "1000", "--gid", "1000"]
        argv += ["--cap-drop", "ALL", "--die-with-parent", "--new-session", "--hostname", "nautile", "--clearenv"]
        for name, value in _ENVIRONMENT.items():
            argv += ["--setenv", name, value]
        # Read-only, because to a caller who is root the files of /proc/sys would still be his own.
        argv += ["--proc", "/proc", "--remount-ro", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--ro-bind", "/usr", "/usr"]
        for place in map(Path, _LIBRARIES):
            if place.is_symlink():
                argv += ["--symlink", os.readlink(place), str(place)]
            elif place.exists():
                argv += ["--ro-bind", str(place), str(place)]
        for setting in _SETTINGS:
            argv += ["--ro-bind-try", setting, setting]
        prefix = os.path.realpath(sys.base_prefix)
        if not prefix.startswith("/usr/") and prefix != "/usr":
            argv += ["--ro-bind", prefix, prefix]
        return [*argv, "--bind", str(self.root), "/workspace", "--chdir", "/workspace"]


@dataclass(frozen=True)
class Unconfined:
    """The same program as an ordinary process with the caller's rights, network included."""

    root: Path
    confinement: str = "none"

    def call(self, program: Path, request: Mapping[str, Any], *, time_limit: float) -> dict[str, Any]:
        """See ``Sandbox.call``."""
        return _exchange([_python(), "-I", "-S", str(program), str(self.root)], request, time_limit)


def _python() -> str:
    """The real interpreter: a virtual environment's is a link that leads out of the sandbox."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _exchange(
    argv: Sequence[str], request: Mapping[str, Any], time_limit: float, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run ``argv`` with the request on stdin; its JSON answer. Kills it at the time limit and on any exception."""
    with tempfile.TemporaryFile() as question:
        question.write(json.dumps(request).encode())
        question.seek(0)
        # A session of its own: Ctrl-C in the terminal is for the agent, which then ends the tool.
        process = subprocess.Popen(
            argv, env=env, stdin=question, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    try:
        out, err, ended = _drain(process, time_limit)
    finally:
        _kill(process)
    if not ended:
        raise SandboxError(f"the tool did not answer within {time_limit:g} s and was killed")
    try:
        answer = json.loads(out)
    except ValueError:
        reason = err.decode("utf-8", "replace").strip().splitlines()
        raise SandboxError(f"the tool gave no answer: {reason[-1] if reason else 'it was killed'}") from None
    if not isinstance(answer, dict):
        raise SandboxError("the tool gave an answer that is not an object")
    return answer


def _drain(process: subprocess.Popen[bytes], time_limit: float) -> tuple[bytes, bytes, bool]:
    """(stdout, stderr, both ended in time). Raises SandboxError when one of them exceeds the limit."""
    assert process.stdout is not None and process.stderr is not None
    pieces: dict[int, bytearray] = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    out, err = pieces.values()
    deadline = time.monotonic() + time_limit
    with selectors.DefaultSelector() as selector:
        for descriptor in pieces:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return bytes(out), bytes(err), False
            for key, _ in selector.select(left):
                data = os.read(key.fd, 2**16)
                pieces[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
                elif len(pieces[key.fd]) > _ANSWER_LIMIT:
                    raise SandboxError("the tool wrote more than an answer can hold and was killed")
    return bytes(out), bytes(err), True


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and its group; in a sandbox everything below dies with its process namespace."""
    with contextlib.suppress(ProcessLookupError):  # it has ended, and nothing of its group is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _refusal(reason: str) -> str:
    """What bubblewrap said, and the remedy that fits this machine."""

    def setting(path: str) -> str:
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    said = f"the kernel refused bubblewrap its namespaces ({reason.splitlines()[-1] if reason else 'no reason given'})"
    if setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        remedy = (
            "AppArmor forbids them here (Ubuntu 24.04 does by default): give bwrap a profile, sudo apt-get install "
            "apparmor-profiles && sudo ln -s /usr/share/apparmor/extra-profiles/bwrap-userns-restrict /etc/apparmor.d/ && "
            "sudo systemctl reload apparmor, or allow them to everybody: "
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
        )
    elif setting("/proc/sys/kernel/unprivileged_userns_clone") == "0":
        remedy = "allow them: sudo sysctl kernel.unprivileged_userns_clone=1"
    elif setting("/proc/sys/user/max_user_namespaces") == "0":
        remedy = "allow them: sudo sysctl user.max_user_namespaces=15000"
    else:
        remedy = (
            "inside a container, start it with --security-opt seccomp=unconfined --security-opt apparmor=unconfined "
            "--security-opt systempaths=unconfined"
        )
    return f"{said}; {remedy}; or pass --unconfined to let tools run with your rights"
