"""Conversations with a model behind an OpenAI-compatible server: Nautile's own, or any other.

Messages are kept, not tokens, and go out whole with every turn, reasoning included, so that a server that keeps it (V4 with
tools does) sees its own words again and finds them in its cache. Only fields that every such server knows are sent, unless
the caller asks for more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from nautile.agent.client import Message, Reply, Tool
from nautile.protocol import ContentDelta, Event, ReasoningDelta, ToolCall, ToolCallArguments, ToolCallEnd, ToolCallStart

__all__ = ["HttpClient", "ServerError", "connect"]

_TRIES = 4  # for servers that are busy or restarting; nothing has been said yet when one fails
_LONGEST_WAIT = 20.0  # seconds that a Retry-After may ask for
_CHARACTERS_A_TOKEN = 4  # where a server does not count: a rough guess, for budgets only


class ServerError(RuntimeError):
    """The server cannot be reached, refuses, or breaks off; the text says what to do. The conversation is as it was."""


@dataclass(frozen=True)
class HttpClient:
    """A model at ``url`` (the address that ends in /v1). ``thinking`` None leaves the choice to the server."""

    url: str
    model: str
    key: str | None = None
    thinking: bool | None = None
    temperature: float | None = None
    seed: int | None = None
    timeout: float = 600.0  # seconds without a byte; servers of this kind send comments while they are busy

    @property
    def name(self) -> str:
        """The model, and where it is."""
        return f"{self.model} at {self.url}"

    def open(self, messages: Sequence[Message], tools: Sequence[Tool]) -> _HttpChat:
        """See ``ChatClient.open``."""
        return _HttpChat(self, list(messages), list(tools))


def connect(url: str, model: str = "", key: str | None = None, **options: Any) -> HttpClient:
    """A client of the server at ``url``, with or without its /v1; ``model`` "" takes the first one that the server lists.

    ``options`` are fields of ``HttpClient``. Raises ServerError.
    """
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ServerError("the API key has characters that a header cannot carry: look at what was given as the key")
    base = _base(url)
    client = HttpClient(base, model, key, **options)
    if model:
        return client
    with _http(client) as http:
        try:
            answer = http.get(f"{base}/models")
            _check(answer)
            names = [entry["id"] for entry in answer.json()["data"]]
        except httpx.HTTPError as error:
            raise _unreachable(base, error) from None
        except (ValueError, TypeError, KeyError):
            raise ServerError(f"{base}/models does not list models: pass --model, and check the address") from None
    if not names:
        raise ServerError(f"{base} lists no model: pass --model NAME")
    return HttpClient(base, str(names[0]), key, **options)


def _base(url: str) -> str:
    """The address that ends in /v1. Raises ServerError for what is none."""
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and httpx.URL(base).host:
            return base
    except (ValueError, httpx.InvalidURL):
        pass
    raise ServerError(f"{url!r} is not an address: write it as http://127.0.0.1:8000")


class _HttpChat:
    """``messages`` are those of the next request; ``tokens`` is what the server counted last."""

    def __init__(self, client: HttpClient, messages: list[Message], tools: list[Tool]) -> None:
        self.client, self.messages, self.tools = client, messages, tools
        self._counted, self._counted_messages = 0, 0

    @property
    def tokens(self) -> int:
        """The server's count of the last turn, and a guess for what came after it."""
        new = self.messages[self._counted_messages :]
        return self._counted + len(json.dumps(new, ensure_ascii=False)) // _CHARACTERS_A_TOKEN if new else self._counted

    def say(self, messages: Sequence[Message]) -> None:
        """See ``Chat.say``."""
        self.messages.extend(messages)

    def reply(self, max_tokens: int, watch: Callable[[Event], None]) -> Reply:
        """See ``Chat.reply``. Raises ServerError; then nothing was appended."""
        collected = _Collected(watch)
        with _http(self.client) as http:
            for chunk in _chunks(http, self.client.url, self._body(max_tokens)):
                collected.take(chunk)
        reply = collected.reply()
        self.replay(reply)
        if collected.total:
            self._counted, self._counted_messages = collected.total, len(self.messages)
        return reply

    def replay(self, reply: Reply) -> None:
        """See ``Chat.replay``."""
        message = reply.message()
        if not reply.reasoning:
            del message["reasoning_content"]  # servers of other models may not know the field
        self.messages.append(message)

    def _body(self, max_tokens: int) -> dict[str, Any]:
        client = self.client
        body: dict[str, Any] = {
            "model": client.model,
            "messages": self.messages,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.tools:
            body["tools"] = self.tools
        if client.thinking is not None:
            body["thinking"] = {"type": "enabled" if client.thinking else "disabled"}
        if client.temperature is not None:
            body["temperature"] = client.temperature
        if client.seed is not None:
            body["seed"] = client.seed
        return body


@dataclass
class _Collected:
    """A turn, put together from chunks. Written by ``take``."""

    watch: Callable[[Event], None]
    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    reason: str | None = None
    total: int = 0

    def take(self, chunk: Mapping[str, Any]) -> None:
        """One chunk of the stream. Raises ServerError when it is an error."""
        if chunk.get("error"):
            raise ServerError(f"the server broke off: {_message(chunk)}")
        usage = chunk.get("usage")
        if isinstance(usage, Mapping):
            self.total = int(usage.get("total_tokens") or 0)
        for choice in chunk.get("choices") or ():
            self._delta(choice.get("delta") or {})
            self.reason = choice.get("finish_reason") or self.reason

    def _delta(self, delta: Mapping[str, Any]) -> None:
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(reasoning, str) and reasoning:
            self.reasoning.append(reasoning)
            self.watch(ReasoningDelta(reasoning))
        if isinstance(delta.get("content"), str) and delta["content"]:
            self.content.append(delta["content"])
            self.watch(ContentDelta(delta["content"]))
        for part in delta.get("tool_calls") or ():
            call = self.calls.setdefault(int(part.get("index") or 0), {"id": "", "name": "", "arguments": ""})
            call["id"] = part.get("id") or call["id"]
            function = part.get("function") or {}
            call["name"] += function.get("name") or ""
            call["arguments"] += function.get("arguments") or ""

    def reply(self) -> Reply:
        """The whole turn; its calls are announced now that they are complete."""
        if self.reason is None:
            raise ServerError("the server's answer ended in the middle: send it again (nautile agent --resume goes on)")
        ended = self.reason in ("stop", "tool_calls", "function_call")
        calls = []
        for number, call in sorted(self.calls.items()) if ended else ():
            made = ToolCall(call["id"] or f"call_{number}", call["name"], call["arguments"] or "{}")
            calls.append(made)
            for event in (
                ToolCallStart(number, made.id, made.name),
                ToolCallArguments(number, made.arguments),
                ToolCallEnd(number, made),
            ):
                self.watch(event)
        return Reply("".join(self.reasoning), "".join(self.content), tuple(calls), ended)


def _http(client: HttpClient) -> httpx.Client:
    headers = {"authorization": f"Bearer {client.key}"} if client.key else {}
    return httpx.Client(headers=headers, timeout=httpx.Timeout(client.timeout, connect=10.0), trust_env=False)


def _chunks(http: httpx.Client, url: str, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The chunks of an answer. A busy server is asked again before it has said anything. Raises ServerError."""
    for number in range(_TRIES):
        try:
            with http.stream("POST", f"{url}/chat/completions", json=body) as answer:
                if answer.status_code in (429, 503) and number < _TRIES - 1:
                    time.sleep(_pause(answer, number))
                    continue
                if answer.status_code != 200:
                    answer.read()
                    _check(answer)
                yield from _events(answer)
                return
        except httpx.HTTPError as error:
            raise _unreachable(url, error) from None


def _events(answer: httpx.Response) -> Iterator[Mapping[str, Any]]:
    for line in _lines(answer):
        name, _, data = line.partition(":")
        if name != "data" or not data.strip():
            continue  # comments, and fields that this API does not use
        if data.strip() == "[DONE]":
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            raise ServerError(f"the server sent something that is not JSON: {data.strip()[:80]!r}") from None
        if isinstance(chunk, Mapping):
            yield chunk


def _lines(answer: httpx.Response) -> Iterator[str]:
    """Lines that end in line feeds. httpx's own end at every separator of Unicode too, which texts inside of JSON may hold."""
    rest = b""
    for piece in answer.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace").rstrip("\r")
    yield rest.decode("utf-8", "replace")


def _pause(answer: httpx.Response, number: int) -> float:
    asked = answer.headers.get("retry-after", "")
    return min(float(asked) if asked.isdecimal() and asked.isascii() else 2.0**number, _LONGEST_WAIT)


def _check(answer: httpx.Response) -> None:
    """Raises ServerError for an answer that is an error, in the server's own words."""
    if answer.status_code < 400:
        return
    try:
        text = _message(answer.json())
    except ValueError:
        text = answer.text.strip()[:200] or "no explanation"
    hint = "; pass --api-key or --api-key-file" if answer.status_code == 401 else ""
    raise ServerError(f"the server answers {answer.status_code}: {text}{hint}")


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, Mapping) else body
    return str(error.get("message", error) if isinstance(error, Mapping) else error)


def _unreachable(url: str, error: httpx.HTTPError) -> ServerError:
    if isinstance(error, httpx.ConnectError):
        return ServerError(f"there is no server at {url}: start one with nautile serve, or check the address")
    if isinstance(error, httpx.TimeoutException):
        return ServerError(f"the server at {url} does not answer: it may be overloaded; try again")
    return ServerError(f"the connection to {url} broke ({type(error).__name__}): try again")
