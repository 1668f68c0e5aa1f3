"""Hub ids through huggingface_hub against a server on the loopback interface that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from checkpoint.models import change_config, written
from nautile import ConfigError
from nautile.checkpoint import CheckpointError, load_state, resolve_config, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One repository, ``someone/tiny``, with the files of a directory; ``someone/gated`` answers 403."""

    def __init__(self, files: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.fetched: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith(("/api/models/someone/gated", "/someone/gated/")):
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path in ("/api/models/someone/tiny", "/api/models/someone/tiny/revision/main"):
            self.reply(200, json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"/api/models/someone/tiny/tree/{COMMIT}"):
            rows = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": etag(file)} for file in self.listed()
            ]
            self.reply(200, json.dumps(rows).encode())
        elif path.startswith("/someone/tiny/resolve/"):
            self.send(self.server.files / path.rsplit("/", 1)[1], body)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def listed(self) -> list[Path]:
        return sorted(self.server.files.iterdir())

    def send(self, file: Path, body: bool) -> None:
        if body:
            self.server.fetched.append(file.name)
        self.reply(200, file.read_bytes(), {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT}, body)

    def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    written(tmp_path / "repository", max_shard_bytes=600_000)
    (tmp_path / "repository" / "figure.png").write_bytes(bytes(100))
    server = Hub(tmp_path / "repository")
    yield server
    server.shutdown()
    server.server_close()


def test_a_snapshot_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    path = resolve_model("someone/tiny", cache_dir=tmp_path / "cache", endpoint=hub.url)
    state, original = load_state(path), load_state(hub.files)
    assert all(torch.equal(state[name], original[name]) for name in original)
    assert "figure.png" not in hub.fetched and hub.fetched.count("config.json") == 1
    hub.fetched.clear()
    assert resolve_model("someone/tiny", "main", cache_dir=tmp_path / "cache", endpoint=hub.url) == path
    assert hub.fetched == []


def test_a_config_alone_needs_no_weights(hub: Hub, tmp_path: Path) -> None:
    assert resolve_config("someone/tiny", cache_dir=tmp_path / "cache", endpoint=hub.url) == resolve_config(hub.files)
    assert hub.fetched == ["config.json"]


def test_the_cache_serves_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    path = resolve_model("someone/tiny", cache_dir=tmp_path / "cache", endpoint=hub.url)
    assert resolve_model("someone/tiny", cache_dir=tmp_path / "cache", endpoint="http://127.0.0.1:9") == path
    with pytest.raises(CheckpointError, match="Hub cannot be reached and the model is not in the cache"):
        resolve_model("someone/tiny", cache_dir=tmp_path / "empty", endpoint="http://127.0.0.1:9")


def test_the_endpoint_of_the_environment_is_used(hub: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_HUB_CACHE, which huggingface_hub reads when it is imported: in a process of its own."""
    program = "from nautile.checkpoint.hub import resolve_model; print(resolve_model('someone/tiny'))"
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **settings}, capture_output=True, text=True, timeout=300, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "cache")
    assert "config.json" in hub.fetched


def test_disk_space_is_checked_before_weights_are_fetched(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2_000_000, 1_000_000, 1_000_000))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"GB are still to be fetched and .* has 0\.0 GB free"):
        resolve_model("someone/tiny", cache_dir=tmp_path / "cache", endpoint=hub.url)
    assert hub.fetched == ["config.json"]


def test_another_architecture_costs_one_small_file(hub: Hub, tmp_path: Path) -> None:
    change_config(hub.files, model_type="deepseek_v41")
    with pytest.raises(ConfigError, match=r"DeepSeek-V4\.1"):
        resolve_model("someone/tiny", cache_dir=tmp_path / "cache", endpoint=hub.url)
    assert hub.fetched == ["config.json"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("someone/nothing", "someone/nothing: no such model or revision"), ("someone/gated", "access refused: accept its terms")],
)
def test_refusals_are_explained(hub: Hub, tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        resolve_model(name, cache_dir=tmp_path / "cache", endpoint=hub.url)


def test_directories_need_no_hub(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match=r"a revision .* belongs to a Hub id"):
        resolve_model(tmp_path, "main")
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "absent", tmp_path / "file", "nano", "a/b/c"):
        with pytest.raises(CheckpointError, match="neither a model directory nor a Hugging Face Hub id"):
            resolve_model(wrong)
