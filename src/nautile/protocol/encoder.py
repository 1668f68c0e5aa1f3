"""Messages -> prompt, byte for byte as the published encoding does it.

Merge tool results and users into turns, put tool results in the order of their calls, drop old reasoning where the rules say
so, render. The result is a list of parts, text or special token; only the specials that this file emits are special, and all
text between two of them is tokenised in one piece without the added vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nautile.protocol import texts
from nautile.protocol.errors import ProtocolError
from nautile.protocol.tokenizer import Tokenizer

__all__ = ["Prompt", "ProtocolError", "Special", "encode"]

Message = Mapping[str, Any]


class Special(str):
    """A part of a prompt that is one special token."""

    __slots__ = ()


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation. ``start`` says where the model's answer begins: in its reasoning, its content or its calls.

    ``continued`` is True when the answer goes on in text that the prompt already holds: the parser must be told, because
    newlines at the start of an answer mean nothing and those in the middle of a text do.
    """

    parts: tuple[str, ...]
    start: Literal["reasoning", "content", "calls"]
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    continued: bool = False

    @property
    def text(self) -> str:
        """The prompt as one string."""
        return "".join(self.parts)

    @property
    def ids(self) -> list[int]:
        """The prompt as token ids. Raises ProtocolError when ``encode`` was given no tokenizer."""
        if self.tokenizer is None:
            raise ProtocolError("pass tokenizer=... to encode to get ids")
        ids: list[int] = []
        text = ""
        for part in self.parts:
            if isinstance(part, Special):
                ids += [*self.tokenizer.encode(text), self.tokenizer.special(part)] if text else [self.tokenizer.special(part)]
                text = ""
            else:
                text += part
        return ids + self.tokenizer.encode(text) if text else ids

    def with_calls_open(self) -> Prompt:
        """The same prompt with a block of calls begun in it, so that the answer can only be calls.

        Raises ProtocolError where the model reasons first.
        """
        if self.start != "content":
            raise ProtocolError("Thinking mode does not support this tool_choice; turn thinking off, or let the model choose")
        return replace(self, parts=(*self.parts, "\n\n", *_marked(texts.CALLS_OPEN)), start="calls", continued=False)


def encode(  # noqa: PLR0913  # the public signature
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    effort: str | None = None,
    dialect: str = "0731",
    drop_thinking: bool = True,
    response_format: Mapping[str, Any] | None = None,
    context: Sequence[Message] | None = None,
    add_bos: bool = True,
) -> Prompt:
    """Render a conversation for V4.

    ``tools`` and ``response_format`` go on the first system message, that of ``context`` included (an empty one is made when
    there is none). ``context`` is what an earlier call already rendered: it counts for the rules but is not rendered again.
    A last assistant message with ``prefix: true`` is left open, in its reasoning if that is all it has: the model goes on.
    Raises ProtocolError.
    """
    prefix = _effort_prefix(dialect, effort)
    context, messages = _with_tools(context or (), messages, tools, response_format)
    _check_prefix(context, messages)
    before = _merged(context)
    turns = _sorted_results(before + _merged(messages))
    dropping = drop_thinking and not any(turn.get("tools") for turn in turns)
    rendered = len(before)
    if thinking and dropping:
        turns, rendered = _dropped(turns, rendered)
    renderer = _Renderer(turns, thinking, dropping)
    parts: list[str] = [Special(texts.BOS)] if add_bos and not before else []
    if thinking and turns and not before:
        parts.append(prefix)
    for index in range(rendered, len(turns)):
        parts += renderer.message(index)
        parts += renderer.transition(index)
    kept = tuple(part for part in parts if part and _encodable(part))
    is_open = bool(turns) and turns[-1]["role"] == "assistant" and bool(turns[-1].get("prefix") or turns[-1].get("wo_eos"))
    special = kept[-1] if kept and isinstance(kept[-1], Special) else None
    in_reasoning = special == texts.THINK_OPEN or (is_open and renderer.reasons_on(len(turns) - 1))
    return Prompt(kept, "reasoning" if in_reasoning else "content", tokenizer, is_open and special is None and bool(kept))


def _check_prefix(context: Sequence[Message], messages: Sequence[Message]) -> None:
    for message in (*context, *messages):
        if not message.get("prefix"):
            continue
        if message["role"] != "assistant" or not messages or message is not messages[-1]:
            raise ProtocolError("prefix: true is for the last message, which must be an assistant's; take it off this one")
        if message.get("tool_calls"):
            raise ProtocolError("a message with prefix: true is text to go on with; take its tool_calls away")


def _encodable(part: str) -> bool:
    try:
        part.encode()
    except UnicodeEncodeError as error:
        found = part[max(error.start - 20, 0) : error.start + 1]
        raise ProtocolError(f"half of a surrogate pair after {found!r}; send text that is valid Unicode") from None
    return True


def _effort_prefix(dialect: str, effort: str | None) -> str:
    if dialect not in texts.EFFORTS:
        raise ProtocolError(f"unknown dialect {dialect!r}; choose one of {', '.join(texts.EFFORTS)}")
    if effort is None:
        return ""
    if effort not in texts.EFFORTS[dialect]:
        known = ", ".join(texts.EFFORTS[dialect])
        raise ProtocolError(f"dialect {dialect} has no effort {effort!r}; choose one of {known}")
    return texts.EFFORTS[dialect][effort]


