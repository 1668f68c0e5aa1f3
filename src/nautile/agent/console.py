"""A run on a terminal: the model's turn as it comes, its calls, their results, diffs and questions."""

from __future__ import annotations

import json
import re
from typing import Literal

from rich.console import Console
from rich.text import Text

from nautile.agent.loop import OutcomeUnknownError
from nautile.agent.toolbox import ToolOutput
from nautile.agent.workbench import Edit
from nautile.protocol import ContentDelta, Event, ReasoningDelta, ToolCall

__all__ = ["Terminal", "clean"]

_SHOWN_LINES = 12  # of a result; the model gets all of it
_SHOWN_CHARACTERS = 160  # of a line or an argument
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """Text that cannot steer a terminal: control characters are shown as U+FFFD."""
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


class Terminal:
    """Shows a run on ``console``. ``yes`` approves everything; ``unfinished`` answers for calls with an unknown outcome."""

    def __init__(self, console: Console, *, yes: bool = False, unfinished: Literal["ask", "rerun", "skip"] = "ask") -> None:
        self.console, self.yes, self.unfinished = console, yes, unfinished
        self._streaming: type[Event] | None = None

    def event(self, event: Event) -> None:
        """Reasoning is dim, content is not; a call is shown when it is whole."""
        if not isinstance(event, ReasoningDelta | ContentDelta):
            return
        if self._streaming is not type(event):
            self.line()
            self._streaming = type(event)
        style = "dim" if isinstance(event, ReasoningDelta) else "bold"
        self.console.print(Text(clean(event.text), style=style), end="", soft_wrap=True)

    def line(self) -> None:
        """End the line that is being streamed, if there is one."""
        if self._streaming is not None:
            self.console.print()
            self._streaming = None

    def calling(self, call: ToolCall, edit: Edit | None) -> None:
        """The call, and its diff."""
        self.line()
        self.console.print(_headline(call))
        for line in clean(edit.diff).split("\n") if edit else ():
            colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
            self.console.print(Text(f"    {line}", style=colour), soft_wrap=True)

    def result(self, call: ToolCall, output: ToolOutput, known: bool) -> None:
        """The first lines of what the model gets."""
        self.line()
        if known:
            self.console.print(_headline(call), Text("(from the log)", style="dim"))
        lines = clean(output.output).split("\n")
        for line in lines[:_SHOWN_LINES]:
            self.console.print(Text(f"  │ {_cut(line)}", style="dim" if output.ok else "yellow"), soft_wrap=True)
        if len(lines) > _SHOWN_LINES:
            self.console.print(Text(f"  │ ({len(lines) - _SHOWN_LINES} more lines, not shown here)", style="dim italic"))

    def approve(self, call: ToolCall, edit: Edit | None) -> bool:
        """Ask, unless --yes was given; without a terminal the answer is no."""
        if self.yes:
            return True
        return self._asked("Apply this edit?" if edit else "Run this command?", "declined: there is no terminal; pass --yes")

    def rerun(self, call: ToolCall) -> bool:
        """Ask, unless --unfinished was given; raises OutcomeUnknownError without a terminal."""
        if self.unfinished != "ask":
            return self.unfinished == "rerun"
        if not self.console.is_interactive:
            raise OutcomeUnknownError(
                f"the run stopped during {call.name} {_cut(clean(call.arguments))}, and what came of it is unknown: "
                "--unfinished rerun runs it again, --unfinished skip tells the model"
            )
        self.line()
        self.console.print(_headline(call))
        return self._asked("The run stopped during this call. Run it again?", "")

    def _asked(self, question: str, otherwise: str) -> bool:
        if not self.console.is_interactive:
            self.console.print(Text(f"  {otherwise}", style="yellow"))
            return False
        try:
            return self.console.input(f"  {question} \\[y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            return False


def _headline(call: ToolCall) -> Text:
    try:
        arguments = json.loads(call.arguments)
        shown = " ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())
    except (ValueError, AttributeError):
        shown = call.arguments
    return Text.assemble(("● ", "cyan"), (clean(call.name), "bold cyan"), " ", (_cut(clean(shown)), "cyan"))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
