"""The agent: ask the model, carry out its calls, give it the results, until it answers or a budget ends.

Everything is in the journal before and after it happens, so a run can be stopped at any point and taken up again: finished
calls are read from the journal, never run twice, and a call that was under way when the run stopped is not run again unless
the front says so. What this file does not know: tokens, bubblewrap, terminals.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nautile.agent.client import Chat, ChatClient
from nautile.agent.toolbox import ToolOutput
from nautile.agent.tools import SYSTEM_PROMPT
from nautile.agent.trajectory import (
    Begun,
    Called,
    Ended,
    Journal,
    JournalError,
    Replied,
    Returned,
    Status,
    Trajectory,
    default_state,
    journals,
)
from nautile.agent.workbench import Edit, Workbench
from nautile.protocol import Event, ToolCall
from nautile.sandbox import ToolSandbox

__all__ = ["Agent", "AgentError", "Budget", "Front", "OutcomeUnknownError", "Unattended", "last_run"]

_RESUMABLE = ("interrupted", "step_budget", "token_budget", "reply_budget")
_CHANGING = ("edit", "run")  # tools that may not be run twice, and that the user approves


class AgentError(RuntimeError):
    """The run cannot start or go on; the text says why and what to do."""


class OutcomeUnknownError(AgentError):
    """A call was under way when the run stopped, and nobody has said whether to run it again."""


@dataclass(frozen=True)
class Budget:
    """What a run may use. Tokens count the whole conversation; the limits exist because a model may never stop."""

    steps: int = 24  # turns of the model
    tokens: int = 32_768
    reply_tokens: int = 1024  # of one turn
    tool_seconds: float = 30.0  # of one call

    def __post_init__(self) -> None:
        if min(self.steps, self.tokens, self.reply_tokens) < 1 or self.tool_seconds <= 0:
            raise AgentError("a budget must be positive: steps, tokens and seconds are at least 1")


class Front(Protocol):
    """Who watches a run and is asked: a terminal, or nobody."""

    def event(self, event: Event) -> None:
        """Part of a turn, as it comes."""

    def calling(self, call: ToolCall, edit: Edit | None) -> None:
        """A call is about to run; ``edit`` holds the diff when it changes a file."""

    def result(self, call: ToolCall, output: ToolOutput, known: bool) -> None:
        """What a call gave; ``known`` when it was read from the log of an earlier run."""

    def approve(self, call: ToolCall, edit: Edit | None) -> bool:
        """May this edit be applied, this command run?"""

    def rerun(self, call: ToolCall) -> bool:
        """This call was under way when the run stopped: run it again (True), or tell the model so (False)?

        Raises OutcomeUnknownError when nobody can say.
        """


class Unattended:
    """Nobody watches. ``approves`` answers for edits and commands, ``reruns`` for calls with an unknown outcome."""

    def __init__(self, approves: bool = True, reruns: bool | None = None) -> None:
        self.approves, self.reruns = approves, reruns

    def event(self, event: Event) -> None:
        """Not shown."""

    def calling(self, call: ToolCall, edit: Edit | None) -> None:
        """Not shown."""

    def result(self, call: ToolCall, output: ToolOutput, known: bool) -> None:
        """Not shown."""

    def approve(self, call: ToolCall, edit: Edit | None) -> bool:
        """The answer given at the start."""
        return self.approves

    def rerun(self, call: ToolCall) -> bool:
        """The answer given at the start; raises OutcomeUnknownError when there was none."""
        if self.reruns is None:
            raise OutcomeUnknownError(
                f"the run stopped while it ran {call.name} {call.arguments}, so what came of it is unknown: resume with "
                "--unfinished rerun to run it again, or --unfinished skip to tell the model"
            )
        return self.reruns


class Agent:
    """Works on one directory with one model. ``state`` is where logs are kept."""

    def __init__(
        self,
        client: ChatClient,
        tools: Sequence[Mapping[str, Any]],
        sandbox: ToolSandbox,
        *,
        budget: Budget | None = None,
        front: Front | None = None,
        state: Path | None = None,
    ) -> None:
        self.client, self.tools, self.sandbox = client, tuple(tools), sandbox
        self.budget, self.front, self.state = budget or Budget(), front or Unattended(), state or default_state()

    def run(self, task: str) -> Trajectory:
        """Do ``task``. Raises AgentError when it is empty, JournalError when no log can be kept.

        Ctrl-C ends the run with status ``interrupted``; what happened until then is in the log.
        """
        if not task.strip():
            raise AgentError('the task is empty: say what to do, for example nautile agent "How many lines has notes.txt?"')
        if task != task.encode("utf-8", "replace").decode("utf-8"):
            raise AgentError("the task is not valid text: write it in UTF-8")
        begun = Begun(task, str(self.sandbox.root), self.client.name, time.time())
        with Journal.create(self.state, begun) as journal:
            return _Run(self, journal).go()

    def resume(self, path: Path) -> Trajectory:
        """Go on with the run logged at ``path``. Raises AgentError when it has ended or belongs to another model."""
        with Journal.open(path) as journal:
            ended = journal.ended
            if ended is not None and ended.status not in _RESUMABLE:
                raise AgentError(f"the last run has ended ({ended.status}); there is nothing to resume")
            if journal.begun.model != self.client.name:
                raise AgentError(f"that run was made by {journal.begun.model}: pass --model {journal.begun.model} to resume it")
            if journal.begun.directory != str(self.sandbox.root):
                raise AgentError(f"that run worked on {journal.begun.directory}: pass --dir to resume it")
            return _Run(self, journal).go()


def last_run(state: Path, directory: Path) -> Path:
    """The newest log of a run on ``directory``. Raises JournalError when there is none."""
    for path in journals(state, directory.resolve()):
        return path
    raise JournalError(f"no run on {directory} is logged in {state}: there is nothing to resume")


class _Run:
    """One run. ``_returned`` and ``_called`` hold what the journal knew when it was opened."""

    def __init__(self, agent: Agent, journal: Journal) -> None:
        self.agent, self.journal, self.front, self.budget = agent, journal, agent.front, agent.budget
        self.workbench = Workbench(agent.sandbox, agent.budget.tool_seconds)
        self.tool_names = [tool["function"]["name"] for tool in agent.tools]
        records = journal.records
        taken = {record.step: record.reply for record in records if isinstance(record, Replied)}
        self._replies = [reply for _, reply in sorted(taken.items()) if reply.ended]  # a turn that was cut is taken again
        self._called = {(record.step, record.index) for record in records if isinstance(record, Called)}
        self._returned = {(record.step, record.index): record for record in records if isinstance(record, Returned)}

    def go(self) -> Trajectory:
        """From wherever the journal is to the end."""
        task = self.journal.begun.task
        opening = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": task}]
        chat = self.agent.client.open(opening, self.agent.tools)
        try:
            status, answer = self._turns(chat)
        except KeyboardInterrupt:
            status, answer = "interrupted", ""
        self.journal.append(Ended(status, answer))
        results = tuple(record for record in self.journal.records if isinstance(record, Returned))
        return Trajectory(
            task, status, answer, self._note(status), tuple(self._replies), results, chat.tokens, self.journal.path
        )

    def _turns(self, chat: Chat) -> tuple[Status, str]:
        step, known = 0, list(self._replies)
        while True:
            if known:
                reply = known.pop(0)
                chat.replay(reply)
            elif step >= self.budget.steps:
                return "step_budget", ""
            elif (room := self.budget.tokens - chat.tokens) < 1:
                return "token_budget", ""
            else:
                reply = chat.reply(min(self.budget.reply_tokens, room), self.front.event)
                self.journal.append(Replied(step, reply))
                self._replies.append(reply)
            if not reply.ended:
                return ("token_budget" if self.budget.tokens <= chat.tokens else "reply_budget"), ""
            if not reply.calls:
                answer = reply.content.strip()
                return ("answered" if answer else "no_answer"), answer
            outputs = [self._outcome(step, index, call) for index, call in enumerate(reply.calls)]
            chat.say(
                [
                    {"role": "tool", "tool_call_id": call.id, "content": output.output}
                    for call, output in zip(reply.calls, outputs, strict=True)
                ]
            )
            step += 1

    def _outcome(self, step: int, index: int, call: ToolCall) -> ToolOutput:
        """What a call gave: from the journal if it ran, from the tool if it did not."""
        known = self._returned.get((step, index))
        if known is not None:
            output = ToolOutput(known.ok, known.output)
            self.front.result(call, output, True)
            return output
        if (step, index) in self._called and call.name in _CHANGING and not self.front.rerun(call):
            output = ToolOutput(False, "error: the run was stopped during this call; what came of it is unknown")
        else:
            output = self._carried_out(step, index, call)
        self.journal.append(Returned(step, index, output.ok, output.output))
        self.front.result(call, output, False)
        return output

    def _carried_out(self, step: int, index: int, call: ToolCall) -> ToolOutput:
        try:
            arguments = json.loads(call.arguments)
        except ValueError:
            arguments = None
        edit = self.workbench.preview(arguments) if call.name == "edit" and arguments is not None else None
        self.front.calling(call, edit if isinstance(edit, Edit) else None)
        if call.name not in self.tool_names:
            return ToolOutput(False, f"error: unknown tool {call.name!r}; tools are {', '.join(self.tool_names)}")
        if arguments is None:
            return ToolOutput(False, "error: the arguments are not JSON")
        if isinstance(edit, ToolOutput):
            return edit  # it cannot be done
        if call.name in _CHANGING and not self.front.approve(call, edit):
            return ToolOutput(False, f"error: the user declined this {'edit' if edit else 'command'}")
        self.journal.append(Called(step, index, call.name, edit))
        return self.workbench.execute(call.name, arguments)

    def _note(self, status: Status) -> str:
        budget = self.budget
        return {
            "answered": "",
            "no_answer": "the model ended its turn without an answer",
            "reply_budget": f"the model did not end its turn within {budget.reply_tokens} tokens; nothing of that turn was run",
            "step_budget": f"no answer within {budget.steps} turns; --resume with a larger --steps goes on",
            "token_budget": f"no answer within {budget.tokens} tokens; --resume with a larger --tokens goes on",
            "interrupted": "stopped; --resume goes on",
        }[status]
