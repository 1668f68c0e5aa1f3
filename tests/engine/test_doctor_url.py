"""``nautile doctor URL`` against a server with one fault at a time: each check says what is wrong and what to do."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from types import SimpleNamespace

import httpx
import pytest
from typer.testing import CliRunner

from nautile.cli import app, doctor

BLOCK, PLANNED = 16, 100.0


@dataclass
class Server:
    """Answers by a rule and counts like the real one; a token is two characters. ``fault`` is what it does wrong. Its time is
    its own: an answer takes a second, so that nothing depends on this machine's load."""

    fault: str = ""
    known: set[str] = field(default_factory=set)
    prompt_tokens: int = 0
    blocks: int = 0
    resident: int = 100 << 20
    seconds: float = 0.0
    asked: int = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        if request.url.path == "/metrics":
            return httpx.Response(404 if self.fault == "no metrics" else 200, text=self.metrics())
        return httpx.Response(200, json=self.complete(json.loads(request.content)["prompt"]))

    def complete(self, prompt: str) -> dict[str, object]:
        tokens = len(prompt) // 2
        self.prompt_tokens += tokens + 3 * (self.fault == "others")
        hit = prompt in self.known and self.fault != "no hits"
        if not hit:
            self.blocks += -(-(tokens + 11) // BLOCK) * (2 if self.fault == "too large" else 1)
        self.asked += 1
        self.seconds += 20 if self.fault == "stalls" and self.asked % 10 == 0 else 1
        if self.fault == "grows":
            self.resident += 4 << 20
        self.known.add(prompt)
        right = not (self.fault == "one residue" and tokens % 4 == 3)
        text = " " + re.findall(r"secret_key = (\d+)", prompt)[0] if right else " 0"
        if self.fault == "inexact" and hit:
            text = " other"
        usage = {"prompt_tokens": tokens, "prompt_cache_hit_tokens": tokens - 1 if hit else 0}
        return {"choices": [{"text": text}], "usage": usage}

    def metrics(self) -> str:
        drafted = {"no speculation": 0}.get(self.fault, 50)
        rows = {
            "nautile_engine_prompt_tokens_total": self.prompt_tokens,
            "nautile_engine_drafted_tokens_total": drafted,
            "nautile_engine_accepted_tokens_total": 0 if self.fault == "no draft right" else drafted // 2,
            "nautile_state_block_tokens": BLOCK,
            "nautile_state_plan_bytes_per_token": PLANNED,
            'nautile_state_bytes{kind="csa"}': self.blocks * BLOCK * PLANNED * 0.75,
            'nautile_state_bytes{kind="hca"}': self.blocks * BLOCK * PLANNED * 0.25,
            "nautile_state_bytes_total": self.blocks * BLOCK * PLANNED,
            "nautile_state_bytes_limit": 1 if self.fault == "over the limit" else 1e12,
            "process_resident_memory_bytes": self.resident,
        }
        return "# HELP x y\n" + "".join(f"{name} {value}\n" for name, value in rows.items())


@pytest.mark.parametrize(
    ("fault", "name", "verdict"),
    [
        ("", "", "ok"),
        ("no speculation", "drafts", "n/a"),
        ("no hits", "prefix cache", "bad"),
        ("inexact", "prefix cache", "bad"),
        ("one residue", "needle", "warn"),
        ("no draft right", "drafts", "bad"),
        ("too large", "state bytes", "bad"),
        ("over the limit", "state bytes", "bad"),
        ("others", "state bytes", "warn"),
        ("grows", "after warm-up", "bad"),
        ("stalls", "after warm-up", "warn"),
        ("no metrics", "metrics", "warn"),
    ],
)
def test_each_fault_is_found_and_nothing_else(monkeypatch, fault, name, verdict):
    client, server = httpx.Client, Server(fault)
    monkeypatch.setattr(httpx, "Client", lambda **options: client(transport=httpx.MockTransport(server), **options))
    clock = SimpleNamespace(perf_counter=lambda: server.seconds, monotonic=lambda: server.seconds, time_ns=lambda: server.asked)
    monkeypatch.setattr(doctor, "time", clock)
    result = CliRunner().invoke(app, ["doctor", "http://server", "--json"])
    report = json.loads(result.stdout)
    found = {finding["name"]: finding for finding in report["findings"]}
    wrong = {key: finding["verdict"] for key, finding in found.items() if finding["verdict"] != "ok"}
    assert wrong == ({name: verdict} if fault else {}), report
    assert all(found[key]["fix"] for key, value in wrong.items() if value != "n/a")
    assert result.exit_code == (verdict == "bad") == (not report["ok"])
    if fault != "no metrics":
        assert {"prefix cache", "needle", "drafts", "state bytes", "after warm-up"} <= found.keys()
