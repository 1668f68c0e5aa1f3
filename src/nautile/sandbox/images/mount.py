"""Layers that are files: EROFS and squashfs images, and lazy layers, mounted by the keeper once for all of its containers."""

from __future__ import annotations

import json
import os
import select
import subprocess
import traceback
from pathlib import Path
from typing import Any, NoReturn

from nautile.sandbox import kernel
from nautile.sandbox.errors import ImageRefused, SubstrateUnavailable
from nautile.sandbox.images.blobs import Credentials, open_blobs
from nautile.sandbox.images.chunks import Chunks
from nautile.sandbox.images.fuse import Server
from nautile.sandbox.images.tree import Layer, digest_of

__all__ = ["kind_of_file", "mount_image", "mount_lazy"]

_THREADS = 4  # reads that may wait for the store at once
_LARGEST = 2**16  # bytes of a lazy layer's description


def kind_of_file(place: Path) -> str | None:
    """``erofs``, ``squashfs`` or ``lazy``, by the first bytes of a file; None for anything else."""
    try:
        with open(place, "rb") as file:
            head = file.read(1028)
    except OSError:
        return None
    if head[1024:1028] == b"\xe2\xe1\xf5\xe0":
        return "erofs"
    if head.startswith(b"hsqs"):
        return "squashfs"
    return "lazy" if head.startswith(b'{"format": "nautile-lazy-1"') else None


def mount_image(place: Path, kind: str, target: Path) -> None:
    """Mount an EROFS or squashfs file through a loop device. Raises SubstrateUnavailable."""
    argv = ["mount", "-t", kind, "-o", "loop,ro,nosuid,nodev", str(place), str(target)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        why = f"{place.name} cannot be mounted ({said[0] if said else done.returncode})"
        raise SubstrateUnavailable("image", why, "use mode='directory' or 'lazy'")


def mount_lazy(place: Path, target: Path, base: int) -> None:
    """Mount a lazy layer; a fork of this process serves it until our parent, the keeper, has ended.

    Raises ImageRefused, SubstrateUnavailable.
    """
    layer, chunks = _opened(place)
    try:
        descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read=1048576"
        kernel.mount("nautile-lazy", str(target), "fuse", kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV, options)
    except OSError as error:
        why = f"a lazy layer cannot be mounted ({error})"
        raise SubstrateUnavailable("image", why, "use mode='directory', or a machine with /dev/fuse") from None
    keeper = os.pidfd_open(os.getppid())
    if os.fork() == 0:
        _serve(Server(descriptor, layer, chunks, base), keeper)
    os.close(keeper)
    os.close(descriptor)


def _opened(place: Path) -> tuple[Layer, Chunks]:
    try:
        if place.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        told: dict[str, Any] = json.loads(place.read_text())
        index = Path(told["index"]).read_bytes()
        if digest_of(index) != told["digest"]:
            raise ValueError("its index was changed")
        credentials = Credentials(**told["credentials"]) if told["credentials"] else None
        blobs, cache, notes = open_blobs(told["store"], credentials), Path(told["chunks"]), Path(told["notes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImageRefused(place.name[:12], f"it is no lazy layer ({error})", "make it again with ImageStore.image") from None
    layer = Layer.unpack(index, place.name[:12])
    return layer, Chunks(layer, blobs, cache, notes)


def _serve(server: Server, keeper: int) -> NoReturn:
    """The process behind a lazy layer: it ends with the mount, or with the keeper."""
    try:
        os.setsid()
        os.dup2(server.descriptor, 3, inheritable=False)
        os.dup2(keeper, 4, inheritable=False)
        os.closerange(5, 2**20)
        server.descriptor = 3
        threads = server.start(_THREADS)
        poll = select.poll()
        poll.register(4, select.POLLIN)
        while not poll.poll(500) and any(one.is_alive() for one in threads):
            server.chunks.note()
        server.chunks.note(force=True)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
