"""What a container starts from: read-only layers, lowest first. A layer is a directory in overlayfs form on the host."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nautile.sandbox.errors import InvalidRequest

__all__ = ["Image"]


@dataclass(frozen=True)
class Image:
    """``host_usr``: the host's /usr is there read-only, below the layers. Without it the layers are the whole system."""

    layers: tuple[Path, ...] = ()
    host_usr: bool = True

    @classmethod
    def of(cls, image: Image | Path | str | None) -> Image:
        """None: the host's /usr and nothing else. A path: a directory with a root file system. Raises InvalidRequest."""
        if image is None:
            return cls()
        if isinstance(image, Image):
            found = image
        else:
            found = cls((Path(image).absolute(),), host_usr=False)
        for layer in found.layers:
            if not layer.is_dir():
                raise InvalidRequest(f"image {layer}: not a directory; give a directory with a root file system")
            if any(mark in str(layer) for mark in ":,\\\n"):
                raise InvalidRequest(f"image {layer}: overlayfs cannot take a path with a colon, comma, backslash or newline")
        return found
