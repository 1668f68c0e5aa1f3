"""``--model``: a directory, or a Hugging Face Hub id that is fetched into huggingface_hub's own cache.

Cache location, endpoint, token and offline mode are huggingface_hub's (its options and variables such as HF_HOME and
HF_ENDPOINT); interrupted downloads resume there. Before weights are fetched, the configuration is, so that a model which
Nautile does not run costs one small file; and the bytes still missing are compared with the free disk space.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from nautile.checkpoint.configuration import read_config
from nautile.checkpoint.errors import CheckpointError
from nautile.config import ModelConfig

__all__ = ["resolve_config", "resolve_model"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "LICENSE*"]
_SPARE = 1 << 30  # bytes left free on the disk


def resolve_model(
    path_or_id: str | Path, revision: str | None = None, *, cache_dir: str | Path | None = None, endpoint: str | None = None
) -> Path:
    """The directory of a model: ``path_or_id`` itself when it is one, else the downloaded snapshot of that Hub id.

    Args: revision, branch, tag or commit of a Hub id; cache_dir and endpoint, None for huggingface_hub's settings.
    Raises CheckpointError when there is no such directory or repository, access is refused, the network fails, or the disk
    is too small; ConfigError when the repository holds another architecture.
    """
    local = _local(path_or_id, revision)
    return local if local is not None else _download(str(path_or_id), revision, _text(cache_dir), endpoint)


def resolve_config(
    path_or_id: str | Path, revision: str | None = None, *, cache_dir: str | Path | None = None, endpoint: str | None = None
) -> ModelConfig:
    """The configuration of a model directory or Hub id, without its weights. Arguments and errors as ``resolve_model``."""
    local = _local(path_or_id, revision)
    if local is None:
        local = _fetch(str(path_or_id), revision, _text(cache_dir), endpoint, ["config.json"])
    return read_config(local).model


def _local(path_or_id: str | Path, revision: str | None) -> Path | None:
    """The directory, or None for a Hub id."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{path} is a directory; a revision ({revision}) belongs to a Hub id")
        return path
    if path.exists() or not _ID.fullmatch(str(path_or_id)):
        raise CheckpointError(f"{path_or_id} is neither a model directory nor a Hugging Face Hub id (owner/name)")
    return None


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _download(name: str, revision: str | None, cache_dir: str | None, endpoint: str | None) -> Path:
    read_config(_fetch(name, revision, cache_dir, endpoint, ["config.json"]))
    _require_space(name, revision, cache_dir, endpoint)
    return _fetch(name, revision, cache_dir, endpoint, _PATTERNS)


def _fetch(name: str, revision: str | None, cache_dir: str | None, endpoint: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # a directory needs no network client
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, endpoint=endpoint, allow_patterns=patterns))
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reasons = {
            0: "the Hub gave no answer",
            401: "no such model, or a token is needed (hf auth login)",
            403: "access refused: accept its terms on the Hub, and log in (hf auth login)",
            404: "no such model or revision on the Hub",
        }
        raise CheckpointError(f"{name}: {reasons.get(status, f'the Hub answered {status}; try again later')}") from None
    except LocalEntryNotFoundError as error:
        cause = str(error).splitlines()[0]
        raise CheckpointError(f"{name}: the Hub cannot be reached and the model is not in the cache ({cause})") from None
    except OSError as error:
        raise CheckpointError(f"{name}: download failed ({error}); run the command again to resume it") from None


def _require_space(name: str, revision: str | None, cache_dir: str | None, endpoint: str | None) -> None:
    from huggingface_hub import constants, snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import DryRunError  # noqa: PLC0415

    try:
        files = snapshot_download(
            name, revision=revision, cache_dir=cache_dir, endpoint=endpoint, allow_patterns=_PATTERNS, dry_run=True
        )
    except DryRunError:
        return  # offline: the cache holds the model or the download says that it cannot be reached
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    folder = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed and needed + _SPARE > free:
        raise CheckpointError(
            f"{name}: {needed / 1e9:.1f} GB are still to be fetched and {folder} has {free / 1e9:.1f} GB free; free some space "
            "or move the cache (HF_HOME)"
        )
