"""Kinds answered by choosing one line of what grep shows: find_definition, lookup_value, find_file."""

from __future__ import annotations

from nautile.train.tasks.base import NONE, NOTHING, Kind, Step, Task, approach, compared, quote
from nautile.train.tasks.counting import piece_of_line
from nautile.train.tasks.documents import Definition
from nautile.train.tasks.words import Pool
from nautile.train.tasks.workspace import Workspace

__all__ = ["FindDefinition", "FindFile", "LookupValue"]

_MATCHES = 10  # at most so many lines in the output the expert reads


class FindDefinition(Kind):
    """On which line of a Python file a function, method or class is defined."""

    name = "find_definition"
    needs = "python"
    suffixes = ("Answer with the line number only.", "Just the line number.", "Give only the number.", "The number only.")
    templates = (
        "On which line of {file} is the {what} {name} defined?",
        "On which line of {file} is {what} {name} defined?",
        "On what line of {file} is the {what} {name} defined?",
        "On which line is the {what} {name} defined in {file}?",
        "At which line of {file} is the {what} {name} defined?",
        "At what line does the definition of the {what} {name} start in {file}?",
        "In {file}, on which line is the {what} {name} defined?",
        "In {file}, where is the {what} {name} defined?",
        "In which line of {file} is the {what} {name} defined?",
        "Where in {file} is the {what} {name} defined? Give the line number.",
        "Where is the {what} {name} defined in {file}?",
        "Where does {file} define the {what} {name}?",
        "Which line of {file} defines the {what} {name}?",
        "Which line defines {what} {name} in {file}?",
        "Which line of {file} has the definition of the {what} {name}?",
        "What is the line number of the {what} {name} in {file}?",
        "What line is the {what} {name} defined on in {file}?",
        "What's the line of the definition of {what} {name} in {file}?",
        "Find the definition of the {what} {name} in {file}.",
        "Find the definition of {what} {name} in {file} and give its line number.",
        "Find the line where the {what} {name} is defined in {file}.",
        "Find the {what} {name} in {file}; on which line is it defined?",
        "Find the line of {file} that defines the {what} {name}.",
        "Give me the line number where {file} defines the {what} {name}.",
        "Give the line on which the {what} {name} is defined in {file}.",
        "Tell me on which line of {file} the {what} {name} is defined.",
        "Tell me where the {what} {name} is defined in {file}.",
        "I need the line number of the {what} {name} in {file}.",
        "I am looking for the definition of the {what} {name} in {file}. Which line is it?",
        "I want to know which line of {file} defines the {what} {name}.",
        "Locate the {what} {name} in {file} and tell me its line.",
        "Locate the definition of the {what} {name} in {file}.",
        "Look in {file} for the {what} {name}; which line defines it?",
        "Could you find the line of {file} where the {what} {name} is defined?",
        "Can you tell me on which line {file} defines the {what} {name}?",
        "{file}: on which line is the {what} {name} defined?",
        "Line number of the {what} {name} in {file}?",
        "Report the line where the {what} {name} is defined in {file}.",
        "On which line of {file} is {name} defined?",
        "On which line is {name} defined in {file}?",
        "Where is {name} defined in {file}?",
        "Which line of {file} defines {name}?",
        "Find the definition of {name} in {file}.",
        "In {file}, on which line is {name} defined?",
    )
    held_out_templates = (
        "Which line number in {file} holds the definition for the {what} {name}?",
        "The {what} {name} of {file} begins on what line?",
        "Show me the line number at which {file} introduces the {what} {name}.",
        "Say at which line one finds the {what} {name} being defined within {file}.",
    )

    @classmethod
    def make(cls, pool: Pool, workspace: Workspace, held_out_wording: bool = False) -> Task | None:
        files = workspace.files()
        path = pool.rng.choice(workspace.paths("python"))
        wanted = _definition(pool, workspace, path)
        if wanted is None:
            return None
        pattern = f"class {wanted.name}" if wanted.what == "class" else f"def {wanted.name}("
        lines = workspace.grep(path, pattern)
        if len(lines) > _MATCHES or (wanted.line in lines) != (wanted.line >= 0) or (wanted.line < 0 and lines):
            return None
        found = approach(
            pool,
            workspace,
            path,
            lambda name: Step(f'I look for "{pattern}" in "{name}".', "grep", {"pattern": pattern, "path": name}),
        )
        answer = str(wanted.line + 1) if wanted.line >= 0 else NONE
        reasoning = (
            f'Line {answer} defines "{wanted.name}".' if wanted.line >= 0 else f"{compared(wanted.name, wanted.name)} {NOTHING}"
        )
        values = {"file": found.phrase, "name": _named(pool, wanted), "what": wanted.what}
        clear = wanted.name[0].isupper() == (wanted.what == "class")  # what it is can be seen from the name
        prompt = cls.ask(pool, held_out_wording, values, "" if clear else "{what}")
        return Task(cls.name, files, prompt, answer, found.steps, reasoning, answer)


