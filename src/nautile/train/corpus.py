"""Natural text: Python sources and documentation that are installed on this machine and whose licence allows it.

The standard library (PSF) and every installed distribution whose own metadata says PSF, BSD, MIT, Apache, ISC, Unlicense,
0BSD or public domain, and nothing else beside it. Files are deduplicated by content and recorded in a manifest: package,
version, licence, bytes. What this file does not know: tokens and rows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "Source", "SourceFile", "allowed_licence", "collect", "documents", "load_manifest", "manifest", "markdown", "read", "scan",
    "write_manifest",
]  # fmt: skip

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
_LARGEST = 400_000  # bytes of one file: what is longer is data or generated
_SMALLEST = 200
_SKIPPED = frozenset(
    ("__pycache__", "_vendor", "vendored", "_vendored", "vendor", "third_party", "thirdparty", "extern", "externals")
)
# As they stand in metadata: SPDX names, the names of classifiers, and what people write in the old licence field.
_ALLOWED = re.compile(
    r"(the )?(psf(-2\.0| license)?|python-2\.0(\.\d)?|python software foundation( license)?"
    r"|mit(-0|-cmu| license)?( \(mit\))?|0bsd|bsd( license)?|bsd[- ]?[23][- ]clause( license)?|[23]-clause bsd( license)?"
    r"|(new|modified) bsd( license)?|apache( software)?( license)?(,? version)?[- ]?(2|2\.0)?( license| software license)?"
    r"|isc( license)?( \(iscl\))?|unlicense( \(unlicense\))?|public domain|cc0-1\.0|cc-by-4\.0"
    r"|(historical permission notice and disclaimer )?\(?hpnd\)?)",
    re.IGNORECASE,
)
_CLASSIFIER = "License :: "
_LICENCE_TEXTS = ("license", "licence", "copying")
_PART = 24_000  # characters taken from one file at a time


@dataclass(frozen=True)
class Source:
    """One package whose text may be used: ``files`` are paths below ``root``."""

    name: str
    version: str
    licence: str
    root: Path
    files: tuple[str, ...]


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus, as the manifest records it. No machine's own paths."""

    package: str
    version: str
    licence: str
    path: str
    bytes: int
    sha256: str


def allowed_licence(expression: str) -> bool:
    """Whether every part of a licence expression ("MIT", "Apache-2.0 OR BSD-3-Clause", ...) is on the list.

    Of alternatives joined by OR one is enough; of terms joined by AND all must be. Anything not understood is refused.
    """
    text = expression.strip()
    if _ALLOWED.fullmatch(text):
        return True
    if len(text) > 200 or "\n" in text:
        return False
    for alternative in text.split(" OR "):
        terms = [term.strip() for term in alternative.strip("() ").split(" AND ")]
        if all(_ALLOWED.fullmatch(term) for term in terms):
            return True
    return False


def _licence_of(distribution: metadata.Distribution) -> str | None:
    """The licence a distribution declares, when it is allowed: its expression, its classifiers, or its licence field."""
    data = distribution.metadata
    if "License-Expression" in data:
        declared = data["License-Expression"]
        return declared if allowed_licence(declared) else None
    classifiers = [line for line in data.get_all("Classifier") or [] if line.startswith(_CLASSIFIER)]
    names = [line.split(" :: ")[-1] for line in classifiers if not line.endswith("OSI Approved")]
    if names:
        return " AND ".join(names) if all(allowed_licence(name) for name in names) else None
    if "License" not in data:
        return None
    field = data["License"].strip()
    return field if allowed_licence(field) else None


def _usable(path: Path) -> bool:
    return (
        path.suffix in SUFFIXES and not _SKIPPED.intersection(path.parts) and not path.name.lower().startswith(_LICENCE_TEXTS)
    )


def _standard_library() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "lib2to3", "idlelib", "ensurepip"}
    files: list[str] = []
    for folder, names, entries in os.walk(root):
        names[:] = sorted(name for name in names if name not in skip and not name.startswith("config-"))
        paths = (Path(folder, entry).relative_to(root) for entry in entries)
        files += [str(path) for path in paths if _usable(path)]
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Source("python-standard-library", version, "PSF-2.0", root, tuple(sorted(files)))


