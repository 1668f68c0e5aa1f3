"""Tasks -> training conversations: the expert's steps run through the real tools, encoded exactly as the agent loop will.

A conversation holds one task or a few over one directory. Its ids are those of ``nautile.protocol.encode`` on the whole of
it, which equal, piece by piece, what the loop feeds at inference (the pieces end at special tokens). The loss mask is 1 on
every token the model must produce: reasoning, ``</think>``, content, calls, the end-of-sentence token.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from nautile.agent.toolbox import execute
from nautile.agent.tools import SYSTEM_PROMPT, TOOLS
from nautile.protocol import Tokenizer, encode, texts
from nautile.protocol.encoder import Special
from nautile.train.renaming import Renaming, random_renaming, system_prompt
from nautile.train.slips import failed, make_misreading, make_slip
from nautile.train.tasks import KINDS, Kind, Lexicon, Pool, Step, Task, Workspace
from nautile.train.tasks.grammars import GRAMMARS
from nautile.train.tasks.wording import Wording
from nautile.train.tasks.words import HELD_OUT_WORDS

__all__ = [
    "Conversation", "Conversations", "Trace", "TraceError", "TraceMaker", "TraceMix", "Turns", "lexicon_of", "run_tasks",
    "tokenise", "training_wording",
]  # fmt: skip


class TraceError(RuntimeError):
    """A tool did not answer as the task's generator expected: the two disagree about the directory."""


_WEIGHTS: dict[str, float] = {name: 1.0 for name in KINDS} | {
    "count_lines": 2.5, "find_definition": 2.5, "lookup_value": 3.2, "edit_value": 1.5, "replace_text": 1.5,
}  # fmt: skip


@dataclass(frozen=True)
class TraceMix:
    """How conversations vary. Weights need not add up to one."""

    kinds: Mapping[str, float] = field(default_factory=lambda: dict(_WEIGHTS))
    chained: float = 0.65  # share of conversations with more than one task
    longest: int = 7  # tasks in one conversation
    thinking: float = 0.85
    all_tools: float = 0.8  # share that offers every tool in the usual order
    real_python: bool = True
    wide: float = 0.75  # share of conversations whose names are partly made of pieces of the vocabulary
    slips: float = 0.14  # share of tasks (of conversations that think) in which the expert gets a name wrong, and repairs it
    misread: float = 0.5  # share of those in which it takes another word for the name; else it miscopies it
    composed: float = 0.75  # share of requests put together from parts; the rest follows the fixed templates
    renamed: float = 0.12  # share of conversations whose tools and parameters have other names
    other_system: float = 0.1  # share of conversations with another system prompt


@dataclass(frozen=True)
class Trace:
    """One encoded conversation."""

    ids: list[int]
    loss: bytearray  # 1 where the token is the model's own, as long as ids
    system: int  # leading tokens that hardly change between conversations (system prompt and tools)
    kinds: tuple[str, ...]
    needs_system: bool = False  # the tools have other names, which only the system prompt tells


