"""``nautile session`` on the shipped model: what it prints, and that going on in pieces is going on at once."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from nautile.cli import main, session
from nautile.cli.agent import shipped_model
from nautile.engine import Engine, EngineConfig
from nautile.state import fingerprint

pytestmark = pytest.mark.skipif(not list(shipped_model().glob("*.safetensors")), reason="the shipped model has no weights here")
TEXT = "def add(a, b):\n    return a + b\n\n\n" * 46


@functools.cache
def loaded() -> Engine:
    return Engine(shipped_model(), EngineConfig(runner="torch"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a verb like a process of its own would (a fresh pool), on weights that are loaded once."""

    def fresh(_: str) -> Engine:
        options = EngineConfig(runner="torch", pool_bytes=64 << 20, max_running=4)
        engine = Engine(loaded().model, options, loaded().tokenizer)
        engine.pool.fingerprint = fingerprint(engine.config, {"norm": engine.model.norm.weight})
        return engine

    monkeypatch.setattr(session, "_engine", fresh)

    def call(*arguments: str, status: int = 0) -> str:
        assert main(["session", *arguments, "--sessions", str(tmp_path)]) == status
        output = capsys.readouterr()
        return output.err if status else output.out

    return call


def test_a_timeline_goes_on_in_pieces_as_at_once(run, tmp_path: Path) -> None:
    said = json.loads(run("save", "a", "--text", TEXT, "--note", "code", "--json"))
    assert said["length"] > 512 and said["note"] == "code" and said["snapshots"] == [256, 512]
    run("fork", "a", "b")
    whole = json.loads(run("resume", "a", "--max-tokens", "15", "--json"))
    parts = [json.loads(run("resume", "b", "--max-tokens", "5", "--json")) for _ in range(3)]
    assert whole["recomputed"] == 0 and all(part["recomputed"] == 0 for part in parts)
    assert whole["ids"] == [token for part in parts for token in part["ids"]] and len(whole["ids"]) == 15
    for wanted in (said["length"], 512):  # back to where it was, and to a snapshot without logits
        back = json.loads(run("rewind", "a", str(wanted), "--as", f"at{wanted}", "--json"))
        assert back["length"] == wanted and wanted - back["state_length"] < 256
    again = json.loads(run("resume", f"at{said['length']}", "--max-tokens", "15", "--discard", "--json"))
    assert again["ids"] == whole["ids"] and 0 < again["recomputed"] < 256
    assert json.loads(run("resume", "at512", "--max-tokens", "1", "--json"))["recomputed"] == 256
    run("export", "a", str(tmp_path / "a.nautile"))
    assert json.loads(run("import", str(tmp_path / "a.nautile"), "--as", "c", "--json"))["length"] == said["length"] + 15
    assert [one["name"] for one in json.loads(run("list", "--json"))] == ["a", "at512", f"at{said['length']}", "b", "c"]


def test_what_people_read(run) -> None:
    assert "no sessions in" in run("list")
    run("save", "a", "--message", "How are you?")
    assert "a  " in run("list") and "tokens" in run("list")
    assert "revision 1" in run("info", "a")
    assert run("resume", "a", "--text", "x", "--max-tokens", "0") == "\n"
    assert "revision 2" in run("info", "a")
    assert "is deleted" in run("delete", "a")


def test_mistakes_get_one_line(run, tmp_path: Path) -> None:
    (tmp_path / "broken.session").write_bytes(b"nothing")
    assert "cannot be used" in run("list")
    for arguments, text in (
        (["info", "a"], "there is no session 'a'"),
        (["resume", "broken"], "cut short"),
        (["save", "a/b", "--text", "x"], "no name for a session"),
        (["save", "a"], "give one of --text"),
        (["save", "a", "--file", "/nowhere"], "/nowhere"),
        (["import", "/nowhere"], "does not exist"),
        (["rewind", "a", "3"], "there is no session"),
    ):
        error = run(*arguments, status=1)
        assert text in error and error.count("\n") == 1, error