def collect(packages: Sequence[str] | None = None) -> list[Source]:
    """The standard library and every allowed distribution (or only those named), sorted by name, each with its files."""
    sources = {"python-standard-library": _standard_library()}
    for distribution in metadata.distributions():
        name = distribution.name.lower().replace("_", "-")
        if not name or name in sources or (packages is not None and name not in packages):
            continue
        licence = _licence_of(distribution)
        if licence is None:
            continue
        files = sorted(str(entry) for entry in distribution.files or () if _usable(Path(entry)) and ".." not in entry.parts)
        root = Path(str(distribution.locate_file("")))
        sources[name] = Source(name, distribution.version, licence, root, tuple(files))
    return [sources[name] for name in sorted(sources)]


def read(path: Path) -> str | None:
    """The text of a file worth learning from; None for what is too small, too large, not UTF-8, or made of data."""
    try:
        size = path.stat().st_size
        if not _SMALLEST <= size <= _LARGEST:
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    letters = sum(character.isalpha() or character.isspace() for character in text[:4000])
    longest = max((len(line) for line in text.split("\n")), default=0)
    return text if letters > 0.55 * min(len(text), 4000) and longest < 2000 else None


def _record(item: tuple[Source, str]) -> SourceFile | None:
    source, path = item
    text = read(source.root / path)
    if text is None:
        return None
    data = text.encode()
    return SourceFile(source.name, source.version, source.licence, path, len(data), hashlib.sha256(data).hexdigest())


def scan(sources: Sequence[Source], processes: int = 1) -> list[SourceFile]:
    """Read every file once, with several processes if asked: what is worth learning from, without duplicates, sorted."""
    items = [(replace(source, files=()), path) for source in sources for path in source.files]
    if processes > 1:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            records = pool.map(_record, items, chunksize=64)
    else:
        records = [_record(item) for item in items]
    first: dict[str, SourceFile] = {}
    for record in records:
        if record is not None:
            first.setdefault(record.sha256, record)
    return sorted(first.values(), key=lambda record: (record.package, record.path))


def documents(sources: Sequence[Source], files: Sequence[SourceFile], seed: int | str) -> Iterator[str]:
    """Texts of the scanned files for ever, in an order of the seed's own: parts of at most 24,000 characters.

    Files are drawn by their length up to that limit, so that neither short nor very long ones dominate. Nothing is kept in
    memory; a file that has changed or gone since the scan is skipped.
    """
    roots = {source.name: source.root for source in sources}
    weights = list(itertools.accumulate(min(record.bytes, _PART) for record in files))
    rng = random.Random(f"corpus:{seed}")
    while True:
        record = rng.choices(files, cum_weights=weights)[0]
        text = read(roots[record.package] / record.path)
        start = rng.randrange(max(1, record.bytes - _PART))
        if text is not None:
            yield text[start : start + _PART] if start == 0 else text[start : start + _PART].partition("\n")[2]


def manifest(files: Sequence[SourceFile]) -> dict[str, Any]:
    """What the corpus holds: totals, one entry per package, one entry per file."""
    packages: dict[str, dict[str, Any]] = {}
    for record in files:
        entry = packages.setdefault(
            record.package, {"version": record.version, "licence": record.licence, "files": 0, "bytes": 0}
        )
        entry["files"] += 1
        entry["bytes"] += record.bytes
    total = {"files": len(files), "bytes": sum(record.bytes for record in files)}
    return {"total": total, "packages": packages, "files": [asdict(record) for record in files]}


def markdown(data: dict[str, Any]) -> str:
    """A manifest's packages as a table, for docs/DATA.md."""
    lines = ["| package | version | licence | files | kB |", "|---|---|---|---:|---:|"]
    for name, entry in sorted(data["packages"].items()):
        lines.append(f"| {name} | {entry['version']} | {entry['licence']} | {entry['files']} | {entry['bytes'] / 1000:.0f} |")
    total = data["total"]
    return "\n".join([*lines, f"| **all** | | | {total['files']} | {total['bytes'] / 1000:.0f} |"])


def write_manifest(files: Sequence[SourceFile], path: Path) -> None:
    """Write ``manifest`` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(manifest(files), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def load_manifest(path: Path) -> list[SourceFile]:
    """The files of a manifest that ``write_manifest`` wrote."""
    return [SourceFile(**record) for record in json.loads(path.read_text(encoding="utf-8"))["files"]]
