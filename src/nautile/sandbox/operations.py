"""What the keeper does for one request, in a process of its own: make a container, run in it, touch its files, end it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import stat
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nautile.sandbox import bundle, cgroup, enter, filing, kernel, layers, proxy
from nautile.sandbox.errors import ImageRefused, SandboxLost, SubstrateUnavailable
from nautile.sandbox.images.mount import kind_of_file, mount_image, mount_lazy
from nautile.sandbox.inside import frames
from nautile.sandbox.limits import Limits
from nautile.sandbox.orders import Orders
from nautile.sandbox.seat import NotStarted, Seat, SeatGone, know, start
from nautile.sandbox.seccomp_profile import first_process_profile
from nautile.sandbox.state import SHARE, WORK, Settings, State

__all__ = ["MOUNTS", "SHARED", "Task", "adopt", "become_crun", "carry_out", "end_first_process", "group_name", "locked"]

SHARED = "shared"  # what all containers have in common and none can change
MOUNTS = "mounts"  # the directory of mount points of callers' directories; only empty ones are removed from it

_CRUN_LIMIT = 20.0  # seconds
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Task:
    """One request: its header, its body, who gets the answer, and the seat of its container (if it needs one)."""

    request: dict[str, Any]
    body: bytes = b""
    channel: socket.socket | None = None
    seat: Seat | None = None


def carry_out(keeper: Path, settings: Settings, task: Task) -> None:
    """Do what a request says and answer."""
    request, channel, body = task.request, task.channel, task.body
    identity = request["id"]
    place = keeper / identity
    if request["op"] == "create":
        seat = _present(task.seat)
        with locked(place):
            made = _create(keeper, settings, request, seat)
        if channel is not None:  # a spare has nobody to answer to
            give(channel, seat, made)
        return
    if request["op"] == "close":
        _close(place, settings, identity)
        if channel is not None:
            frames.send(channel, {"ok": True})
        return
    if task.seat is None:
        raise SandboxLost(f"the container {identity} is gone")
    _serve(State.load(keeper, settings, identity, task.seat.control), request, _present(channel), body)


def give(channel: socket.socket, seat: Seat, made: dict[str, Any]) -> None:
    """Answer that a container is there, and give its client what reaches its seat."""
    frames.send(channel, {"ok": True, **made})
    socket.send_fds(channel, [b"s"], [seat.control.fileno()])


def _serve(state: State, request: dict[str, Any], answer: socket.socket, body: bytes) -> None:
    """A request to a container that runs."""
    match request["op"]:
        case "run":
            enter.run(state, request, answer, body)
        case "outcome":
            enter.outcome(state, request, answer)
        case "end":
            enter.end_group(state, request["group"])
            frames.send(answer, {"ok": True})
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


def _present(one: _T | None) -> _T:
    assert one is not None
    return one


def group_name(place: Path) -> str | None:
    """The name of a container's groups; None if it has none."""
    try:
        return (place / "group").read_text()
    except OSError:
        return None


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """One creation or ending of a sandbox at a time."""
    place.mkdir(exist_ok=True)
    with open(place.parent / WORK / f".{place.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# -- making


def _create(keeper: Path, settings: Settings, request: dict[str, Any], seat: Seat) -> dict[str, Any]:
    place, limits = keeper / request["id"], Limits(**request["limits"])
    (place / "group").write_text(seat.name)
    group = settings.group(seat.name)
    try:
        work = keeper / WORK / seat.name
        _file_system(keeper, settings, request, limits, work)
        process = _start(keeper, settings, request, seat, work)
        group.apply(_with_seat(limits))
        state = {
            "group": seat.name,
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
        with _opened(os.pidfd_open(process)) as pidfd:
            know(seat.control, pidfd)
        _write_state(place, state)
    except BaseException:
        group.remove()
        end_first_process(place)
        _dismantle(place, seat.name)
        raise
    return {"enforced": group.enforced, "tenant": state["tenant"]}


@contextlib.contextmanager
def _opened(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _with_seat(limits: Limits) -> Limits:
    """The limits of the group: the seat is on top of what the tenant may have."""
    return dataclasses.replace(limits, pids=limits.pids + 1)


def _write_state(place: Path, state: dict[str, Any]) -> None:
    (place / "state.new").write_text(json.dumps(state))
    os.rename(place / "state.new", place / "state.json")


def adopt(keeper: Path, settings: Settings, request: dict[str, Any], spare: str, seat: Seat) -> dict[str, Any]:
    """Give a spare container the name and the limits of the one that is asked for."""
    place, limits = keeper / request["id"], Limits(**request["limits"])
    os.rename(keeper / spare, place)
    group = settings.group(seat.name)
    try:
        group.apply(_with_seat(limits))
        state = json.loads((place / "state.json").read_text())
        _write_state(place, {**state, "limits": request["limits"]})
    except BaseException:
        group.remove()
        end_first_process(place)
        _dismantle(place, seat.name)
        raise
    return {"enforced": group.enforced, "tenant": state["tenant"]}


def _file_system(keeper: Path, settings: Settings, request: dict[str, Any], limits: Limits, place: Path) -> None:
    """Mount the writable layer, in memory and of bounded size, over the read-only ones, at ``fs/root`` in ``place``."""
    place.mkdir()
    place.chmod(0o711)  # the container's users must be able to pass through
    for name in ("fs", "root", "shm", "bundle"):
        (place / name).mkdir()
    options = f"size={limits.disk},nr_inodes={limits.inodes},mode=0711"
    kernel.mount("nautile", str(place / "fs"), "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    for name in ("upper", "work", "root"):
        (place / "fs" / name).mkdir()
        (place / "fs" / name).chmod(0o755)
    (place / "fs/shm").mkdir()
    (place / "fs/shm").chmod(0o1777)
    lowers = [Path(one) for one in request["layers"]]
    if request["host_usr"]:
        lowers.insert(0, keeper / "skeleton")
    if settings.base is not None:
        os.chown(place / "fs/upper", settings.base, settings.base)
    lowers = [_lower(keeper, settings.base, layer) for layer in lowers]
    stack = ":".join(str(layer) for layer in reversed(lowers))
    extra = "" if settings.base is not None else ",userxattr"
    options = f"lowerdir={stack},upperdir={place}/fs/upper,workdir={place}/fs/work{extra}"
    if len(options) > 4000:
        raise SubstrateUnavailable("container", f"{len(lowers)} layers do not fit into one mount", "pack them into fewer")
    kernel.mount("overlay", str(place / "fs/root"), "overlay", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    work = place / "fs/root/workspace"
    if not os.path.lexists(work):  # an image of somebody else's
        work.mkdir()
        tenant = bundle.TENANT + settings.base if settings.base is not None else 0
        os.chown(work, tenant, tenant, follow_symlinks=False)
        work.chmod(0o755)


def _lower(keeper: Path, base: int | None, layer: Path) -> Path:
    """Where a layer can be stacked: mounted if it is a file, its owners moved into the containers' share of user ids.

    Made once for all containers.
    """
    found = os.stat(layer)
    directory = stat.S_ISDIR(found.st_mode)
    if directory and base is None:
        return layer
    key = f"{found.st_dev:x}-{found.st_ino:x}" + ("" if directory else f"-{found.st_mtime_ns:x}")
    target = keeper / "layers" / key
    with open(keeper / ".layers.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _serves(target, found):
            return target
        target.mkdir(exist_ok=True)
        try:
            if directory:
                _shift(layer, target, base or 0)
            else:
                _mount_file(layer, target, base)
        except BaseException:
            target.rmdir()
            raise
    return target


def _serves(target: Path, layer: os.stat_result) -> bool:
    """Whether a layer is mounted and somebody stands behind it."""
    try:
        found = os.stat(target)
    except OSError:
        if os.path.lexists(target):
            kernel.unmount(str(target))  # the process behind a lazy layer has died
        return False
    # A directory of the same file system is no mount point to ``ismount``, which would mount it again and again.
    return (found.st_dev, found.st_ino) == (layer.st_dev, layer.st_ino) or os.path.ismount(target)


def _mount_file(layer: Path, target: Path, base: int | None) -> None:
    kind = kind_of_file(layer)
    if kind == "lazy":
        mount_lazy(layer, target, base or 0)
    elif kind is not None:
        if base is None:
            return mount_image(layer, kind, target)
        plain = target.with_name(f"{target.name}.img")
        plain.mkdir(exist_ok=True)
        mount_image(layer, kind, plain)
        _shift(plain, target, base)
    else:
        remedy = "give a directory, an EROFS or squashfs file, or what ImageStore.image gives"
        raise ImageRefused(layer.name, "it is a file of no known kind", remedy)
    return None


def _shift(layer: Path, target: Path, base: int) -> None:
    users = _user_namespace(f"0 {base} {SHARE}", f"0 {base} {SHARE}")
    try:
        kernel.idmap(str(layer), str(target), users)
    except OSError as error:
        why = f"the kernel cannot shift the owners of {layer} ({error})"
        raise SubstrateUnavailable("container", why, "Linux 5.19 or newer and a file system with id-mapped mounts") from None
    finally:
        os.close(users)


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


def _start(keeper: Path, settings: Settings, request: dict[str, Any], seat: Seat, work: Path) -> int:
    """Let crun make the container; the host's number of its process 1."""
    place = keeper / request["id"]
    workspace = request["workspace"] and str(_workspace(place, settings, request["workspace"]))
    _describe(keeper, settings, request, work, workspace)
    if settings.crun is None or settings.mounts is None:
        raise SubstrateUnavailable("container", "crun is missing", "apt-get install crun, and nautile sandbox stop")
    argv = ["crun", "--root", str(work / "crun"), "--cgroup-manager", "disabled", "run", "--detach"]
    argv += ["--bundle", str(work / "bundle"), "--pid-file", str(place / "pid"), request["id"]]
    trees = {str(work / "fs/root"): str(work / "root"), str(work / "fs/shm"): str(work / "shm")}
    trees |= {workspace: workspace} if workspace and settings.base is not None else {}
    orders = Orders(
        tuple(argv),
        (str(work / "crun.log"), *trees.values()),
        {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        background=bool(request.get("ahead")),
    )
    with contextlib.ExitStack() as stack:
        moved = [stack.enter_context(_opened(kernel.open_tree(tree))) for tree in trees]
        kernel.without_programs(moved[1])
        try:
            status = start(seat.control, "c", orders, [settings.crun, settings.mounts, *moved]).wait(_CRUN_LIMIT)
        except (SeatGone, NotStarted) as error:
            raise SandboxLost(f"the process that was to start crun did not: {error.__cause__ or error}") from None
    if status != 0:
        said = (work / "crun.log").read_text(errors="replace")[:4000].strip() if status is not None else ""
        why = f"crun could not start it: {said or status}"
        if status is None:
            why = f"crun did not finish within {_CRUN_LIMIT:g} s"
        raise SubstrateUnavailable("container", why, "nautile sandbox doctor")
    for made in ("bundle", "crun"):  # in memory, and read by nobody any more
        shutil.rmtree(work / made, ignore_errors=True)
    return int((place / "pid").read_text())


def _describe(keeper: Path, settings: Settings, request: dict[str, Any], work: Path, workspace: str | None) -> None:
    """Write what crun reads."""
    users = [{"containerID": 0, "hostID": settings.base or 0, "size": SHARE if settings.base is not None else 1}]
    shm = Limits(**request["limits"]).disk
    description = bundle.configuration(work / "root", keeper / SHARED, request["host_usr"], users, shm, workspace)
    description = bundle.share(description, keeper / SHARED, work / "shm")
    description["linux"]["seccomp"] = first_process_profile()
    (work / "bundle/config.json").write_text(json.dumps(description))


def become_crun(orders: Orders, descriptors: list[int]) -> NoReturn:
    """In the portable seat's fork: become crun. Descriptors: the program, the mount namespace without containers, trees."""
    log = os.open(orders.places[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    nothing = os.memfd_create("nothing")  # crun gives its streams to the container's root: no file of the host
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    kernel.set_namespaces(descriptors[1], kernel.CLONE_NEWNS)
    kernel.unshare(kernel.CLONE_NEWNS)
    for tree, target_path in zip(descriptors[2:], orders.places[1:], strict=True):
        kernel.move_mount(tree, target_path)
    if orders.background:
        os.nice(15)
    program = fcntl.fcntl(descriptors[0], fcntl.F_DUPFD_CLOEXEC, 64)
    os.closerange(3, program)
    os.closerange(program + 1, 2**20)
    os.execve(f"/proc/self/fd/{program}", list(orders.argv), dict(orders.environment))


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


# -- ending


def _close(place: Path, settings: Settings, identity: str) -> None:
    if not place.exists():
        return
    with locked(place):
        name = group_name(place)
        if name is not None:
            settings.group(name).remove()
        end_first_process(place)
        _dismantle(place, name)
    (place.parent / WORK / f".{place.name}.lock").unlink(missing_ok=True)


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


def _dismantle(place: Path, group: str | None) -> None:
    """Remove what is there of a container, whose groups are called ``group`` (None: it had not come so far)."""
    source, work = place.parent / MOUNTS / place.name, place.parent / WORK / (group or "none")
    for mounted in (work / "fs", source):  # what is mounted below goes with it
        with contextlib.suppress(OSError):
            kernel.unmount(str(mounted))
    with contextlib.suppress(OSError):  # never with its content
        os.rmdir(source)
    # Nothing in here was made by the tenant: its files were in the memory that has just been unmounted.
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
