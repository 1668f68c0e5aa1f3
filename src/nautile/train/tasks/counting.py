"""Kinds answered by one number from the tools: count_lines, file_length, find_line."""

from __future__ import annotations

import re

from nautile.train.tasks.base import NONE, NOTHING, Kind, Step, Task, approach, compared, quote
from nautile.train.tasks.words import Pool
from nautile.train.tasks.workspace import Workspace

__all__ = ["CountLines", "FileLength", "FindLine"]

_WORD = re.compile(r"[\w.+-]*\w")
_NUMBER_ONLY = (
    "Answer with the number only.", "Just the number.", "Give only the number.", "Reply with a number.", "Number only.",
    "The bare number, please.", "Only the number, please.",
)  # fmt: skip


def piece_of_line(pool: Pool, line: str) -> str:
    """A part of a line that a person might search for: a word, a phrase, what stands before a sign, or the line itself."""
    rng = pool.rng
    line = line.strip()
    words = [(match.start(), match.end()) for match in _WORD.finditer(line)]
    pick = rng.random()
    if not words:
        return line
    if pick < 0.45:
        start, end = rng.choice(words)
        piece = line[start:end]
    elif pick < 0.80:
        first = rng.randrange(len(words))
        last = min(len(words) - 1, first + rng.randint(1, 3))
        piece = line[words[first][0] : words[last][1]]
    elif pick < 0.88:
        piece = re.split(r"(?<=[=:])", line)[0]
    elif pick < 0.94:
        piece = line
    else:
        start, end = rng.choice(words)
        piece = line[start : max(start + 2, end - 2)]
    return piece.strip()


def search_text(pool: Pool, workspace: Workspace, path: str, absent: float) -> str | None:
    """A text to search for in a file: one that is there, or with probability ``absent`` one that is not. None: no luck."""
    rng = pool.rng
    lines = workspace.documents[path].lines
    if rng.random() < absent:
        text = rng.choice((pool.word, pool.invented, pool.snake, pool.phrase_value))()
        return text if not any(text in line for line in lines) else None
    candidates = [piece_of_line(pool, line) for line in rng.choices(lines, k=rng.choice((1, 1, 4, 8)))]
    text = max(candidates, key=lambda one: sum(one in line for line in lines) if len(one) > 1 else 0)  # the most frequent
    if not 2 <= len(text) <= 60 or "\t" in text or ((text[0] in "\"'`" or text[-1] in "\"'`") and rng.random() < 0.9):
        return None
    return text


def _everywhere(pool: Pool, folder: str) -> str:
    if folder == ".":
        return pool.rng.choice(("all files", "the whole directory", "all the files here", "every file", "this directory"))
    name = quote(pool, folder, 0.5)
    return pool.rng.choice((f"all files under {name}", f"the directory {name}", f"the folder {name}", f"every file in {name}"))


