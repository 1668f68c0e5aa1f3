"""One emulated machine: QEMU in bubblewrap, in a cgroup, without network, files or rights, and a warden beside it.

QEMU gets everything as open descriptors: the kernel, memory, disks, the agent's channel, its own control channel. It runs as a
user who owns nothing (if we are root), behind the same system call filter as tenants and QEMU's own on top.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nautile.sandbox import cgroup, seccomp
from nautile.sandbox.errors import SandboxError, SandboxLost, SubstrateUnavailable
from nautile.sandbox.function import host_directories
from nautile.sandbox.guest import places
from nautile.sandbox.guest.boot import Boot
from nautile.sandbox.guest.kernel import cache_directory
from nautile.sandbox.guest.link import Link
from nautile.sandbox.guest.qmp import Monitor
from nautile.sandbox.inside import frames
from nautile.sandbox.limits import MIB, Limits

__all__ = ["Drive", "Emulator", "Machine", "guest_memory", "program", "version"]

_OVERHEAD = 192 * MIB  # of QEMU beside the guest's memory: its own, and translated code
_TRANSLATED = 64  # MiB of translated code that are kept
_FIRST_ID, _LAST_ID = 524_288, 1_878_982_656  # user ids that no account has
_PACKAGE = "apt-get install qemu-system-x86"
_APPEND = "console=ttyS0 quiet reboot=t panic=-1 mitigations=off random.trust_cpu=on init_on_alloc=0 cgroup_no_v1=all"
# Without a known TSC frequency one boot in five hangs in its calibration under emulation; a real one must be measured.
# And on a busy machine the kernel's test of its timer sees too few ticks, takes it for broken ("MP-BIOS bug"), and hangs.
_EMULATED = " tsc_early_khz=2500000 no_timer_check"
_CHILD = """
import sys, types
for name, place in (("nautile", sys.argv[1]), ("nautile.sandbox", sys.argv[1] + "/sandbox")):
    module = types.ModuleType(name)
    module.__path__ = [place]
    sys.modules[name] = module
from nautile.sandbox.guest.warden import main
main()
"""


def program(substrate: str) -> str:
    """QEMU's path. Raises SubstrateUnavailable."""
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        raise SubstrateUnavailable(substrate, "QEMU is missing", _PACKAGE)
    if shutil.which("bwrap") is None:
        raise SubstrateUnavailable(substrate, "bubblewrap, which confines QEMU, is missing", "apt-get install bubblewrap")
    if not Path("/bin").is_symlink():
        raise SubstrateUnavailable(substrate, "this system's /bin is not a part of /usr", "use a system of 2020 or newer")
    return found


def version(path: str) -> str:
    """What QEMU says that it is; asked once for each program, since every machine's start would wait for it."""
    found = os.stat(path)
    kept = cache_directory() / f"qemu-{found.st_size}-{found.st_mtime_ns}"
    with contextlib.suppress(OSError):
        return kept.read_text(encoding="utf-8")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=20)
    match = re.search(r"version (\S+(?: \([^)]*\))?)", done.stdout)
    if match is None:
        return "unknown"
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_name(f".{kept.name}.{secrets.token_hex(4)}")
    temporary.write_text(match[1], encoding="utf-8")
    os.rename(temporary, kept)
    return match[1]


