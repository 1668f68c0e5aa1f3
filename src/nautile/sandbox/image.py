"""What a container starts from: read-only layers, lowest first.

A layer is a directory in overlayfs form on the host, or a file: an EROFS or squashfs image, or a lazy layer's description
(images/store.py makes all of them). The keeper mounts files once for all containers.
"""

from __future__ import annotations

import os
import shutil
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from nautile.sandbox.errors import InvalidRequest

__all__ = ["Image", "TemporaryLayer"]


class TemporaryLayer:
    """A layer's directory that ends with the last image or sandbox that uses it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._finalizer = weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)


@dataclass(frozen=True)
class Image:
    """``host_usr``: the host's /usr is there read-only, below the layers. Without it the layers are the whole system."""

    layers: tuple[Path, ...] = ()
    host_usr: bool = True
    memory: Path | None = None  # processes and files saved by runsc; only runtime="runsc" can continue them
    held: tuple[TemporaryLayer, ...] = field(default=(), repr=False, compare=False)

    def with_layer(self, layer: TemporaryLayer) -> Image:
        """This image with one more layer on top."""
        return Image((*self.layers, layer.place), self.host_usr, held=(*self.held, layer))

    @classmethod
    def of(cls, image: Image | Path | str | None) -> Image:
        """None: the host's /usr and nothing else. A path: a directory with a root file system. A name: an image of the user's
        store (``nautile sandbox image list``), read lazily. Raises InvalidRequest, ImageRefused.
        """
        if image is None:
            return cls()
        if not isinstance(image, Image) and Path(image).name == str(image) and not os.path.lexists(image):
            from nautile.sandbox.images.store import ImageStore  # noqa: PLC0415  # which makes images

            image = ImageStore().image(str(image))
        found = image if isinstance(image, Image) else cls((Path(image).absolute(),), host_usr=False)
        for layer in found.layers:
            if not layer.is_dir() and not layer.is_file():
                raise InvalidRequest(f"image {layer}: not a directory; give a directory with a root file system")
            if any(mark in str(layer) for mark in ":,\\\n"):
                raise InvalidRequest(f"image {layer}: overlayfs cannot take a path with a colon, comma, backslash or newline")
        return found
