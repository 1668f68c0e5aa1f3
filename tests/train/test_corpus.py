"""The corpus: licences understood or refused, files read safely, duplicates dropped, a manifest without machine paths."""

import itertools
import random
from pathlib import Path

import pytest

from nautile.train import corpus, procedural
from nautile.train.corpus import Source, allowed_licence, documents, load_manifest, manifest, scan, write_manifest


@pytest.mark.parametrize(
    "text",
    [
        "MIT", "MIT License", "Apache-2.0", "Apache-2.0 OR GPL-3.0-only", "BSD-3-Clause AND MIT",
        "Apache License, Version 2.0", "Apache 2.0 License", "PSF-2.0", "Python Software Foundation License",
        "The Unlicense (Unlicense)",
        "ISC License (ISCL)", "BSD 3-Clause License", "new BSD", "Public Domain", "0BSD",
    ],
)  # fmt: skip
def test_allowed(text: str) -> None:
    assert allowed_licence(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "GPL-3.0", "LGPL-2.1-or-later", "MPL-2.0 AND MIT", "MIT AND Zlib", "Proprietary", "MITX", "Copyright\nMIT",
        "GFDL-1.3", "x" * 300,
    ],
)  # fmt: skip
def test_refused(text: str) -> None:
    assert not allowed_licence(text)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    body = "def function(argument):\n    return argument\n" * 10
    (tmp_path / "a.py").write_text(body)
    (tmp_path / "copy.py").write_text(body)
    (tmp_path / "b.md").write_text("Some words about this package, and more of them.\n" * 20)
    (tmp_path / "short.py").write_text("x = 1\n")
    (tmp_path / "data.txt").write_text("0123456789" * 500)
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9 " * 200)
    names = ("a.py", "b.md", "copy.py", "data.txt", "gone.py", "latin.txt", "short.py")
    return Source("package", "1.0", "MIT", tmp_path, names)


def test_scan_keeps_text_once(source: Source) -> None:
    assert [record.path for record in scan([source])] == ["a.py", "b.md"]


def test_documents_depend_on_the_seed_only(source: Source) -> None:
    files = scan([source])
    first = list(itertools.islice(documents([source], files, 1), 20))
    assert first == list(itertools.islice(documents([source], files, 1), 20))
    assert first != list(itertools.islice(documents([source], files, 2), 20))


def test_manifest(source: Source, tmp_path: Path) -> None:
    files = scan([source])
    write_manifest(files, tmp_path / "out" / "corpus.json")
    assert load_manifest(tmp_path / "out" / "corpus.json") == files
    data = manifest(files)
    assert data["packages"]["package"]["files"] == data["total"]["files"] == 2
    assert str(tmp_path) not in (tmp_path / "out" / "corpus.json").read_text()


def test_collect_finds_the_standard_library_and_only_allowed_packages() -> None:
    sources = {one.name: one for one in corpus.collect()}
    library = sources["python-standard-library"]
    assert "json/decoder.py" in library.files
    assert (library.root / "json/decoder.py").exists()
    assert not any("site-packages" in name for name in library.files)
    assert "hypothesis" not in sources  # MPL
    assert all(allowed_licence(part) for one in sources.values() for part in one.licence.split(" AND "))


def test_procedural_documents_are_varied_and_of_the_right_size() -> None:
    texts = [procedural.document(random.Random(seed)) for seed in range(150)]
    assert texts[:20] == [procedural.document(random.Random(seed)) for seed in range(20)]
    assert len(set(texts)) == 150
    assert all(1500 <= len(text) < 12_000 for text in texts)
