"""``nautile demo``: the main job. The shipped model answers three questions about real files, and each answer is checked.

Exit status 0: all three right. 2: the model was wrong. 1: the set-up is broken.
"""

from __future__ import annotations

import ast
import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from nautile.agent.client import ChatClient
    from nautile.sandbox import ToolSandbox

__all__ = ["demo"]

# Questions in words that the model was trained on, over files that it has never seen.
_COUNT = 'How many lines of status contain "Status: install ok installed"?'
_FIND = "On which line of textwrap.py is the class TextWrapper defined?"
_LOOKUP = "What is the value of VERSION_CODENAME in os-release?"


@dataclass(frozen=True)
class _Question:
    """A question about a copy of ``source`` named ``name``; ``check`` finds the answer in the file without any tool."""

    prompt: str
    source: Path
    name: str
    check: Callable[[str], str]


def _count(text: str) -> str:
    return str(sum("Status: install ok installed" in line for line in text.split("\n")))


def _find(text: str) -> str:
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    return str(next(node.lineno for node in classes if node.name == "TextWrapper"))


def _lookup(text: str) -> str:
    return next(line.partition("=")[2].strip("\"'") for line in text.splitlines() if line.startswith("VERSION_CODENAME="))


def demo(
    model: Annotated[str, typer.Option(help="Model directory or Hub id. Default: the shipped nano.")] = "",
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 where this CPU multiplies it), float32 for parity, bfloat16.")
    ] = "auto",
    unconfined: Annotated[bool, typer.Option("--unconfined", help="Run tools with your rights, without a sandbox.")] = False,
) -> None:
    """Let the model work on three real files of this system and check its answers.

    Example: nautile demo
    """
    from rich.console import Console  # noqa: PLC0415

    from nautile.cli.agent import computes_in, open_client  # noqa: PLC0415

    console = Console()
    with tempfile.TemporaryDirectory(prefix="nautile-demo-") as scratch:
        root = Path(scratch, "files")
        root.mkdir()
        questions = _questions()
        expected = [_prepared(question, root) for question in questions]
        sandbox, why = _sandbox(root, unconfined)  # says what is missing before the model is loaded
        console.print(f"Tools run in: {sandbox.confinement}{why}", highlight=False)
        began = time.monotonic()
        client = open_client(model, dtype=dtype)
        loaded = f"{client.name} loaded in {time.monotonic() - began:.1f} s, computes in {computes_in(client)}."
        console.print(f"{loaded} It works in {root}, which holds copies of:", highlight=False)
        for question in questions:
            console.print(f"  {question.name:12} {question.source}", highlight=False)
        try:
            right = [
                _asked(client, Path(scratch), question, answer, sandbox, console)
                for question, answer in zip(questions, expected, strict=True)
            ]
        finally:
            getattr(sandbox, "close", lambda: None)()
    if not all(right):
        console.print(f"\n{sum(right)} of {len(right)} right: the set-up works, the model was wrong.", style="bold red")
        raise typer.Exit(2)
    console.print(f"\nAll {len(right)} right.", style="bold green")
    console.print('Next: nautile agent "How many lines of README.md contain make?" --dir .   or   nautile agent --kinds')


def _sandbox(root: Path, unconfined: bool) -> tuple[ToolSandbox, str]:
    """The best place for tools that really works on this machine, and why it is not a container if it is not."""
    from nautile.sandbox import open_sandbox  # noqa: PLC0415
    from nautile.sandbox.doctor import examine  # noqa: PLC0415
    from nautile.sandbox.tools import open_tools  # noqa: PLC0415

    if unconfined:
        return open_sandbox(root, unconfined=True), ""
    found = {}
    for finding in examine():
        found[finding.part] = finding
        if finding.part == "container":  # the kinds after it are machines, which take long to try
            break
    if found["container"].state == "ok":
        return open_tools(root, "container"), ""
    why = f" (no container: {found['container'].detail}; {found['container'].remedy})"
    return (open_tools(root, "function") if found["function"].state == "ok" else open_sandbox(root)), why


def _questions() -> tuple[_Question, ...]:
    module = importlib.util.find_spec("textwrap")
    source = Path(module.origin) if module is not None and module.origin else Path("textwrap.py")
    return (
        _Question(_COUNT, Path("/var/lib/dpkg/status"), "status", _count),
        _Question(_FIND, source, "textwrap.py", _find),
        _Question(_LOOKUP, Path("/etc/os-release"), "os-release", _lookup),
    )


def _prepared(question: _Question, root: Path) -> str:
    """Copy the file and find the answer. Raises SetupError when this system has no such file, or no answer in it."""
    from nautile.cli.agent import SetupError  # noqa: PLC0415

    try:
        shutil.copyfile(question.source, root / question.name)
        return question.check((root / question.name).read_text(encoding="utf-8"))
    except (OSError, StopIteration, SyntaxError, UnicodeDecodeError):
        raise SetupError(
            f"the demo asks about {question.source}, which every Debian and Ubuntu has; here it is missing or different"
        ) from None


def _asked(
    client: ChatClient, scratch: Path, question: _Question, expected: str, sandbox: ToolSandbox, console: Console
) -> bool:
    """One question, shown live; whether the answer is right."""
    from nautile.agent.console import Terminal  # noqa: PLC0415
    from nautile.agent.loop import Agent  # noqa: PLC0415
    from nautile.agent.tools import TOOLS  # noqa: PLC0415

    console.rule()
    console.print(question.prompt, style="bold", highlight=False, markup=False)
    terminal = Terminal(console, yes=True)
    began = time.monotonic()
    outcome = Agent(client, TOOLS, sandbox, front=terminal, state=scratch / "state").run(question.prompt)
    terminal.line()
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    seconds = time.monotonic() - began
    right = outcome.answer.strip("\"'`.") == expected
    verdict = f"✓ right: {expected}" if right else f"✗ wrong: {outcome.answer or outcome.note!r}, but it is {expected}"
    console.print(
        f"{verdict}  ({seconds:.1f} s, checked without the model)", style="green" if right else "red", highlight=False
    )
    return right