def _with_tools(
    context: Sequence[Message],
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    response_format: Mapping[str, Any] | None,
) -> tuple[Sequence[Message], Sequence[Message]]:
    added: dict[str, Any] = {}
    if tools:
        added["tools"] = tools
    if response_format is not None:
        added["response_format"] = response_format
    whole = [_checked(message) for message in (*context, *messages)]
    if not added:
        return whole[: len(context)], whole[len(context) :]
    seam = len(context)
    system = next((index for index, message in enumerate(whole) if message["role"] == "system"), None)
    if system is None:
        whole.insert(0, {"role": "system", "content": "", **added})
        seam += 1 if seam else 0
    else:
        whole[system] = {**whole[system], **added}
    return whole[:seam], whole[seam:]


def _checked(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise ProtocolError(f"a message is an object with role and content, got {type(message).__name__}")
    if message.get("role") not in _ROLES:
        raise ProtocolError(f"unknown role {message.get('role')!r}; V4 has {', '.join(_ROLES)}")
    return message


_ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder", "direct_search_results")


def _merged(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Tool results and user texts in a row become blocks of one user turn."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        role = message["role"]
        if role not in ("tool", "user"):
            turns.append(dict(message))
            continue
        if role == "tool":
            block = {"type": "tool_result", "id": message.get("tool_call_id", ""), "content": message.get("content", "")}
        else:
            block = {"type": "text", "text": _text_of(message.get("content"))}
        if turns and turns[-1]["role"] == "user" and (role == "tool" or turns[-1].get("task") is None):
            turns[-1]["blocks"].append(block)
        else:
            kept = {key: message[key] for key in ("task", "wo_eos") if role == "user" and key in message}
            turns.append({"role": "user", "blocks": [block], **kept})
    return turns


def _sorted_results(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool results of a turn in the order of the calls they answer; texts between them keep their places."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn["role"] == "assistant" and turn.get("tool_calls"):
            order = {call.get("id") or "": index for index, call in enumerate(_objects(turn["tool_calls"], "tool_calls"))}
        elif turn["role"] == "user" and order:
            blocks = turn["blocks"]
            slots = [index for index, block in enumerate(blocks) if block["type"] == "tool_result"]
            results = sorted((blocks[slot] for slot in slots), key=lambda block: order.get(block["id"], 0))
            for slot, block in zip(slots, results, strict=True):
                blocks[slot] = block
    return turns


def _objects(value: Any, name: str) -> Sequence[Mapping[str, Any]]:
    """A list of objects. Raises ProtocolError for anything else."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        raise ProtocolError(f"{name} must be a list of objects, got {value!r}")
    return value


def _last_user(turns: Sequence[Message]) -> int:
    return max((index for index, turn in enumerate(turns) if turn["role"] in ("user", "developer")), default=-1)


def _dropped(turns: list[dict[str, Any]], rendered: int) -> tuple[list[dict[str, Any]], int]:
    """Without tools, reasoning before the last user turn goes, and developer messages with it."""
    last = _last_user(turns)
    kept: list[dict[str, Any]] = []
    removed = 0
    for index, turn in enumerate(turns):
        if index >= last or turn["role"] in ("user", "system", "tool", "latest_reminder", "direct_search_results"):
            kept.append(turn)
        elif turn["role"] == "assistant":
            kept.append({key: value for key, value in turn.items() if key != "reasoning_content"})
        elif index < rendered:
            removed += 1
    return kept, rendered - removed


class _Renderer:
    """Renders turns; knows the whole list because the rules look at neighbours and at the last user."""

    def __init__(self, turns: Sequence[dict[str, Any]], thinking: bool, dropping: bool) -> None:
        self.turns, self.thinking, self.dropping = turns, thinking, dropping
        self.last_user = _last_user(turns)

    def message(self, index: int) -> list[str]:
        """The parts of one turn, without what leads over to the next."""
        turn = self.turns[index]
        role = turn["role"]
        if role == "user":
            return [Special(texts.USER), "\n\n".join(_block(block) for block in turn["blocks"])]
        if role == "assistant":
            return self._assistant(index)
        content = _text_of(turn.get("content"))
        if role == "latest_reminder":
            return [Special(texts.REMINDER), content]
        if role == "direct_search_results":
            return []
        if role == "developer" and not content:
            raise ProtocolError("a developer message needs content")
        header: list[str] = [Special(texts.USER)] if role == "developer" else []
        return [*header, content, *_tools(turn.get("tools")), *_response_format(turn.get("response_format"))]

    def _assistant(self, index: int) -> list[str]:
        turn, parts = self.turns[index], []
        if self.reasons_on(index):
            return [_text_of(turn.get("reasoning_content"))]
        if self._shows_reasoning(index):
            parts += [_text_of(turn.get("reasoning_content")), Special(texts.THINK_CLOSE)]
        parts.append(_text_of(turn.get("content")))
        calls = turn.get("tool_calls")
        if calls:
            parts += ["\n\n", *_marked(texts.CALLS_OPEN)]
            for number, call in enumerate(calls):
                parts += [*(["\n"] if number else []), *_invoke(call)]
            parts += _marked(texts.CALLS_CLOSE)
        return parts if turn.get("wo_eos") or turn.get("prefix") else [*parts, Special(texts.EOS)]

    def _shows_reasoning(self, index: int) -> bool:
        after_task = index > 0 and self.turns[index - 1].get("task")
        return self.thinking and not after_task and (not self.dropping or index > self.last_user)

    def reasons_on(self, index: int) -> bool:
        """True for a prefix without content: the model goes on in its reasoning."""
        turn = self.turns[index]
        return bool(turn.get("prefix")) and not _text_of(turn.get("content")) and self._shows_reasoning(index)

    def transition(self, index: int) -> list[str]:
        """What hands over to the assistant, or a task token; nothing when another turn's header follows."""
        following = self.turns[index + 1]["role"] if index + 1 < len(self.turns) else None
        if following not in (None, "assistant", "latest_reminder"):
            return []
        turn = self.turns[index]
        task = turn.get("task")
        if task is not None:
            if not isinstance(task, str) or task not in texts.TASKS:
                raise ProtocolError(f"unknown task {task!r}; choose one of {', '.join(texts.TASKS)}")
            if task != "action":
                return [Special(texts.TASKS[task])]
            opening = texts.THINK_OPEN if self.thinking else texts.THINK_CLOSE
            return [Special(texts.ASSISTANT), Special(opening), Special(texts.TASKS[task])]
        if turn["role"] not in ("user", "developer"):
            return []
        open_reasoning = self.thinking and (not self.dropping or index >= self.last_user)
        return [Special(texts.ASSISTANT), Special(texts.THINK_OPEN if open_reasoning else texts.THINK_CLOSE)]


def _text_of(content: Any) -> str:
    """Message content: text, or a list of parts whose texts are joined by a blank line."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        return "\n\n".join(_part(part) for part in content)
    raise ProtocolError(f"message content must be text or a list of parts, got {type(content).__name__}")


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ProtocolError(f"a part of a message's content must be text or an object, got {type(part).__name__}")
    if part.get("type") not in ("text", None):
        return f"[Unsupported {part['type']}]"
    text = part.get("text", "")
    if not isinstance(text, str):
        raise ProtocolError(f"a text part needs text, got {text!r}")
    return text


def _block(block: Mapping[str, Any]) -> str:
    if block["type"] == "text":
        return str(block["text"])
    return f"{texts.RESULT_OPEN}{_text_of(block['content'])}{texts.RESULT_CLOSE}"


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"this cannot be written as JSON: {error}") from None


def _tools(tools: Sequence[Mapping[str, Any]] | None) -> list[str]:
    if not tools:
        return []
    schemas = "\n".join(_json(_function(tool)) for tool in _objects(tools, "tools"))
    before, after = texts.TOOLS_TEMPLATE.split("{tool_schemas}")
    return ["\n\n", *_marked(before), schemas, *_marked(after)]


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool or of a call, which may also stand without its wrapper."""
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ProtocolError(f"a tool or a call needs a function with a name, got {tool!r}")
    return function


def _response_format(schema: Any) -> list[str]:
    return [] if not schema else ["\n\n" + texts.RESPONSE_FORMAT_TEMPLATE.replace("{schema}", _json(schema))]


def _marked(template: str) -> list[str]:
    """A text of the protocol itself: its ｜DSML｜ and thinking tags are special tokens."""
    parts: list[str] = [template]
    for special in (texts.DSML, texts.THINK_OPEN, texts.THINK_CLOSE):
        split: list[str] = []
        for part in parts:
            if isinstance(part, Special):
                split.append(part)
                continue
            first, *others = part.split(special)
            split.append(first)
            for other in others:
                split += [Special(special), other]
        parts = split
    return [part for part in parts if part]


def _invoke(call: Mapping[str, Any]) -> list[str]:
    function = _function(call)
    parameters: list[str] = []
    for key, value in _arguments(function.get("arguments")).items():
        is_text = isinstance(value, str)
        head = f'<{texts.DSML}parameter name="'
        middle = f'" string="{"true" if is_text else "false"}">'
        if parameters:
            parameters.append("\n")
        parameters += [*_marked(head), key, middle, value if is_text else _json(value), *_marked(f"</{texts.DSML}parameter>")]
    opening = [*_marked(f'<{texts.DSML}invoke name="'), function["name"], '">\n']
    return [*opening, *parameters, *_marked(f"\n</{texts.DSML}invoke>")]


def _arguments(arguments: Any) -> dict[str, Any]:
    """A call's arguments as an object; text that is not JSON becomes one parameter named ``arguments``."""
    if arguments is None or arguments == "":
        return {}
    value = arguments
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except json.JSONDecodeError:
            return {"arguments": arguments}
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"tool call arguments cannot be read: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ProtocolError(f"tool call arguments must be a JSON object, got {arguments!r}")
    return dict(value)
