"""The reasoning behind answers given, for clients that do not send it back.

V4 reasons on with the reasoning of its earlier turns in sight, and a prompt without it is another prompt: the model loses its
thread and the cache misses. Most clients of the three APIs drop reasoning. The server remembers, for each API key, what it
answered, and puts the reasoning back. What this file does not know: HTTP, prompts, the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nautile.protocol import ProtocolError

__all__ = ["NOT_PASSED_BACK", "MemoryStats", "ReasoningMemory"]

Message = Mapping[str, Any]

NOT_PASSED_BACK = "The `reasoning_content` in the thinking mode must be passed back to the API."
_OVERHEAD = 512  # bytes counted for an answer beside its text: two keys and what Python needs


@dataclass(frozen=True)
class MemoryStats:
    """``restored`` and ``missing`` count assistant turns whose reasoning was, or was not, found when it had to be."""

    answers: int
    nbytes: int
    restored: int
    missing: int
    evicted: int


@dataclass
class _Partition:
    """What is remembered for one API key. Written by the memory, under its lock."""

    answers: OrderedDict[bytes, tuple[str, tuple[bytes, ...]]] = field(default_factory=OrderedDict)  # oldest first
    places: dict[bytes, bytes] = field(default_factory=dict)  # any key of an answer -> its main key
    nbytes: int = 0


class ReasoningMemory:
    """Bounded; the oldest answers of the key that holds the most go first. Safe to use from several threads.

    An answer is known by the ids of its calls, and by its content and calls after the conversation that led to it. That
    conversation is compared by what users, tools and the assistant said; ids, reasoning and system messages do not count,
    since clients rewrite the first two and change the last between turns.
    """

    def __init__(self, limit: int = 64 * 2**20) -> None:
        """``limit`` is in bytes, of all keys together."""
        if limit < 0:
            raise ValueError(f"the limit of the reasoning memory is in bytes and cannot be {limit}")
        self._limit, self._lock = limit, threading.Lock()
        self._partitions: dict[str, _Partition] = {}
        self._restored = self._missing = self._evicted = self._nbytes = 0

    def remember(self, partition: str, messages: Sequence[Message], answer: Message) -> None:
        """Keep the reasoning of ``answer`` (an assistant message) to ``messages``, as ``Conversation.messages`` has them.

        A last message with ``prefix: true`` is the beginning of the answer.
        """
        if messages and messages[-1].get("prefix"):
            messages, answer = messages[:-1], _continued(messages[-1], answer)
        reasoning = answer.get("reasoning_content")
        if not reasoning:
            return
        *_, (_, place) = _places([*messages, answer])
        ids = _ids_key(answer)
        keys = (place, ids) if ids else (place,)
        size = _size(reasoning)
        if size > self._limit:
            return
        with self._lock:
            known = self._partitions.setdefault(partition, _Partition())
            for key in keys:
                self._forget(known, known.places.get(key))
            known.answers[place] = (reasoning, keys)
            known.places.update(dict.fromkeys(keys, place))
            known.nbytes += size
            self._nbytes += size
            while self._nbytes > self._limit:
                self._evict()

    def restored(
        self, partition: str, messages: Sequence[Message], *, tools: bool, strict: bool = False
    ) -> tuple[Message, ...]:
        """The conversation with the reasoning that the model must see and the client did not send.

        With ``tools`` that is the reasoning of every assistant turn; without, of those after the last user, as the encoding
        drops the others. ``strict`` restores nothing: it raises ProtocolError with the hosted API's text where a turn that
        belongs to tool calls came without its reasoning.
        """
        if strict:
            if tools and _not_passed_back(messages):
                raise ProtocolError(NOT_PASSED_BACK)
            return tuple(messages)
        begins = 0 if tools else _after_last_user(messages)
        made = []
        for number, (message, place) in enumerate(_places(messages)):
            wanted = message["role"] == "assistant" and number >= begins and not message.get("reasoning_content")
            found = self._found(partition, message, place) if wanted and not message.get("prefix") else None
            made.append({**message, "reasoning_content": found} if found else message)
        return tuple(made)

    def stats(self) -> MemoryStats:
        """Counters since the start, and what is held now."""
        with self._lock:
            answers = sum(len(known.answers) for known in self._partitions.values())
            return MemoryStats(answers, self._nbytes, self._restored, self._missing, self._evicted)

    def _found(self, partition: str, message: Message, place: bytes) -> str | None:
        with self._lock:
            known = self._partitions.get(partition)
            key = None
            if known is not None:
                ids = _ids_key(message)
                key = (known.places.get(ids) if ids else None) or known.places.get(place)
            if known is None or key is None:
                self._missing += 1
                return None
            self._restored += 1
            known.answers.move_to_end(key)
            return known.answers[key][0]

    def _forget(self, known: _Partition, place: bytes | None) -> None:
        if place is None:
            return
        reasoning, keys = known.answers.pop(place)
        for key in keys:
            if known.places.get(key) == place:
                del known.places[key]
        known.nbytes -= _size(reasoning)
        self._nbytes -= _size(reasoning)

    def _evict(self) -> None:
        name, known = max(self._partitions.items(), key=lambda item: item[1].nbytes)
        self._forget(known, next(iter(known.answers)))
        self._evicted += 1
        if not known.answers:
            del self._partitions[name]


def _size(reasoning: str) -> int:
    return len(reasoning.encode("utf-8", "surrogatepass")) + _OVERHEAD


def _continued(prefix: Message, answer: Message) -> Message:
    """An answer whose beginning the client wrote."""
    joined = {key: (prefix.get(key) or "") + (answer.get(key) or "") for key in ("reasoning_content", "content")}
    return {**answer, **joined}


def _after_last_user(messages: Sequence[Message]) -> int:
    """Where the turns after the last user begin; tool results count as the user's, as they do in the prompt."""
    return max((number + 1 for number, message in enumerate(messages) if message["role"] in ("user", "tool")), default=0)


def _not_passed_back(messages: Sequence[Message]) -> bool:
    """True when between two users there are calls, and an assistant turn there came without its reasoning."""
    called = missing = False
    for message in messages:
        if message["role"] == "user":
            called = missing = False
        elif message["role"] == "assistant" and not message.get("prefix"):
            called = called or bool(message.get("tool_calls"))
            missing = missing or message.get("reasoning_content") is None
        if called and missing:
            return True
    return False


# Keys


def _ids_key(message: Message) -> bytes | None:
    ids = [str(call.get("id") or "") for call in message.get("tool_calls") or ()]
    return _digest("ids", *ids) if ids and all(ids) else None


def _places(messages: Sequence[Message]) -> Iterator[tuple[Message, bytes]]:
    """Every message with the digest of the conversation up to it."""
    digest = b""
    for message in messages:
        role = message["role"]
        if role != "system":
            calls = [_call(call) for call in message.get("tool_calls") or ()]
            digest = _digest(digest.hex(), role, (message.get("content") or "").strip(), *calls)
        yield message, digest


def _call(call: Message) -> str:
    """A call without its id; arguments as data, since clients write JSON in their own way."""
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # what is not JSON is compared as text
            arguments = json.loads(arguments) if arguments else {}
    return json.dumps([function["name"], arguments], sort_keys=True, default=str)


def _digest(*parts: str) -> bytes:
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        whole.update(len(data).to_bytes(8, "big") + data)
    return whole.digest()