@dataclass
class Turns:
    """Messages from the first user turn on. ``slips``: turns of the assistant (from 0) that are mistakes, not to be learnt."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    slips: set[int] = field(default_factory=set)

    def call(self, step: Step, output: str, thinking: bool) -> None:
        """Append a call and what the tool said."""
        function = {"name": step.tool, "arguments": json.dumps(dict(step.arguments), ensure_ascii=False)}
        call = {"id": "call_00", "type": "function", "function": function}
        self.messages.append(_assistant(step.reasoning if thinking else None, "", [call]))
        self.messages.append({"role": "tool", "tool_call_id": "call_00", "content": output})

    def slip(self, step: Step, output: str) -> None:
        """Append a mistaken call and what the tool said."""
        self.slips.add(sum(message["role"] == "assistant" for message in self.messages))
        self.call(step, output, thinking=True)


def run_tasks(tasks: Sequence[Task], root: Path, thinking: bool = True, slipping: tuple[Pool, TraceMix] | None = None) -> Turns:
    """Run the experts of tasks that follow each other on one directory; the conversation from the first user turn on.

    ``root`` must be empty; the first task's files are written to it. ``slipping`` = (source of randomness, mix) lets the expert
    get a name of its first step wrong in some, see what the tool says, and do it again. Raises TraceError when a tool's
    output is not what the task expects, or when a directory-changing task does not grade itself as done.
    """
    tasks[0].write(root)
    turns = Turns()
    for task in tasks:
        turns.messages.append({"role": "user", "content": task.prompt})
        first, *others = task.expert()
        if slipping is not None and first.shows != "error" and slipping[0].rng.random() < slipping[1].slips:
            first = _slipped(turns, slipping, first, task, root)
        for step in (first, *others):
            output = execute(step.tool, dict(step.arguments), root).output
            if step.shows not in output:
                raise TraceError(f"{task.kind}: {step.tool} {dict(step.arguments)} showed {output!r}, not {step.shows!r}")
            turns.call(step, output, thinking)
        turns.messages.append(_assistant(task.reasoning if thinking else None, task.final))
        if (task.after or task.removed) and not task.grade(root, task.final):
            raise TraceError(f"{task.kind}: the directory is not as the task wants it after {task.prompt!r}")
    return turns


def _slipped(turns: Turns, slipping: tuple[Pool, TraceMix], step: Step, task: Task, root: Path) -> Step:
    """Get a name of ``step`` wrong and append what came of it: the step that repairs it, or ``step`` when nothing was wrong."""
    pool, mix = slipping
    misread = pool.rng.random() < mix.misread
    slip = make_misreading(pool, step, task.prompt, task.files) if misread else make_slip(pool, step, task.files)
    if slip is None:
        return step
    output = execute(slip.wrong.tool, dict(slip.wrong.arguments), root).output
    if not failed(output):
        return step
    turns.slip(slip.wrong, output)
    return slip.repaired


def _assistant(reasoning: str | None, content: str, calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def tokenise(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    thinking: bool = True,
    cache: dict[str, list[int]] | None = None,
    unlearnt: Collection[int] = (),
) -> tuple[list[int], bytearray, int]:
    """Ids, loss mask and length of the system part of a conversation in the 0731 dialect.

    ``cache`` keeps the ids of texts before the first user turn, which repeat; pass the same dictionary again. ``unlearnt``
    are turns of the assistant (from 0) that carry no loss.
    """
    parts = encode(messages, tools=tools, thinking=thinking, dialect="0731").parts
    ids: list[int] = []
    loss = bytearray()
    text, system, own, opening, turn = "", -1, False, False, -1
    for part in (*parts, None):
        if part is not None and not isinstance(part, Special):
            text += part
            continue
        if text:
            piece = _piece(text, tokenizer, cache if system < 0 else None)
            ids += piece
            loss += bytes([own]) * len(piece)
            text = ""
        if part is None:
            break
        ids.append(tokenizer.special(part))
        loss.append(own and not opening)
        if part == texts.USER:
            system = len(ids) - 1 if system < 0 else system
        turn += part == texts.ASSISTANT
        own = (own or part == texts.ASSISTANT) and part != texts.EOS and turn not in unlearnt
        opening = part == texts.ASSISTANT  # the <think> or </think> that follows belongs to the header
    return ids, loss, max(system, 0)


def _piece(text: str, tokenizer: Tokenizer, cache: dict[str, list[int]] | None) -> list[int]:
    if cache is None:
        return tokenizer.encode(text)
    if text not in cache:
        cache[text] = tokenizer.encode(text)
    return cache[text]


@dataclass(frozen=True)
class Conversation:
    """Messages from the system prompt on, and how they are to be encoded."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    thinking: bool
    kinds: tuple[str, ...]
    slips: frozenset[int] = frozenset()  # turns of the assistant (from 0) that are mistakes
    renamed: bool = False  # the tools have other names