def guest_memory(limits: Limits) -> int:
    """Memory of a guest whose tenant may use ``limits.memory``: its kernel and agent come on top."""
    step = 32 * MIB
    return -(-(limits.memory + limits.memory // 32 + 96 * MIB) // step) * step


@dataclass(frozen=True)
class Drive:
    """A writable disk of a VM: open descriptors of its files, the top of the chain last; ``kinds``: qcow2 or raw."""

    descriptors: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...]
    serial: str = "own"


@dataclass(frozen=True)
class Machine:
    """What to start. ``disks``: indexes of read-only disks, whose serial numbers are layer0, layer1, ...; ``boot`` None: from
    the drive. ``memory``: a memory file that it begins with, and ``state``: the rest of the state that belongs to it."""

    substrate: str
    accel: str
    limits: Limits
    processors: int
    boot: Boot | None
    disks: tuple[Path, ...] = ()
    drive: Drive | None = None
    memory: int | None = None
    state: int | None = None


class Emulator:
    """A machine that runs. ``link``: its agent; ``monitor``: QEMU; ``memory``: its memory as a file, shared with it."""

    def __init__(self, machine: Machine, identity: str) -> None:
        path = program(machine.substrate)
        self.machine, self.identity = machine, identity
        own = Limits(
            memory=min(guest_memory(machine.limits) + _OVERHEAD, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
            pids=64 + 4 * machine.processors,
            cpus=machine.limits.cpus,
            allow_unenforced=machine.limits.allow_unenforced,
        )
        cgroup.sweep()
        places.sweep()
        self.group = cgroup.Group.create(identity, own, owner=cgroup.owner_name())
        self._warden: subprocess.Popen[bytes] | None = None
        self.memory = os.memfd_create(f"nautile-{machine.substrate}", os.MFD_CLOEXEC)
        try:
            self._start(path)
        except BaseException:
            self.close()
            raise

    def _start(self, path: str) -> None:
        machine = self.machine
        if machine.memory is None:
            os.ftruncate(self.memory, guest_memory(machine.limits))
        with contextlib.ExitStack() as kept:
            pairs = [socket.socketpair() for _ in range(3 + len(machine.disks))]
            for _, theirs in pairs:
                kept.callback(theirs.close)
            (link, their_link), (monitor, their_monitor), (self._lease, their_lease), *blocks = pairs
            self.link, self.monitor = Link(link), Monitor(monitor)
            for ours, _ in blocks:  # the warden's ends
                kept.callback(ours.close)
            filter_ = os.memfd_create("seccomp")
            kept.callback(os.close, filter_)
            os.write(filter_, seccomp.program(system_v=False))
            os.lseek(filter_, 0, os.SEEK_SET)
            given = [filter_, self.memory, their_link.fileno(), their_monitor.fileno(), *(one.fileno() for _, one in blocks)]
            argv = _Command(machine, path, given, kept)
            words = [*self._entrance(), *_confinement(machine, filter_), "--", *argv.words]
            request = {
                "argv": words,
                "emulator": argv.descriptors,
                "entrances": [str(one) for one in self.group.entrances],
                "groups": [str(one) for one in self.group.places],
                "memory": None if machine.memory is None else [machine.memory, self.memory],
                "exports": [
                    {"descriptor": ours.fileno(), "index": str(index)}
                    for (ours, _), index in zip(blocks, machine.disks, strict=True)
                ],
            }
            passed = [*argv.descriptors, *(ours.fileno() for ours, _ in blocks)]
            passed += [] if machine.memory is None else [machine.memory]
            root = str(Path(__file__).parents[1])
            self._warden = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-c", _CHILD, root],
                stdin=their_lease.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=passed,
                start_new_session=True,
                env={},
                cwd="/",
            )
            frames.send(self._lease, request)
        if machine.state is not None:
            self.monitor.load(machine.state)

    def _entrance(self) -> list[str]:
        """Become a user who owns nothing, if we are root; the kernel's own virtualisation needs the group of its device."""
        if os.geteuid() != 0:
            return []
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise SubstrateUnavailable(self.machine.substrate, "setpriv is missing", "apt-get install util-linux")
        user = str(_FIRST_ID + secrets.randbelow(_LAST_ID - _FIRST_ID))
        group = user
        if self.machine.accel == "kvm":
            device = os.stat("/dev/kvm")
            if device.st_mode & 0o066 == 0:  # only root may: it is then confined by its namespaces alone
                return []
            group = str(device.st_gid)
        return [setpriv, "--reuid", user, "--regid", group, "--clear-groups", "--inh-caps=-all", "--"]

    @property
    def ended(self) -> bool:
        """Whether QEMU has ended, which its warden says or shows by ending too."""
        if self._lease.fileno() < 0:  # closed by us
            return True
        poll = select.poll()
        poll.register(self._lease.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def why(self) -> str:
        """What the emulator said when it ended; empty while it runs."""
        self._lease.settimeout(2.0)
        with contextlib.suppress(OSError, frames.BrokenFrameError):
            message = frames.receive(self._lease)
            if message is not None:
                said = message[1].decode("utf-8", "replace").strip().splitlines()
                return f"QEMU ended with {message[0]['ended']}" + (f": {said[-1][:300]}" if said else "")
        words = self._warden.stderr.read() if self._warden and self._warden.stderr else b""
        lines = words.decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""

    def greet(self, seconds: float) -> None:
        """Wait for the agent of a machine that boots. Raises SubstrateUnavailable with what the console says."""
        try:
            self.link.greet(seconds)
        except SandboxLost as error:
            why = str(error)
            if "ended" in why:
                why = self.why() or why
            else:
                with contextlib.suppress(SandboxError):
                    lines = [line.strip() for line in self.monitor.console().splitlines() if line.strip()]
                    why += f"; its console ends with {lines[-1][:200]!r}" if lines else ""
            raise SubstrateUnavailable(
                self.machine.substrate, f"a guest did not boot: {why}", "nautile sandbox doctor"
            ) from None

    def save(self, state: int) -> None:
        """Write the state of the machine beside its memory; it stands still and must be told to go on."""
        self.monitor.ask("stop")
        self.monitor.save(state)

    def stop(self) -> None:
        """Let the machine stand still."""
        self.monitor.ask("stop")

    def go_on(self) -> None:
        """After ``save`` or ``stop``."""
        self.monitor.ask("cont")

    def close(self) -> None:
        """End it: nothing of it stays."""
        for name in ("link", "monitor", "_lease"):
            if (channel := getattr(self, name, None)) is not None:
                channel.close()
        if self._warden is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._warden.wait(timeout=10.0)
            if self._warden.returncode is None:
                self._warden.kill()
                self._warden.wait()
            if self._warden.stderr is not None:
                self._warden.stderr.close()
        self.group.remove()
        with contextlib.suppress(OSError):
            os.close(self.memory)


class _Command:
    """QEMU's command line, and the descriptors that go with it."""

    def __init__(self, machine: Machine, path: str, given: list[int], kept: contextlib.ExitStack) -> None:
        self.descriptors, self._kept, self._machine = list(given), kept, machine
        _, memory, link, monitor, *blocks = given
        size = guest_memory(machine.limits)
        self.words = [path, "-nodefaults", "-no-user-config", "-nographic", "-no-reboot"]
        self.words += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
        self.words += ["-machine", self._board(), "-cpu", "host,-arch-capabilities" if machine.accel == "kvm" else "max"]
        self.words += ["-smp", str(machine.processors), "-m", f"{size // MIB}M"]
        self.words += [
            "-object", f"memory-backend-file,id=ram,size={size},mem-path=/proc/self/fd/{memory},share=on,merge=off",
            "-chardev", f"socket,id=agent,fd={link}", "-chardev", f"socket,id=control,fd={monitor}",
            "-mon", "chardev=control,mode=control",
            "-chardev", "ringbuf,id=console,size=65536", "-serial", "chardev:console",
        ]  # fmt: skip
        suffix = "device" if machine.substrate == "microvm" else "pci"
        self.words += ["-device", f"virtio-serial-{suffix}", "-device", "virtserialport,chardev=agent,name=nautile"]
        if machine.boot is not None:
            self.words += ["-kernel", self._file(machine.boot.kernel), "-initrd", self._file(machine.boot.initrd)]
            self.words += ["-append", _APPEND + (_EMULATED if machine.accel == "tcg" else "")]
        for number, descriptor in enumerate(blocks):
            self._layer(number, descriptor, suffix)
        if machine.drive is not None:
            self._drive(machine.drive, suffix)
        if machine.state is not None:
            self.words += ["-incoming", "defer"]

    def _board(self) -> str:
        accel = "kvm" if self._machine.accel == "kvm" else f"tcg,tb-size={_TRANSLATED}"
        self.words += ["-accel", accel]
        if self._machine.substrate == "microvm":
            self.words += ["-global", "virtio-mmio.force-legacy=false"]
            return "microvm,pit=on,pic=on,rtc=on,isa-serial=on,x-option-roms=off,acpi=on,memory-backend=ram"
        return "q35,smm=off,vmport=off,hpet=off,memory-backend=ram"

    def _file(self, path: Path) -> str:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._kept.callback(os.close, descriptor)
        self.descriptors.append(descriptor)
        return f"/proc/self/fd/{descriptor}"

    def _layer(self, number: int, descriptor: int, suffix: str) -> None:
        node: dict[str, Any] = {
            "driver": "nbd",
            "node-name": f"layer{number}",
            "server": {"type": "fd", "str": str(descriptor)},
            "read-only": True,
        }
        device = f"virtio-blk-{suffix},drive=layer{number},serial=layer{number}"
        self.words += ["-blockdev", json.dumps(node), "-device", device]

    def _drive(self, drive: Drive, suffix: str) -> None:
        for number, (descriptors, kind) in enumerate(zip(drive.descriptors, drive.kinds, strict=True)):
            self.descriptors += descriptors
            for descriptor in descriptors:
                self.words += ["-add-fd", f"fd={descriptor},set={number + 1}"]
            top = number == len(drive.kinds) - 1
            file = {
                "driver": "file",
                "node-name": f"file{number}",
                "filename": f"/dev/fdset/{number + 1}",
                "read-only": not top,
                "locking": "off",  # one machine writes each file: the chain sees to it
            }
            node: dict[str, Any] = {
                "driver": kind,
                "node-name": f"drive{number}",
                "file": f"file{number}",
                "read-only": not top,
            }
            if kind == "qcow2":
                node["backing"] = f"drive{number - 1}" if number else None
            self.words += ["-blockdev", json.dumps(file), "-blockdev", json.dumps(node)]
        top_node = f"drive{len(drive.kinds) - 1}"
        index = ",bootindex=0" if self._machine.boot is None else ""
        self.words += ["-device", f"virtio-blk-{suffix},drive={top_node},serial={drive.serial}{index}"]


def _confinement(machine: Machine, filter_: int) -> list[str]:
    """bubblewrap around QEMU: /usr read-only, nothing writable, no network, no capability."""
    argv = [str(shutil.which("bwrap")), "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "1000", "--gid", "1000"]
    argv += ["--cap-drop", "ALL", "--new-session", "--die-with-parent", "--hostname", "machine", "--clearenv", "--as-pid-1"]
    argv += ["--seccomp", str(filter_), "--proc", "/proc", "--remount-ro", "/proc", "--dev", "/dev", *host_directories()]
    if machine.accel == "kvm":
        argv += ["--dev-bind", "/dev/kvm", "/dev/kvm"]
    return [*argv, "--remount-ro", "/"]


def devices() -> Iterator[str]:
    """Why the kernel's own virtualisation cannot even be tried, if it cannot."""
    if not os.path.exists("/dev/kvm"):
        yield "there is no /dev/kvm"
    elif not os.access("/dev/kvm", os.R_OK | os.W_OK):
        yield "/dev/kvm may not be opened"