def _named(pool: Pool, wanted: Definition) -> str:
    if wanted.what != "class" and pool.rng.random() < 0.1:
        return quote(pool, f"{wanted.name}()", 1.0)
    return quote(pool, wanted.name, 0.6)


def _definition(pool: Pool, workspace: Workspace, path: str) -> Definition | None:
    """A name that the file defines once; in one case of twenty one that it does not define (line -1)."""
    found = workspace.documents[path].definitions
    if pool.rng.random() < 0.05:
        what = pool.rng.choice(("function", "class"))
        return Definition(what, pool.camel(2, 2) if what == "class" else pool.snake(1, 2), -1)
    names = [definition.name for definition in found]
    single = [definition for definition in found if names.count(definition.name) == 1]
    if pool.rng.random() < 0.3:  # prefer a class whose name begins another's
        single = [
            one for one in single if one.what == "class" and sum(name.startswith(one.name) for name in names) > 1
        ] or single
    return pool.rng.choice(single) if single else None


class LookupValue(Kind):
    """The value of a key in a settings file."""

    name = "lookup_value"
    needs = "settings"
    suffixes = ("Answer with the value only.", "Just the value.", "Give only the value.", "Only the value, please.")
    templates = (
        "What is the value of {key} in {file}?",
        "What's the value of {key} in {file}?",
        "What value does {key} have in {file}?",
        "What value has {key} in {file}?",
        "What is {key} set to in {file}?",
        "What's {key} set to in {file}?",
        "What does {file} set {key} to?",
        "What is {key} in {file}?",
        "What does {file} say for {key}?",
        "What value does {file} give to {key}?",
        "In {file}, what is the value of {key}?",
        "In {file}, what is {key} set to?",
        "In {file}, look up {key}.",
        "Which value does {key} have in {file}?",
        "Which value is assigned to {key} in {file}?",
        "To what is {key} set in {file}?",
        "To which value does {file} set {key}?",
        "Look up {key} in {file}.",
        "Look up the value of {key} in {file}.",
        "Look at {file} and tell me the value of {key}.",
        "Find the value of {key} in {file}.",
        "Find {key} in {file} and give me its value.",
        "Find out what {key} is set to in {file}.",
        "Give me the value of {key} in {file}.",
        "Give the value of the setting {key} of {file}.",
        "Tell me the value of {key} in {file}.",
        "Tell me what {key} is in {file}.",
        "Read {file} and tell me what {key} is.",
        "I need the value of {key} from {file}.",
        "I want to know what {key} is set to in {file}.",
        "Get {key} from {file}.",
        "Get the value of {key} from {file}.",
        "Could you look up {key} in {file}?",
        "Can you tell me the value of {key} in {file}?",
        "What is the value of the key {key} in {file}?",
        "What is the value of the setting {key} in {file}?",
        "Check {file}: what is {key}?",
        "According to {file}, what is {key}?",
        "{file}: what is the value of {key}?",
        "{key} in {file}: what is its value?",
        "Value of {key} in {file}?",
        "Report the value that {file} has for {key}.",
    )
    held_out_templates = (
        "Which setting does {file} hold under the key {key}?",
        "Pull out of {file} whatever {key} equals.",
        "{file} configures {key} as what?",
        "Say what one reads in {file} for {key}.",
    )

    @classmethod
    def make(cls, pool: Pool, workspace: Workspace, held_out_wording: bool = False) -> Task | None:
        files = workspace.files()
        path = pool.rng.choice(workspace.paths("settings"))
        settings = workspace.documents[path].settings
        key, value, line = pool.snake(1, 2), "", -1
        if pool.rng.random() > 0.05:
            wanted = pool.rng.choice(settings)
            if pool.rng.random() < 0.4:  # prefer a key that is part of another
                wanted = next((one for one in settings if len(workspace.grep(path, one.key)) > 1), wanted)
            key, value, line = wanted.key, wanted.value, wanted.line
        lines = workspace.grep(path, key)
        if len(lines) > _MATCHES or (line < 0 and lines):
            return None
        found = approach(
            pool, workspace, path, lambda name: Step(f'I look for "{key}" in "{name}".', "grep", {"pattern": key, "path": name})
        )
        answer = value if line >= 0 else NONE
        # The line word for word, then the value: to copy a whole line is easier than to pick a value out of many lines.
        reasoning = (
            f"It says {workspace.documents[path].lines[line].strip()}" if line >= 0 else f"{compared(key, key)} {NOTHING}"
        )
        prompt = cls.ask(pool, held_out_wording, {"file": found.phrase, "key": quote(pool, key, 0.5)})
        return Task(cls.name, files, prompt, answer, found.steps, reasoning, answer)