class CountLines(Kind):
    """How many lines of a file (or of all files below a directory) contain a text."""

    name = "count_lines"
    needs = "any"
    suffixes = _NUMBER_ONLY
    templates = (
        "How many lines of {file} contain {text}?",
        "How many lines in {file} contain {text}?",
        "How many lines of {file} contain the text {text}?",
        "Count the lines of {file} that contain {text}.",
        "Count the lines in {file} containing {text}.",
        "Count how many lines of {file} have {text} in them.",
        "In {file}, how many lines contain {text}?",
        "In {file}, count the lines with {text}.",
        "How many lines with {text} are there in {file}?",
        "How many lines mention {text} in {file}?",
        "Tell me how many lines of {file} contain {text}.",
        "I want to know how many lines of {file} contain {text}.",
        "I need the number of lines in {file} that contain {text}.",
        "What is the number of lines of {file} that contain {text}?",
        "What's the number of lines containing {text} in {file}?",
        "Find out how many lines of {file} include {text}.",
        "Give me the number of lines in {file} that include {text}.",
        "Number of lines in {file} with {text}?",
        "Lines of {file} that contain {text}: how many?",
        "On how many lines of {file} does {text} appear?",
        "On how many lines does {text} occur in {file}?",
        "In how many lines of {file} does {text} occur?",
        "In how many lines of {file} can {text} be found?",
        "How often is there a line with {text} in {file}?",
        "Could you count the lines of {file} that have {text}?",
        "Can you tell me how many lines in {file} have {text}?",
        "Look at {file} and count the lines that contain {text}.",
        "Look into {file}: how many lines contain {text}?",
        "Check {file} and say how many of its lines contain {text}.",
        "Search {file} for {text} and tell me how many lines match.",
        "How many of the lines of {file} contain {text}?",
        "Of the lines in {file}, how many contain {text}?",
        "Please count all lines in {file} which contain {text}.",
        "{file}: how many lines contain {text}?",
        "{text} is in how many lines of {file}?",
        "Report the count of lines containing {text} in {file}.",
    )
    held_out_templates = (
        "What is the count of lines within {file} where {text} shows up?",
        "Go through {file} and total up the lines having {text}.",
        "{text}: how many lines of {file} carry it?",
        "Say in how many rows of {file} the string {text} is present.",
    )

    @classmethod
    def make(cls, pool: Pool, workspace: Workspace, held_out_wording: bool = False) -> Task | None:
        rng, files = pool.rng, workspace.files()
        path = rng.choice(workspace.paths())
        text = search_text(pool, workspace, path, absent=0.1)
        if text is None:
            return None

        def call(name: str) -> Step:
            where = "all files" if name == "." else f'"{name}"'
            sentence = f'I count the lines of {where} that contain "{text}".'
            return Step(sentence, "count", {"pattern": text, "path": name})

        if rng.random() < 0.05:
            folder = rng.choice(workspace.folders())
            answer = str(sum(1 for _ in workspace.grep_under(folder, text)))
            phrase = _everywhere(pool, folder)
            steps: tuple[Step, ...] = (call(folder),)
        else:
            found = approach(pool, workspace, path, call)
            phrase, steps = found.phrase, found.steps
            answer = str(len(workspace.grep(path, text)))
        prompt = cls.ask(pool, held_out_wording, {"file": phrase, "text": quote(pool, text, 0.15)})
        reasoning = f"The count is {answer}." if answer != "0" else f"{compared(text, text)} The count is 0."
        return Task(cls.name, files, prompt, answer, steps, reasoning, answer)


class FileLength(Kind):
    """How many lines a file has: count with an empty pattern."""

    name = "file_length"
    needs = "any"
    suffixes = _NUMBER_ONLY
    templates = (
        "How many lines does {file} have?",
        "How many lines are there in {file}?",
        "How many lines are in {file}?",
        "Count the lines of {file}.",
        "Count all lines in {file}.",
        "Count all the lines of {file}.",
        "What is the number of lines of {file}?",
        "What's the total number of lines in {file}?",
        "Tell me how many lines {file} has.",
        "Tell me the line count of {file}.",
        "How long is {file}, in lines?",
        "How long is {file} in lines?",
        "In lines, how long is {file}?",
        "What is the line count of {file}?",
        "Line count of {file}?",
        "Number of lines in {file}?",
        "Give me the number of lines of {file}.",
        "Give me the total line count of {file}.",
        "I need the number of lines in {file}.",
        "I want to know how many lines {file} has.",
        "Find out how many lines {file} has.",
        "Could you count the lines in {file}?",
        "Can you tell me how many lines there are in {file}?",
        "Say how many lines {file} has.",
        "{file}: how many lines?",
        "{file} has how many lines?",
        "Report the number of lines in {file}.",
        "Look at {file}: how many lines does it have?",
        "Check how many lines are in {file}.",
        "Determine the number of lines of {file}.",
        "Of how many lines does {file} consist?",
        "What is the length of {file} in lines?",
    )
    held_out_templates = (
        "What does the line total of {file} come to?",
        "Work out the size of {file} measured in lines.",
        "{file} runs to how many lines altogether?",
        "State the full line count for {file}.",
    )

    @classmethod
    def make(cls, pool: Pool, workspace: Workspace, held_out_wording: bool = False) -> Task | None:
        files = workspace.files()
        path = pool.rng.choice(workspace.paths())
        answer = str(len(workspace.documents[path].lines))
        found = approach(
            pool, workspace, path, lambda name: Step(f'I count all lines of "{name}".', "count", {"pattern": "", "path": name})
        )
        prompt = cls.ask(pool, held_out_wording, {"file": found.phrase})
        return Task(cls.name, files, prompt, answer, found.steps, f"The count is {answer}.", answer)


