"""What passes between a client and the server, kept short and without anything of the machine it ran on."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Recorder", "scrubbed"]

_SHORT = 240  # characters of a text that are worth keeping; agents' own prompts are not ours to publish
_HEADERS = ("user-agent", "anthropic-version", "anthropic-beta", "accept")
_IDS = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|ses_\w+|[0-9a-f]{32,}")


@dataclass
class Recorder:
    """An ASGI layer that notes requests and answers."""

    exchanges: list[dict[str, Any]] = field(default_factory=list)

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application with this layer around it."""

        async def layer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            sent, got, status = bytearray(), bytearray(), 0

            async def receiving() -> Message:
                message = await receive()
                sent.extend(message.get("body", b""))
                return message

            async def sending(message: Message) -> None:
                nonlocal status
                status = message.get("status", status)
                got.extend(message.get("body", b""))
                await send(message)

            try:
                await app(scope, receiving, sending)
            finally:
                headers = {name.decode(): value.decode() for name, value in scope["headers"] if name.decode() in _HEADERS}
                request = {"method": scope["method"], "path": scope["path"], "headers": headers}
                body = json.loads(sent) if sent else None
                self.exchanges.append({"request": {**request, "body": body}, "status": status, "answer": told(bytes(got))})

        return layer

    def transcript(self, places: dict[str, str]) -> list[dict[str, Any]]:
        """The exchanges, kept short, with the names of ``places`` for the paths of this machine."""
        return [short(scrubbed(exchange, places)) for exchange in self.exchanges]


def short(value: Any, key: str = "") -> Any:
    """A body with long texts and the schemas of tools left out."""
    if key == "tools" and isinstance(value, list):
        return [tool.get("name") or tool.get("function", {}).get("name") or tool.get("type") for tool in value]
    if isinstance(value, dict):
        dropped = ("client_metadata", "metadata", "prompt_cache_key")
        return {name: "..." if name in dropped else short(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [short(item) for item in value]
    if isinstance(value, str) and len(value) > _SHORT:
        return f"{value[:60]}... ({len(value)} characters)"
    return value


def told(raw: bytes) -> Any:
    """The answer: its body, or for a stream how many events of each kind came and what the last ones with data said."""
    text = raw.decode("utf-8", "replace")
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if not lines:
        return json.loads(text) if text.startswith("{") else text[:_SHORT]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    counts = Counter(event.get("type") or event.get("object") for event in events)
    usage = [usage for event in events if (usage := event.get("usage") or (event.get("response") or {}).get("usage"))]
    return {"events": dict(counts), "usage": usage[-1] if usage else None, "last": events[-1]}


def scrubbed(value: Any, places: dict[str, str]) -> Any:
    """A value with paths and ids replaced."""
    if isinstance(value, dict):
        return {scrubbed(name, places): scrubbed(item, places) for name, item in value.items()}
    if isinstance(value, list):
        return [scrubbed(item, places) for item in value]
    if isinstance(value, str):
        for place, name in places.items():
            value = value.replace(place, name)
        return _IDS.sub("<id>", value)
    return value
