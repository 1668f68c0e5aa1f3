"""Rollouts: many samples at once in real sandboxes, with the serving engine, ids in and ids out.

A conversation is the agent's own (``EngineClient``): what was sampled goes back as it was sampled, only new text is encoded.
Every token goes through the write-ahead log and every tool call through the sandbox's trajectory log, so a run that was killed
goes on where it was. A changing call that was under way at the kill is not run again: a container says what came of it; a
function call cannot, and the model is told so.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from nautile.agent.client import EngineClient, Reply
from nautile.agent.toolbox import ToolOutput
from nautile.engine import SamplingParams
from nautile.engine.request import EngineEvent, Finished, Request, TokenSampled
from nautile.protocol import Tokenizer, ToolCall, texts
from nautile.sandbox import MIB, Limits, OutcomeUnknown, Sandbox, SandboxError
from nautile.sandbox.tools import SandboxTools
from nautile.train.environment import Call, Environment, Outcome
from nautile.train.environments import environment
from nautile.train.wal import Logged, WriteAheadLog

__all__ = ["Planned", "RolloutConfig", "RolloutError", "Sample", "SampleEngine", "Segment", "roll_out", "sample_seed"]

_READING = ("list", "read", "grep", "count")  # tools that change nothing: asked for again when nobody knows what they gave
_UNKNOWN = "error: the run was stopped during this call; what came of it is unknown"


class RolloutError(RuntimeError):
    """The rollouts cannot start or go on; the text says why."""


@dataclass(frozen=True)
class RolloutConfig:
    """How one step's samples are made. Tokens are counted as in the agent's budget."""

    seed: int = 0
    turns: int = 8
    reply_tokens: int = 256
    tokens: int = 2048  # of a whole conversation
    tool_seconds: float = 20.0
    substrate: str = "function"
    unenforced_limits: bool = False  # go on where memory and process limits cannot be set (no cgroups)
    thinking: bool = True
    at_once: int = 16
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 1.0:
            raise RolloutError("rollouts are sampled at temperature 1: other log-probabilities than the policy's are not kept")
        if min(self.turns, self.reply_tokens, self.tokens, self.at_once) < 1:
            raise RolloutError("turns, reply_tokens, tokens and at_once must be at least 1")


@dataclass(frozen=True)
class Planned:
    """One sample to be made: a task, and which of its group it is."""

    number: int
    group: int
    kind: str
    seed: int  # of the task


@dataclass(frozen=True)
class Segment:
    """One request as the engine ran it: ids before, ids sampled, their log-probabilities under the policy that sampled."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Sample:
    """One finished sample. ``turns`` is for people: what was thought, called and answered."""

    planned: Planned
    segments: tuple[Segment, ...]
    status: str
    answer: str
    reward: float
    reason: str
    prompt: str
    turns: tuple[dict[str, Any], ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole conversation."""
        last = self.segments[-1]
        return (*last.prompt, *last.ids)

    @property
    def sampled(self) -> int:
        """Tokens that the policy chose."""
        return sum(len(segment.ids) for segment in self.segments)

    def record(self) -> dict[str, Any]:
        """For the run's page: everything but the ids."""
        return {**asdict(self.planned), "status": self.status, "answer": self.answer, "reward": self.reward,
                "reason": self.reason, "prompt": self.prompt, "sampled": self.sampled, "turns": list(self.turns)}  # fmt: skip


class SampleEngine(Protocol):
    """The part of ``nautile.Engine`` that rollouts use."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def config(self) -> Any: ...

    def submit_sync(self, request: Request) -> Any: ...


def sample_seed(run: int, planned: Planned) -> int:
    """The seed of a sample's draws: a function of the run, the task and the sample's number."""
    text = f"{run}:{planned.kind}:{planned.seed}:{planned.number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def roll_out(
    engine: SampleEngine,
    plan: Sequence[Planned],
    directory: Path,
    config: RolloutConfig,
    head: Mapping[str, Any],
    progress: Callable[[Sample], None] = lambda sample: None,
) -> list[Sample]:
    """Make every planned sample, or finish what an earlier process began in ``directory``; samples in the order of the plan.

    ``head`` names the weights and the options: a directory that was begun with others is refused. Raises RolloutError,
    WalError, SandboxError.
    """
    if engine.tokenizer is None:
        raise RolloutError("the engine has no tokenizer: pass RolloutEngine(model, tokenizer, ...)")
    options = {key: value for key, value in asdict(config).items() if key != "at_once"}
    log = WriteAheadLog.open(directory / "tokens.wal", {**head, **options, "plan": [asdict(one) for one in plan]})
    for one in plan:
        log.samples.setdefault(one.number, Logged())

    def make(planned: Planned) -> Sample:
        sample = _Episode(engine, planned, directory / f"sample-{planned.number:05d}", config, log).run()
        progress(sample)
        return sample

    try:
        with ThreadPoolExecutor(min(config.at_once, len(plan)), thread_name_prefix="rollout") as pool:
            futures = [pool.submit(make, planned) for planned in plan]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
    finally:
        log.close()


class _LoggedStream:
    """The engine as one sample sees it: tokens that the log has come from it, others from the engine through the log."""

    def __init__(self, engine: SampleEngine, planned: Planned, config: RolloutConfig, log: WriteAheadLog) -> None:
        self.engine, self.planned, self.log, self.turn, self.taken = engine, planned, log, -1, 0
        self.seed = sample_seed(config.seed, planned)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The engine's."""
        return self.engine.tokenizer

    @property
    def config(self) -> Any:
        """The model's."""
        return self.engine.config

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingParams | None = None) -> Iterator[int]:
        """The tokens of the next turn; each is in the log before it is given out."""
        assert sampling is not None and self.tokenizer is not None
        number, self.turn = self.planned.number, self.turn + 1
        known = self.log.context(number, self.turn, tuple(prompt_ids[self.taken :]))
        eos, limit = self.tokenizer.special(texts.EOS), sampling.max_tokens
        yield from list(known.tokens)
        if len(known.tokens) < limit and (not known.tokens or known.tokens[-1] != eos):
            self.log.request(number, self.turn)
            params = SamplingParams(temperature=1.0, seed=self.seed, max_tokens=limit - len(known.tokens), logprobs=0)
            stream = self.engine.submit_sync(Request((*prompt_ids, *known.tokens), params))
            try:
                for event in stream:
                    token = self._noted(event)
                    if token is not None:
                        yield token
            finally:
                stream.close()

    def _noted(self, event: EngineEvent) -> int | None:
        if isinstance(event, TokenSampled):
            assert event.logprob is not None
            self.log.token(self.planned.number, self.turn, event.token, event.logprob)
            return event.token
        if isinstance(event, Finished) and event.reason in ("error", "cancelled"):
            raise RolloutError(f"sample {self.planned.number}: the engine stopped: {event.error or event.reason}")
        return None

    def ended_turn(self, length: int) -> None:
        """The conversation has ``length`` tokens now, all of them known to the log."""
        self.taken = length
        self.log.flush()