class FindLine(Kind):
    """On which line of a file a text occurs for the first time."""

    name = "find_line"
    needs = "any"
    suffixes = (*_NUMBER_ONLY, "Answer with the line number only.", "Just the line number.")
    templates = (
        "On which line of {file} does {text} first appear?",
        "On which line does {text} first occur in {file}?",
        "On what line of {file} is {text} for the first time?",
        "Which line of {file} is the first to contain {text}?",
        "Which line is the first of {file} that contains {text}?",
        "What is the number of the first line of {file} that contains {text}?",
        "What is the first line number in {file} with {text}?",
        "What's the line number of the first {text} in {file}?",
        "At which line of {file} does {text} first appear?",
        "Find the first line of {file} that contains {text} and give its number.",
        "Find the first line with {text} in {file}; which number is it?",
        "Give me the number of the first line in {file} containing {text}.",
        "Give the line number where {text} first appears in {file}.",
        "Tell me on which line of {file} {text} first appears.",
        "Tell me the number of the first line that has {text} in {file}.",
        "In {file}, on which line does {text} first appear?",
        "In {file}, which line contains {text} first?",
        "In {file}, find the first line containing {text}; I need its number.",
        "I need the line number of the first {text} in {file}.",
        "I want to know on which line {text} first appears in {file}.",
        "Where in {file} does {text} first appear? Give the line number.",
        "Where does {text} first appear in {file}? Give the line number.",
        "Where is the first {text} in {file}? Tell me the line.",
        "Look for {text} in {file}; on which line is it first?",
        "Search {file} for {text} and tell me the first line number.",
        "Search for {text} in {file}: which line comes first?",
        "Could you find the first line of {file} with {text}? I need its number.",
        "Can you tell me which line of {file} first contains {text}?",
        "First line of {file} that contains {text}: which number?",
        "First line number of {text} in {file}?",
        "Line number of the first occurrence of {text} in {file}?",
        "Report the line number of the first occurrence of {text} in {file}.",
        "{file}: which line first contains {text}?",
    )
    held_out_templates = (
        "At what line number does one meet {text} first when reading {file}?",
        "{text} turns up first on which line of {file}?",
        "Point me to the earliest line of {file} holding {text}, by number.",
        "Reading {file} from the top, which line number shows {text} first?",
    )

    @classmethod
    def make(cls, pool: Pool, workspace: Workspace, held_out_wording: bool = False) -> Task | None:
        files = workspace.files()
        path = pool.rng.choice(workspace.paths())
        text = search_text(pool, workspace, path, absent=0.06)
        if text is None or sum(len(workspace.documents[path].lines[n][:200]) for n in workspace.grep(path, text)[:20]) > 900:
            return None
        found = approach(
            pool,
            workspace,
            path,
            lambda name: Step(f'I look for "{text}" in "{name}".', "grep", {"pattern": text, "path": name}),
        )
        lines = workspace.grep(path, text)
        answer = str(lines[0] + 1) if lines else NONE
        reasoning = f"The first line is {answer}." if lines else f"{compared(text, text)} {NOTHING}"
        prompt = cls.ask(pool, held_out_wording, {"file": found.phrase, "text": quote(pool, text, 0.15)})
        return Task(cls.name, files, prompt, answer, found.steps, reasoning, answer)
