"""What the keeper does for one request, in a process of its own: make a container, run in it, touch its files, end it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nautile.sandbox import bundle, cgroup, enter, filing, kernel, layers, proxy
from nautile.sandbox.errors import SandboxLost, SubstrateUnavailable
from nautile.sandbox.inside import frames
from nautile.sandbox.limits import Limits
from nautile.sandbox.state import SHARE, Settings, State

__all__ = ["MOUNTS", "carry_out", "end_first_process", "locked"]

MOUNTS = "mounts"  # the directory of mount points of callers' directories; only empty ones are removed from it

_CRUN_LIMIT = 20.0  # seconds


def carry_out(keeper: Path, settings: Settings, request: dict[str, Any], channel: socket.socket | None, body: bytes) -> None:
    """Do what a request says and answer on ``channel``."""
    identity = request["id"]
    place = keeper / identity
    if request["op"] == "create":
        with locked(place):
            frames.send(_present(channel), {"ok": True, **_create(keeper, settings, request)})
        return
    if request["op"] == "close":
        _close(place, settings, identity)
        if channel is not None:
            frames.send(channel, {"ok": True})
        return
    state = State.load(keeper, settings, identity)
    answer = _present(channel)
    match request["op"]:
        case "run":
            enter.run(state, request, answer, body)
        case "outcome":
            enter.outcome(state, request, answer)
        case "session":
            enter.session(state, request, answer, body)
        case "read" | "write" | "list" | "upload" | "download":
            filing.serve(state, request, answer, body)
        case "describe":
            found = {
                "layers": state.layers,
                "host_usr": state.host_usr,
                "enforced": state.group.enforced,
                "network": state.network,
            }
            frames.send(answer, {"ok": True, **found})
        case "policy":
            cut = proxy.ask(state.place / "proxy.sock", request["rules"])
            frames.send(answer, {"ok": True, "cut": cut})
        case "freeze":
            state.group.freeze(bool(request["frozen"]))
            frames.send(answer, {"ok": True})
        case "pack":
            layers.pack_answer(state, request, answer)
        case _:
            raise SandboxLost(f"the keeper does not know {request['op']!r}: it is of another version; stop it and try again")


def _present(channel: socket.socket | None) -> socket.socket:
    assert channel is not None
    return channel


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """One creation or ending of a sandbox at a time."""
    place.mkdir(exist_ok=True)
    with open(place.parent / f".{place.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# -- making


def _create(keeper: Path, settings: Settings, request: dict[str, Any]) -> dict[str, Any]:
    place, limits = keeper / request["id"], Limits(**request["limits"])
    group = cgroup.Group.create(request["id"], limits, owner=settings.owner, found=settings.hierarchies)
    try:
        tops = _file_system(keeper, settings, request, limits)
        process = _start(keeper, settings, request, group, tops)
        state = {
            "process": process,
            "started": cgroup.owner_name(process),
            "tenant": bundle.TENANT if settings.base is not None else 0,
            "limits": request["limits"],
            "layers": request["layers"],
            "host_usr": request["host_usr"],
            "network": request["rules"] is not None,
        }
        if request["rules"] is not None:
            _start_proxy(place, process, request["rules"], settings.base)
        (place / "state.new").write_text(json.dumps(state))
        os.rename(place / "state.new", place / "state.json")
    except BaseException:
        group.remove()
        end_first_process(place)
        _dismantle(place)
        raise
    return {"enforced": group.enforced, "tenant": state["tenant"]}


def _file_system(keeper: Path, settings: Settings, request: dict[str, Any], limits: Limits) -> Path:
    """Mount the writable layer, in memory and of bounded size, over the read-only ones. The mount point."""
    place = keeper / request["id"]
    place.chmod(0o711)
    for name in ("fs", "root", "bundle", "operations"):
        (place / name).mkdir()
    options = f"size={limits.disk},nr_inodes={limits.inodes},mode=0700"
    kernel.mount("nautile", str(place / "fs"), "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    for name in ("upper", "work"):
        (place / "fs" / name).mkdir()
        (place / "fs" / name).chmod(0o755)
    lowers = [Path(one) for one in request["layers"]]
    if request["host_usr"]:
        lowers.insert(0, keeper / "skeleton")
    if settings.base is not None:
        os.chown(place / "fs/upper", settings.base, settings.base)
        lowers = [_shifted(keeper, settings.base, layer) for layer in lowers]
    stack = ":".join(str(layer) for layer in reversed(lowers))
    extra = "" if settings.base is not None else ",userxattr"
    options = f"lowerdir={stack},upperdir={place}/fs/upper,workdir={place}/fs/work{extra}"
    if len(options) > 4000:
        raise SubstrateUnavailable("container", f"{len(lowers)} layers do not fit into one mount", "pack them into fewer")
    kernel.mount("overlay", str(place / "root"), "overlay", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    return Path(place, "root")


def _shifted(keeper: Path, base: int, layer: Path) -> Path:
    """``layer`` with its owners moved into the container's share of user ids; made once for all containers."""
    stat = os.stat(layer)
    target = keeper / "layers" / f"{stat.st_dev:x}-{stat.st_ino:x}"
    with open(keeper / ".layers.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        target.mkdir()
        users = _user_namespace(f"0 {base} {SHARE}", f"0 {base} {SHARE}")
        try:
            kernel.idmap(str(layer), str(target), users)
        except OSError as error:
            target.rmdir()
            why = f"the kernel cannot shift the owners of {layer} ({error})"
            raise SubstrateUnavailable(
                "container", why, "Linux 5.19 or newer and a file system with id-mapped mounts"
            ) from None
        finally:
            os.close(users)
    return target


def _workspace(place: Path, settings: Settings, source: str) -> Path:
    """The caller's directory where the tenant is its owner, and nobody else's files are the tenant's.

    It is mounted outside of what is ever removed with its content: a caller's files cannot be deleted through it.
    """
    if settings.base is None:
        return Path(source)
    target, found = place.parent / MOUNTS / place.name, os.stat(source)
    target.mkdir()
    tenant = settings.base + bundle.TENANT
    users = _user_namespace(f"{found.st_uid} {tenant} 1", f"{found.st_gid} {tenant} 1")
    try:
        kernel.idmap(source, str(target), users, writable=True)
    except OSError as error:
        why = f"the kernel cannot make {source} the sandbox's ({error})"
        remedy = "Linux 5.12 or newer and a file system with id-mapped mounts, or kind='function'"
        raise SubstrateUnavailable("container", why, remedy) from None
    finally:
        os.close(users)
    return target


def _user_namespace(users: str, groups: str) -> int:
    """A descriptor of a user namespace with these maps, for as long as it is open."""
    ready, made = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            kernel.unshare(kernel.CLONE_NEWUSER)
            os.write(made, b".")
            signal.pause()
        finally:
            os._exit(1)
    try:
        os.close(made)
        if not os.read(ready, 1):
            raise SubstrateUnavailable("container", "no user namespace can be made", "sysctl user.max_user_namespaces=15000")
        for name, text in (("uid_map", users), ("gid_map", groups)):
            Path(f"/proc/{child}/{name}").write_text(text)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _start(keeper: Path, settings: Settings, request: dict[str, Any], group: cgroup.Group, root: Path) -> int:
    """Let crun make the container; the host's number of its process 1."""
    place = root.parent
    users = [{"containerID": 0, "hostID": settings.base or 0, "size": SHARE if settings.base is not None else 1}]
    workspace = request["workspace"] and str(_workspace(place, settings, request["workspace"]))
    shm = Limits(**request["limits"]).disk
    description = bundle.configuration(root, keeper / "init", request["host_usr"], users, shm, workspace)
    (place / "bundle/config.json").write_text(json.dumps(description))
    crun = shutil.which("crun")
    if crun is None:
        raise SubstrateUnavailable("container", "crun is missing", "apt-get install crun")
    argv = [crun, "--root", str(place / "crun"), "--cgroup-manager", "disabled", "run", "--detach"]
    argv += ["--bundle", str(place / "bundle"), "--pid-file", str(place / "pid"), request["id"]]
    with open(place / "crun.log", "w+b") as log:
        child = os.fork()
        if child == 0:
            _become_crun(argv, group, log.fileno())
        status = _wait(child, _CRUN_LIMIT)
        log.seek(0)
        said = log.read(4000).decode("utf-8", "replace").strip()
    if status != 0:
        raise SubstrateUnavailable("container", f"crun could not start it: {said or status}", "nautile sandbox doctor")
    return int((place / "pid").read_text())


def _become_crun(argv: list[str], group: cgroup.Group, log: int) -> None:
    try:
        for entrance in group.entrances:
            cgroup.enter(entrance)
        devnull = os.open("/dev/null", os.O_RDWR)
        for source, target in ((devnull, 0), (devnull, 1), (log, 2)):
            os.dup2(source, target)
        os.closerange(3, 2**20)
        hybrid = Path("/sys/fs/cgroup/unified")
        if os.path.ismount(hybrid):  # crun refuses a hybrid system; it needs no cgroups, they are ours
            kernel.unshare(kernel.CLONE_NEWNS)
            kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_SLAVE)
            # Covered, not unmounted: in an ordinary user's namespace what was there before cannot be taken away.
            kernel.mount("none", str(hybrid), "tmpfs", kernel.MS_RDONLY)
        os.execve(argv[0], argv, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    except BaseException as error:
        os.write(2, str(error).encode())
    finally:
        os._exit(125)


def _start_proxy(place: Path, process: int, rules: list[str], base: int | None) -> None:
    """Fork the proxy of a container; it listens when this returns, and ends with the container."""
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    control.bind(str(place / "proxy.sock"))
    control.listen(8)
    if os.fork() == 0:
        try:
            os.closerange(3, control.fileno())
            os.closerange(control.fileno() + 1, 2**20)
            pidfd, network = os.pidfd_open(process), os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            proxy.serve(pidfd, network, control, rules, None if base is None else base + SHARE - 1)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    control.close()
    proxy.ask(place / "proxy.sock", rules)


def _wait(child: int, seconds: float) -> int:
    descriptor = os.pidfd_open(child)
    try:
        if not select.select([descriptor], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- ending


def _close(place: Path, settings: Settings, identity: str) -> None:
    if not place.exists():
        return
    with locked(place):
        cgroup.Group({one.base / "nautile" / settings.owner / identity: one for one in settings.hierarchies}).remove()
        end_first_process(place)
        _dismantle(place)
    (place.parent / f".{place.name}.lock").unlink(missing_ok=True)


def end_first_process(place: Path) -> None:
    """Kill a container's process 1, where no cgroup has done so, and wait: when it has ended, every other one has."""
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        process = int((place / "pid").read_text())
        descriptor = os.pidfd_open(process)
        try:
            # Only what still runs the program that we gave it: the number may be another process's by now.
            if os.path.basename(os.readlink(f"/proc/{process}/exe")) == "init":
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                select.select([descriptor], [], [], 5.0)
        finally:
            os.close(descriptor)


def _dismantle(place: Path) -> None:
    for mounted in (place / "root", place / "fs", place.parent / MOUNTS / place.name):
        with contextlib.suppress(OSError):
            kernel.unmount(str(mounted))
    with contextlib.suppress(OSError):  # never with its content
        os.rmdir(place.parent / MOUNTS / place.name)
    # Nothing in here was made by the tenant: its files were in the memory that has just been unmounted.
    shutil.rmtree(place, ignore_errors=True)
