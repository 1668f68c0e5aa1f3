"""An OCI image layout (oci-layout, index.json, blobs) as a source of layers; every blob is checked against its digest."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nautile.sandbox.errors import ImageRefused
from nautile.sandbox.images.write import LayerWriter, add_tar

__all__ = ["layers"]

_LARGEST = 16 * 2**20  # bytes of an index, a manifest, a configuration
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64", "s390x": "s390x", "ppc64le": "ppc64le"}
_INDICES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")


def layers(place: Path) -> Iterator[Callable[[LayerWriter], None]]:
    """What fills each layer of the image for this machine, lowest first. Raises ImageRefused."""
    try:
        manifest = _manifest(place, _read_json(place / "index.json", place))
        configuration = json.loads(_blob(place, manifest["config"]))
        _check_machine(place, configuration.get("architecture"), configuration.get("os"))
        descriptors = list(manifest["layers"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ImageRefused(str(place), f"it is not an OCI layout: {type(error).__name__} {error}", "copy it again") from None
    for descriptor in descriptors:
        yield lambda writer, one=descriptor: _fill(writer, place, one)  # type: ignore[misc]


def _manifest(place: Path, index: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """The manifest for this machine; without platforms the only one."""
    fitting = [one for one in index["manifests"] if _fits(one.get("platform"))]
    if not fitting:
        offered = {str((one.get("platform") or {}).get("architecture")) for one in index["manifests"]}
        _check_machine(place, ", ".join(sorted(offered)) or "nothing", "linux")
    if len(fitting) > 1 and not all(one.get("platform") for one in fitting):
        raise ImageRefused(str(place), f"it holds {len(fitting)} images", "keep one in the layout")
    found: dict[str, Any] = json.loads(_blob(place, fitting[0]))
    if fitting[0].get("mediaType") in _INDICES and depth < 3:
        return _manifest(place, found, depth + 1)
    return found


def _fits(wanted: Any) -> bool:
    return wanted is None or (
        wanted.get("architecture") == _ARCHITECTURES.get(platform.machine()) and wanted.get("os") == "linux"
    )


def _check_machine(place: Path, architecture: Any, system: Any) -> None:
    here = _ARCHITECTURES.get(platform.machine(), platform.machine())
    if architecture != here or system != "linux":
        raise ImageRefused(str(place), f"it is for {system}/{architecture}, and this machine is linux/{here}", "fetch that one")


def _read_json(path: Path, place: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST:
            raise ImageRefused(str(place), f"{path.name} is too large", "copy it again")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ImageRefused(str(place), f"{path.name} cannot be read ({error.strerror})", "copy it again") from None


def _path(place: Path, descriptor: dict[str, Any]) -> Path:
    algorithm, _, digest = str(descriptor["digest"]).partition(":")
    if algorithm != "sha256" or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ImageRefused(str(place), f"the digest {digest[:80]!r} is of no known kind", "use sha256")
    return place / "blobs/sha256" / digest


def _blob(place: Path, descriptor: dict[str, Any]) -> bytes:
    path = _path(place, descriptor)
    if not path.is_file() or path.is_symlink() or path.stat().st_size > _LARGEST:
        raise ImageRefused(str(place), f"blob {path.name[:12]} is not there", "copy it again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != path.name:
        raise ImageRefused(str(place), f"blob {path.name[:12]} is not what its name says", "copy it again")
    return data


def _fill(writer: LayerWriter, place: Path, descriptor: dict[str, Any]) -> None:
    path = _path(place, descriptor)
    if not path.is_file() or path.is_symlink():
        raise ImageRefused(str(place), f"layer {path.name[:12]} is not there", "copy it again")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(2**20):
            digest.update(data)
        if digest.hexdigest() != path.name:
            raise ImageRefused(str(place), f"layer {path.name[:12]} is not what its name says", "copy it again")
        file.seek(0)
        add_tar(writer, file)