class Conversations:
    """Makes conversations from random numbers. Owns a scratch directory in memory; close it, or use ``with``.

    Without a ``lexicon`` all names come from the dictionary of words.
    """

    def __init__(self, mix: TraceMix | None = None, lexicon: Lexicon | None = None) -> None:
        self.mix, self.lexicon = mix or TraceMix(), lexicon
        self.wording = training_wording(self.mix.composed) if self.mix.composed else None
        memory = Path("/dev/shm")
        self._scratch = Path(tempfile.mkdtemp(prefix="nautile-", dir=memory if memory.is_dir() else None))
        self.made, self.rejected = 0, 0  # rejected: a tool did not agree with the generator

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the scratch directory."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def make(self, seed: int | str) -> Conversation:
        """The conversation of a seed; the same on every call on one machine.

        Raises TraceError when tools and generators disagree in more than one conversation of fifty.
        """
        rng = random.Random(f"trace:{seed}")
        while True:
            self.made += 1
            try:
                return self._make(rng)
            except TraceError:
                self.rejected += 1
                if self.rejected > 20 + self.made / 50:
                    raise

    def _make(self, rng: random.Random) -> Conversation:
        pool = Pool(rng, lexicon=self._lexicon(rng), wording=self.wording)
        tasks = self.tasks(pool)
        thinking = rng.random() < self.mix.thinking
        tools = _tools(rng, {step.tool for task in tasks for step in task.steps}, self.mix.all_tools)
        root = self._scratch / "work"
        root.mkdir()
        try:
            turns = run_tasks(tasks, root, thinking, (pool, self.mix) if thinking else None)
        finally:
            shutil.rmtree(root)
        renamed = rng.random() < self.mix.renamed
        if renamed:
            renaming = random_renaming(pool, tools)
            tools = renaming.specifications(tools)
            _rename(turns.messages, renaming)
        system = system_prompt(rng) if rng.random() < self.mix.other_system else SYSTEM_PROMPT
        messages = [{"role": "system", "content": system}, *turns.messages]
        return Conversation(messages, tools, thinking, tuple(task.kind for task in tasks), frozenset(turns.slips), renamed)

    def _lexicon(self, rng: random.Random) -> Lexicon | None:
        """This conversation's source of rare names: none, or with a share of its own."""
        if self.lexicon is None or rng.random() >= self.mix.wide:
            return None
        return replace(self.lexicon, share=rng.uniform(0.15, 0.85))

    def tasks(self, pool: Pool) -> list[Task]:
        """One task, or a chain of them over one directory."""
        mix, rng = self.mix, pool.rng
        count = rng.randint(2, mix.longest) if rng.random() < mix.chained else 1
        names = rng.choices(list(mix.kinds), list(mix.kinds.values()), k=count)
        if count > 1 and rng.random() < 0.3:  # several questions of one kind: the answers before do not help
            names = [names[0]] * count
        kinds = [KINDS[name] for name in names]
        if count == 1:
            return [kinds[0].generate(rng, real_python=mix.real_python, lexicon=pool.lexicon, wording=pool.wording)]
        needs = tuple(sorted({kind.needs for kind in kinds}))
        workspace = Workspace.random(pool, needs, mix.real_python)
        tasks = [task for kind in kinds if (task := _try(kind, pool, workspace)) is not None]
        return tasks or self.tasks(pool)


def lexicon_of(tokenizer: Tokenizer) -> Lexicon:
    """Every entry of the vocabulary that is letters, for names; words kept for evaluation are never made of them."""
    entries = (tokenizer.decode([number]) for number in range(tokenizer.vocab_size) if not tokenizer.is_special(number))
    return Lexicon.of(entries, HELD_OUT_WORDS)


def training_wording(share: float = 0.75) -> Wording:
    """Requests put together from parts, a ``share`` of all, without a run of four words of the wordings kept for evaluation."""
    kept = (template for kind in KINDS.values() for template in kind.held_out_templates)
    known = (template for kind in KINDS.values() for template in kind.templates)
    return replace(Wording.of(GRAMMARS, kept, known), share=share)


class TraceMaker:
    """Makes encoded conversations from random numbers; close it, or use ``with``."""

    def __init__(self, tokenizer: Tokenizer, mix: TraceMix | None = None) -> None:
        self.tokenizer, self.lexicon = tokenizer, lexicon_of(tokenizer)
        self.conversations = Conversations(mix, self.lexicon)
        self._system: dict[str, list[int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.conversations.close()

    def make(self, seed: int | str) -> Trace:
        """The encoded conversation of a seed."""
        talk = self.conversations.make(seed)
        if len(self._system) > 500:
            self._system.clear()
        ids, loss, system = tokenise(talk.messages, talk.tools, self.tokenizer, talk.thinking, self._system, talk.slips)
        return Trace(ids, loss, system, talk.kinds, talk.renamed)


def _try(kind: type[Kind], pool: Pool, workspace: Workspace) -> Task | None:
    """A task of this kind on a directory that earlier tasks may have changed; None after ten vain attempts."""
    if kind.needs != "any" and not workspace.paths(kind.needs):
        return None
    return next((task for _ in range(10) if (task := kind.make(pool, workspace)) is not None), None)


def _rename(messages: list[dict[str, Any]], renaming: Renaming) -> None:
    """Put the new words into the calls of ``messages``."""
    for message in messages:
        for call in message.get("tool_calls", ()):
            name, arguments = renaming.call(call["function"]["name"], json.loads(call["function"]["arguments"]))
            call["function"] = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}


def _tools(rng: random.Random, needed: set[str], all_tools: float) -> list[dict[str, Any]]:
    if rng.random() < all_tools:
        return list(TOOLS)
    chosen = [tool for tool in TOOLS if tool["function"]["name"] in needed or rng.random() < 0.6]
    rng.shuffle(chosen)
    return chosen
