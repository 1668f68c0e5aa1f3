"""A server in this process, without a socket: the application, its scripted engine, and what its streams say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from starlette.testclient import TestClient

from nautile.server import ServerOptions, Service, create_app
from server.scripted import ScriptedEngine

__all__ = ["TOOLS", "Local", "deltas", "tool", "user"]


def user(text: str = "hello") -> list[dict[str, Any]]:
    """The shortest conversation."""
    return [{"role": "user", "content": text}]


def tool(name: str, strict: bool = False, **properties: str) -> dict[str, Any]:
    """A tool; every property is required."""
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }
    function = {"name": name, "description": "A tool.", "parameters": parameters}
    return {"type": "function", "function": {**function, **({"strict": True} if strict else {})}}


TOOLS = [tool("read", path="string"), tool("list", path="string")]


@dataclass
class Local:
    """``options`` are those of the server; every request has a Host that it accepts."""

    options: ServerOptions = field(default_factory=ServerOptions)
    engine: ScriptedEngine = field(default_factory=ScriptedEngine)
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.service = Service(self.engine, "scripted", self.options)
        self.http = TestClient(create_app(self.service), base_url="http://localhost:8000", headers=self.headers)

    def chat(self, **body: Any) -> dict[str, Any]:
        """The body of a successful answer."""
        answer = self.http.post("/v1/chat/completions", json={"messages": user(), **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, path: str = "/v1/chat/completions", **body: Any) -> tuple[int, dict[str, Any]]:
        """Status and error of a refused request."""
        answer = self.http.post(path, json=body)
        return answer.status_code, answer.json()["error"]

    def chunks(self, path: str = "/v1/chat/completions", **body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream, which must end as the API says."""
        body = {"messages": user(), **body} if path.endswith("chat/completions") else body
        answer = self.http.post(path, json={**body, "stream": True})
        assert answer.status_code == 200, answer.text
        lines = [line for line in answer.text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def deltas(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client puts together from chunks, with its finish reason."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reason = None
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            for key in ("content", "reasoning_content"):
                message[key] += delta.get(key) or ""
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
                message["tool_calls"][call["index"]]["arguments"] += call["function"].get("arguments", "")
            assert reason is None or choice["finish_reason"] is None
            reason = reason or choice["finish_reason"]
    return {**message, "finish_reason": reason}
