"""Natural text: Python sources and documentation that are installed on this machine and whose licence allows it.

The standard library (PSF) and every installed distribution whose own metadata says PSF, BSD, MIT, Apache, ISC, Unlicense,
0BSD or public domain, and nothing else beside it. Files are deduplicated by content and recorded in a manifest: package,
version, licence, bytes. What this file does not know: tokens and rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

__all__ = ["Source", "SourceFile", "allowed_licence", "collect", "documents", "manifest", "write_manifest"]

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
_LARGEST = 400_000  # bytes of one file: what is longer is data or generated
_SMALLEST = 200
_SKIPPED = frozenset(("__pycache__", "_vendor", "vendored", "_vendored", "vendor", "third_party", "thirdparty", "extern", "externals"))
_ALLOWED = re.compile(
    r"^(psf|psf-2\.0|python-2\.0(\.\d)?|python software foundation( license)?|psf license|mit|mit license|the mit license( \(mit\))?|mit-cmu|mit-0|"
    r"0bsd|bsd|bsd[- ]?[23][- ]clause( license)?|bsd license|new bsd( license)?|modified bsd( license)?|[23]-clause bsd( license)?|"
    r"apache|apache 2.0 license|apache[- ]2\.0|apache 2(\.0)?|apache license,? (version )?2\.0|apache software license( 2\.0)?|apache license 2|"
    r"isc|isc license( \(iscl\))?|unlicense|the unlicense( \(unlicense\))?|public domain|cc0-1\.0|cc-by-4\.0|historical permission notice and disclaimer \(hpnd\)|hpnd)$",
    re.IGNORECASE,
)
_CLASSIFIER = "License :: "


@dataclass(frozen=True)
class Source:
    """One package whose text may be used."""

    name: str
    version: str
    licence: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus, as the manifest records it."""

    package: str
    version: str
    licence: str
    path: str  # inside the package's installation
    bytes: int
    sha256: str


def allowed_licence(expression: str) -> bool:
    """Whether every part of a licence expression ("MIT", "Apache-2.0 OR BSD-3-Clause", ...) is on the list.

    Of alternatives joined by OR one is enough; of terms joined by AND all must be. Anything not understood is refused.
    """
    text = expression.strip()
    if not text or "\n" in text or len(text) > 200:
        return False
    alternatives = [part for part in re.split(r"\s+OR\s+", text) if part]
    for alternative in alternatives:
        terms = re.split(r"\s+AND\s+|\s+and\s+|,\s+(?!version)", alternative.strip("() "))
        if all(_ALLOWED.match(term.strip().strip("()").strip()) or _ALLOWED.match(term.strip()) for term in terms):
            return True
    return False


def _licence_of(distribution: metadata.Distribution) -> str | None:
    """The licence a distribution declares, when it is allowed: its expression, its classifiers, or its licence field."""
    data = distribution.metadata
    declared = data.get("License-Expression")
    if declared:
        return declared if allowed_licence(declared) else None
    classifiers = [line for line in data.get_all("Classifier") or [] if line.startswith(_CLASSIFIER)]
    names = [line.split(" :: ")[-1] for line in classifiers if not line.endswith("OSI Approved")]
    if names:
        return " AND ".join(names) if all(allowed_licence(name) for name in names) else None
    field = data.get("License") or ""
    return field.strip() if allowed_licence(field) else None


def _usable(path: Path) -> bool:
    return path.suffix in SUFFIXES and not _SKIPPED.intersection(path.parts) and not path.name.lower().startswith(("license", "copying"))


def _standard_library() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "lib2to3", "idlelib", "ensurepip", "config"}
    files = []
    for folder, names, entries in os.walk(root):
        names[:] = sorted(name for name in names if name not in skip and not name.startswith("config-"))
        files += [Path(folder, entry) for entry in entries if _usable(Path(folder, entry))]
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Source("python-standard-library", version, "PSF-2.0", tuple(sorted(files)))


def collect(packages: Sequence[str] | None = None) -> list[Source]:
    """The standard library and every allowed distribution (or only those named), sorted by name, each with its files."""
    sources = {"python-standard-library": _standard_library()}
    for distribution in metadata.distributions():
        name = (distribution.metadata.get("Name") or "").lower().replace("_", "-")
        if not name or name in sources or (packages is not None and name not in packages):
            continue
        licence = _licence_of(distribution)
        if licence is None:
            continue
        paths = (Path(str(distribution.locate_file(entry))) for entry in distribution.files or () if _usable(Path(entry)))
        sources[name] = Source(name, distribution.version, licence, tuple(sorted(paths)))
    return [sources[name] for name in sorted(sources)]


def _read(path: Path) -> str | None:
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


def documents(sources: Sequence[Source], seed: int, part: int = 0, parts: int = 1) -> Iterator[tuple[SourceFile, str]]:
    """The texts of one of ``parts`` disjoint shares of the corpus, in an order that depends on ``seed`` only, without
    duplicates inside a share (equal files fall into the same share, since shares are cut by content)."""
    order = [(source, path) for source in sources for path in source.files]
    random.Random(seed).shuffle(order)
    seen: set[bytes] = set()
    for source, path in order:
        text = _read(path)
        if text is None:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen or int.from_bytes(digest[:4], "big") % parts != part:
            continue
        seen.add(digest)
        yield SourceFile(source.name, source.version, source.licence, path.name, len(text.encode()), digest.hex()), text


def manifest(sources: Sequence[Source]) -> dict[str, object]:
    """What the corpus holds: totals, one entry per package, one entry per file."""
    files = [record for record, _ in documents(sources, 0)]
    packages: dict[str, dict[str, object]] = {}
    for record in files:
        entry = packages.setdefault(record.package, {"version": record.version, "licence": record.licence, "files": 0, "bytes": 0})
        entry["files"] = int(str(entry["files"])) + 1
        entry["bytes"] = int(str(entry["bytes"])) + record.bytes
    total = {"files": len(files), "bytes": sum(record.bytes for record in files)}
    ordered = sorted(files, key=lambda record: (record.package, record.path, record.sha256))
    return {"total": total, "packages": dict(sorted(packages.items())), "files": [asdict(record) for record in ordered]}


def write_manifest(sources: Sequence[Source], path: Path) -> dict[str, object]:
    """Write ``manifest`` as JSON and return it."""
    data = manifest(sources)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)
    return data
