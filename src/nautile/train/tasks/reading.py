"""Kinds answered by the text of one line: read_line, last_line."""

from __future__ import annotations

from nautile.train.tasks.base import Kind, Step, Task, approach
from nautile.train.tasks.words import Pool
from nautile.train.tasks.workspace import Workspace

__all__ = ["LastLine", "ReadLine"]

_LINE_ONLY = ("Answer with the line only.", "Just the line.", "Only its text.", "Give only the text of the line.")
_LONGEST = 90  # characters of a line worth repeating


class ReadLine(Kind):
    """The text of a line given by its number."""

    name = "read_line"
    needs = "any"
    suffixes = _LINE_ONLY
    templates = (
        "What is on line {number} of {file}?",
        "What is on line {number} in {file}?",
        "What's on line {number} of {file}?",
        "What is line {number} of {file}?",
        "What is the text of line {number} of {file}?",
        "What is the content of line {number} of {file}?",
        "What does line {number} of {file} say?",
        "What does line {number} in {file} contain?",
        "What stands on line {number} of {file}?",
        "What text is on line {number} of {file}?",
        "What can be read on line {number} of {file}?",
        "In {file}, what is on line {number}?",
        "In {file}, what does line {number} say?",
        "Show me line {number} of {file}.",
        "Show line {number} of {file}.",
        "Show me the text of line {number} in {file}.",
        "Print line {number} of {file}.",
        "Print line number {number} of {file}.",
        "Read line {number} of {file}.",
        "Read line {number} of {file} to me.",
        "Read me line {number} from {file}.",
        "Read {file} and give me line {number}.",
        "Give me line {number} of {file}.",
        "Give me the text of line {number} of {file}.",
        "Tell me what is on line {number} of {file}.",
        "Tell me what line {number} of {file} says.",
        "Get line {number} of {file}.",
        "Quote line {number} of {file}.",
        "Repeat line {number} of {file}.",
        "I need line {number} of {file}.",
        "I want to see line {number} of {file}.",
        "Could you show me line {number} of {file}?",
        "Can you read line {number} of {file}?",
        "Display line {number} of {file}.",
        "Line {number} of {file}, please.",
        "{file}: what is on line {number}?",
        "Look at line {number} of {file}; what does it say?",
    )
    held_out_templates = (
        "Which text does {file} carry at line {number}?",
        "Copy out line {number} from {file} for me.",
        "Recite the line of {file} whose number is {number}.",
        "{file} has what written on line {number}?",
    )

    @classmethod
    def make(cls, pool: Pool, workspace: Workspace, held_out_wording: bool = False) -> Task | None:
        files = workspace.files()
        path = pool.rng.choice(workspace.paths())
        lines = workspace.documents[path].lines
        good = [number for number, line in enumerate(lines, 1) if line.strip() and len(line) <= _LONGEST]
        if not good:
            return None
        number = pool.rng.choice(good)
        answer = lines[number - 1].strip()
        found = approach(
            pool,
            workspace,
            path,
            lambda name: Step(
                f'I read line {number} of "{name}".', "read", {"path": name, "offset": number, "limit": 1}, f"{number}: "
            ),
        )
        prompt = cls.ask(pool, held_out_wording, {"file": found.phrase, "number": str(number)})
        return Task(cls.name, files, prompt, answer, found.steps, f"I have line {number}.", answer)


class LastLine(Kind):
    """The last line of a file: a shell command."""

    name = "last_line"
    needs = "any"
    suffixes = _LINE_ONLY
    templates = (
        "What is the last line of {file}?",
        "What's the last line of {file}?",
        "What is on the last line of {file}?",
        "What does the last line of {file} say?",
        "What does {file} end with? Give its last line.",
        "What is the final line of {file}?",
        "What is the very last line of {file}?",
        "What is the text of the last line of {file}?",
        "What stands on the last line of {file}?",
        "How does {file} end? Give the last line.",
        "With which line does {file} end?",
        "Which line is the last of {file}?",
        "Show me the last line of {file}.",
        "Show the last line of {file}.",
        "Show me how {file} ends: the last line.",
        "Print the last line of {file}.",
        "Print the final line of {file}.",
        "Read the last line of {file}.",
        "Read me the last line of {file}.",
        "Give me the last line of {file}.",
        "Give me the final line of {file}.",
        "Tell me what is on the last line of {file}.",
        "Tell me the last line of {file}.",
        "Get the last line of {file}.",
        "I need the last line of {file}.",
        "I want to see the last line of {file}.",
        "Could you show me the last line of {file}?",
        "Can you read the last line of {file}?",
        "In {file}, what is the last line?",
        "{file}: what is its last line?",
        "Last line of {file}, please.",
        "Quote the last line of {file}.",
    )
    held_out_templates = (
        "Which text closes {file}? I mean its last line.",
        "Copy out the bottom line of {file}.",
        "{file} finishes with which line?",
        "Recite the line at the end of {file}.",
    )

    @classmethod
    def make(cls, pool: Pool, workspace: Workspace, held_out_wording: bool = False) -> Task | None:
        files = workspace.files()
        path = pool.rng.choice(workspace.paths())
        lines = workspace.documents[path].lines
        if not lines or not lines[-1].strip() or len(lines[-1]) > _LONGEST:
            return None
        answer = lines[-1].strip()
        found = approach(
            pool,
            workspace,
            path,
            lambda name: Step(f'I show the last line of "{name}".', "run", {"command": f"tail -n 1 {name}"}, answer),
            wrong=0.0,
        )
        prompt = cls.ask(pool, held_out_wording, {"file": found.phrase})
        return Task(cls.name, files, prompt, answer, found.steps, "I have the last line.", answer)