class _Episode:
    """One sample from its first token to its grade."""

    def __init__(self, engine: SampleEngine, planned: Planned, place: Path, config: RolloutConfig, log: WriteAheadLog) -> None:
        self.planned, self.place, self.config, self.log = planned, place, config, log
        self.task: Environment = environment(planned.kind)(planned.seed)
        self.stream = _LoggedStream(engine, planned, config, log)
        self.calls: list[Call] = []
        self.turns: list[dict[str, Any]] = []

    def run(self) -> Sample:
        """Finish it, or read that it is finished."""
        known = self.log.samples[self.planned.number]
        if known.end is not None:
            self.turns = known.end["turns"]
            return self._sample(known.end)
        root = self._workspace()
        free = self.config.unenforced_limits
        limits = Limits(memory=512 * MIB, output=31 * MIB, pids=128, allow_unenforced=free)
        sandbox = Sandbox.create(self.config.substrate, limits=limits, workspace=root, log=self.place / "calls", keep=900.0)
        try:
            status, answer = self._converse(SandboxTools(sandbox, root))
            grade = self.task.grade(Outcome(root, answer, tuple(self.calls)))
            reward = grade.reward if status == "answered" else 0.0
            reason = grade.reason if status == "answered" else status
            end = {"status": status, "answer": answer, "reward": reward, "reason": reason, "turns": self.turns}
            self.log.end(self.planned.number, end)
        finally:
            sandbox.close()
        return self._sample(end)

    def _workspace(self) -> Path:
        """The directory with the task's files: written once, whole or not at all."""
        root, fresh = self.place / "work", self.place / "fresh"
        if not root.exists():
            fresh.mkdir(parents=True, exist_ok=True)
            self.task.set_up(fresh)
            fresh.rename(root)
        return root

    def _converse(self, tools: SandboxTools) -> tuple[str, str]:
        sampling = SamplingParams(temperature=1.0, max_tokens=1)
        client = EngineClient(self.stream, sampling, thinking=self.config.thinking)
        opening = [{"role": "system", "content": self.task.system}, {"role": "user", "content": self.task.prompt}]
        chat = client.open(opening, self.task.tools)
        for _ in range(self.config.turns):
            room = self.config.tokens - chat.tokens
            if room < 1:
                return "token_budget", ""
            reply = chat.reply(min(self.config.reply_tokens, room), lambda event: None)
            self.stream.ended_turn(chat.tokens)
            outputs = [self._outcome(tools, call) for call in reply.calls] if reply.ended else []
            self._show(reply, outputs)
            if not reply.ended:
                return ("token_budget" if self.config.tokens <= chat.tokens else "reply_budget"), ""
            if not reply.calls:
                return ("answered" if reply.content.strip() else "no_answer"), reply.content.strip()
            pairs = zip(reply.calls, outputs, strict=True)
            chat.say([{"role": "tool", "tool_call_id": call.id, "content": output.output} for call, output in pairs])
        return "turn_budget", ""

    def _outcome(self, tools: SandboxTools, call: ToolCall) -> ToolOutput:
        try:
            arguments = json.loads(call.arguments)
        except ValueError:
            arguments = None
        if call.name not in [tool["function"]["name"] for tool in self.task.tools]:
            names = ", ".join(tool["function"]["name"] for tool in self.task.tools)
            output = ToolOutput(False, f"error: unknown tool {call.name!r}; tools are {names}")
        elif not isinstance(arguments, dict):
            output = ToolOutput(False, "error: the arguments are not a JSON object")
        else:
            output = self._executed(tools, call.name, arguments)
        self.calls.append(Call(call.name, arguments or {}, output.output, output.ok))
        return output

    def _executed(self, tools: SandboxTools, name: str, arguments: Mapping[str, Any]) -> ToolOutput:
        """Run a tool through the trajectory log. Only what changes nothing is asked for again when its result was lost."""
        tracked = _Tracked(tools)
        output = self._once(tracked, name, arguments)
        if tracked.unknown and name in _READING:
            output = self._once(_Tracked(tools), name, arguments)
        return ToolOutput(False, _UNKNOWN) if output is None else output

    def _once(self, tools: _Tracked, name: str, arguments: Mapping[str, Any]) -> ToolOutput | None:
        try:
            output = self.task.execute(tools, name, arguments, self.config.tool_seconds)
        except SandboxError as error:
            output = ToolOutput(False, f"error: {error}")
        return None if tools.unknown else output

    def _show(self, reply: Reply, outputs: Sequence[ToolOutput]) -> None:
        calls = [
            {"tool": call.name, "arguments": call.arguments, "output": output.output, "ok": output.ok}
            for call, output in zip(reply.calls, outputs, strict=False)
        ]
        self.turns.append({"reasoning": reply.reasoning, "content": reply.content, "calls": calls, "ended": reply.ended})

    def _sample(self, end: Mapping[str, Any]) -> Sample:
        return Sample(
            self.planned,
            tuple(_segments(self.log.samples[self.planned.number])),
            end["status"],
            end["answer"],
            end["reward"],
            end["reason"],
            self.task.prompt,
            tuple(self.turns),
        )


class _Tracked:
    """A sandbox that remembers whether the outcome of a call is unknown: ``Workbench`` makes every error a text."""

    def __init__(self, tools: SandboxTools) -> None:
        self.tools, self.root, self.confinement, self.unknown = tools, tools.root, tools.confinement, False

    def call(self, program: Path, request: Mapping[str, Any], *, time_limit: float) -> dict[str, Any]:
        """See ``ToolSandbox.call``."""
        try:
            return self.tools.call(program, request, time_limit=time_limit)
        except OutcomeUnknown:
            self.unknown = True
            raise


def _segments(known: Logged) -> Iterator[Segment]:
    """Each request with the ids before it: a kill within a turn makes two of it."""
    ids: tuple[int, ...] = ()
    for turn in known.turns:
        ids += turn.context
        bounds = [*sorted(set(turn.starts)), len(turn.tokens)]
        for start, end in itertools.pairwise(bounds):
            if end > start:
                yield Segment((*ids, *turn.tokens[:start]), tuple(turn.tokens[start:end]), tuple(turn.logprobs[start:end]))
        ids += tuple(turn.tokens)