class FindFile(Kind):
    """Which file of the directory contains a text."""

    name = "find_file"
    needs = "any"
    suffixes = ("Answer with the path only.", "Just the file name.", "Give only the path.", "Only the path, please.")
    templates = (
        "Which file contains {text}?",
        "Which file contains the text {text}?",
        "Which file has a line with {text}?",
        "Which file has {text} in it?",
        "Which file mentions {text}?",
        "Which of the files contains {text}?",
        "Which of the files here mentions {text}?",
        "Which of these files has {text}?",
        "In which file is {text}?",
        "In which file does {text} appear?",
        "In which file does {text} occur?",
        "In which file can {text} be found?",
        "In which file can I find {text}?",
        "In what file is the text {text}?",
        "What file contains {text}?",
        "What is the name of the file that contains {text}?",
        "What's the path of the file containing {text}?",
        "What is the path of the file with {text}?",
        "Find the file that contains {text}.",
        "Find the file containing {text}.",
        "Find the file with {text} in it.",
        "Find out which file contains {text}.",
        "Find {text}; in which file is it?",
        "Tell me which file contains {text}.",
        "Tell me in which file {text} appears.",
        "Give me the path of the file that contains {text}.",
        "Give me the name of the file with {text}.",
        "I am looking for the file that contains {text}.",
        "I need the file that contains {text}.",
        "I lost the file that mentions {text}; where is it?",
        "Where is {text}? Give the file.",
        "Where can I find {text}? Name the file.",
        "Search all files for {text} and tell me which one has it.",
        "Search the directory for {text}: which file has it?",
        "Search for the file with {text}.",
        "Look through the files: which one contains {text}?",
        "Could you find the file that contains {text}?",
        "Can you tell me which file mentions {text}?",
        "Locate the file that contains {text}.",
        "{text} is in which file?",
    )
    held_out_templates = (
        "Name the one file where {text} turns up.",
        "{text} stands in some file here; say which.",
        "Which path leads to the text {text}?",
        "Point me to the file holding {text}.",
    )

    @classmethod
    def make(cls, pool: Pool, workspace: Workspace, held_out_wording: bool = False) -> Task | None:
        files = workspace.files()
        path = pool.rng.choice(workspace.paths())
        lines = workspace.documents[path].lines
        absent = pool.rng.random() < 0.06
        text = pool.snake(2, 2) if absent else piece_of_line(pool, pool.rng.choice(lines)) if lines else ""
        if not 3 <= len(text) <= 60 or "\t" in text or text[0] in "\"'`" or text[-1] in "\"'`":
            return None
        found = list(workspace.grep_under(".", text))
        if bool(found) == absent or len(found) > _MATCHES or {name for name, _ in found} - {path}:
            return None
        if sum(len(lines[number]) for _, number in found) > 500:
            return None
        answer = NONE if absent else path
        reasoning = f"{compared(text, text)} {NOTHING}" if absent else f'The file is "{path}".'
        steps = (Step(f'I look for "{text}" in all files.', "grep", {"pattern": text, "path": "."}),)
        prompt = cls.ask(pool, held_out_wording, {"text": quote(pool, text, 0.2)})
        return Task(cls.name, files, prompt, answer, steps, reasoning, answer)
