"""The same tools under other names: what a model must read out of the tools' descriptions instead of knowing by heart.

A ``Renaming`` gives tools, parameters and descriptions other words; it turns calls of the expert into calls of the renamed
tools and back. Names for training and names for evaluation do not overlap. What this file does not know: messages, tokens.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nautile.train.tasks import Pool
from nautile.train.tasks.wording import expand

__all__ = ["HELD_OUT_RENAMING", "Renaming", "random_renaming", "system_prompt"]


@dataclass(frozen=True)
class Renaming:
    """``tools``: name -> new name; ``parameters``: (tool, parameter) -> new name; ``descriptions``: tool -> new text. What is
    not in them keeps its name."""

    tools: Mapping[str, str]
    parameters: Mapping[tuple[str, str], str]
    descriptions: Mapping[str, str]

    def specifications(self, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """OpenAI-style tool specifications with the new words, in the order given."""
        out = []
        for tool in tools:
            function = copy.deepcopy(tool["function"])
            name, parameters = function["name"], function["parameters"]
            function["name"] = self.tools.get(name, name)
            function["description"] = self.descriptions.get(name, function["description"])
            parameters["properties"] = {self._parameter(name, key): value for key, value in parameters["properties"].items()}
            parameters["required"] = [self._parameter(name, key) for key in parameters["required"]]
            out.append({"type": "function", "function": function})
        return out

    def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """A call of the tools as they are -> the same call in the new words."""
        return self.tools.get(name, name), {self._parameter(name, key): value for key, value in arguments.items()}

    def original(self, name: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """A call in the new words -> one of the tools as they are.

        Unknown words, the old ones too, come out marked so that no tool has them.
        """
        known = {new: old for old, new in self.tools.items()}
        old = known.get(name, f"{name} " if name in self.tools else name)
        keys = {new: key for (tool, key), new in self.parameters.items() if tool == old}
        gone = {key for tool, key in self.parameters if tool == old}
        return old, {keys.get(key, f"{key} " if key in gone else key): value for key, value in arguments.items()}

    def _parameter(self, tool: str, key: str) -> str:
        return self.parameters.get((tool, key), key)


_NAMES: dict[str, tuple[str, ...]] = {
    "list": (
        "ls",
        "list_dir",
        "list_files",
        "directory",
        "dir",
        "listing",
        "files",
        "show_dir",
        "ListFiles",
        "folder_contents",
    ),
    "read": (
        "cat",
        "view",
        "open_file",
        "show_lines",
        "read_file",
        "get_lines",
        "view_file",
        "ReadFile",
        "head",
        "print_lines",
    ),
    "grep": (
        "search",
        "find_text",
        "find_lines",
        "rg",
        "search_file",
        "lookup",
        "match_lines",
        "SearchText",
        "find",
        "grep_file",
    ),
    "count": ("count_lines", "count_matches", "num_matches", "grep_count", "wc", "CountLines", "how_many", "number_of_lines"),
    "edit": ("replace", "str_replace", "change_text", "edit_file", "patch", "substitute", "ReplaceText", "modify", "swap_text"),
    "run": ("bash", "shell", "execute", "sh", "run_command", "terminal", "exec", "cmd", "RunCommand", "command_line"),
}
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "path": ("file", "filename", "file_path", "target", "where", "name", "location", "p", "source", "FilePath"),
    "pattern": ("query", "text", "needle", "search", "what", "string", "term", "q", "substring", "Pattern"),
    "old": ("old_text", "find", "before", "from_text", "old_str", "original", "OldText", "search"),
    "new": ("new_text", "replacement", "after", "to_text", "new_str", "replace_with", "NewText"),
    "command": ("cmd", "script", "shell_command", "line", "c", "code", "input"),
    "offset": ("start", "first_line", "from_line", "line", "begin", "start_line"),
    "limit": ("count", "lines", "max_lines", "number", "n", "how_many"),
}
_DESCRIPTIONS: dict[str, str] = {
    "list": "[List|Show|Print|Get|Returns] [a directory|the files of a directory|what is in a folder|the entries of a "
    "directory].",
    "read": "[Show|Print|Read|Display|Returns] [lines of a file|a part of a file|some lines of a text file|the text of a "
    "file].",
    "grep": "[Find|Search for|Show|Returns|Look for] [lines that contain a text|lines with a string|lines of a file that "
    "match].",
    "count": "[Count|Returns the number of|Tell how many] [lines that contain a text|lines with a string|matching lines].",
    "edit": "[Replace|Change|Exchange|Edit] [a text in a file once|one text in a file by another|a piece of a file].",
    "run": "[Run|Execute|Start|Runs] [a shell command|a command in the shell|a command line|a command with sh].",
}
_SYSTEM = (
    "[You are|This is|I am] [Nautile|an agent|an assistant|a helpful assistant|a coding agent|a careful assistant|a bot]"
    "[, an agent| that helps with files||][ that works on the files of one directory with tools| with tools| who uses tools|"
    " working in one directory| for files|]. [Use the tools.|Answer briefly.|You work on the files of a directory.|"
    "Call a tool when you need one.||||]"
)


def random_renaming(pool: Pool, tools: Sequence[Mapping[str, Any]]) -> Renaming:
    """Other names for a random part of ``tools`` and of their parameters: usual ones or words that mean nothing."""
    rng = pool.rng
    names = {tool["function"]["name"] for tool in tools}
    changed: dict[str, str] = {}
    for name in sorted(names):
        if rng.random() < 0.75:
            changed[name] = _other(rng, _NAMES[name], lambda: pool.snake(1, 2), names | set(changed.values()))
    parameters: dict[tuple[str, str], str] = {}
    for tool in tools:
        keys = list(tool["function"]["parameters"]["properties"])
        used = set(keys)
        for key in keys:
            if rng.random() < 0.5:
                new = _other(rng, _PARAMETERS[key], pool.word, used)
                parameters[tool["function"]["name"], key] = new
                used.add(new)
    described = {name: expand(rng, _DESCRIPTIONS[name], {}) for name in sorted(names) if rng.random() < 0.6}
    return Renaming(changed, parameters, described)


def _other(rng: random.Random, usual: Sequence[str], invent: Callable[[], str], taken: set[str]) -> str:
    """A name that is not taken: a usual one, or in three of ten cases an invented one."""
    while True:
        name = invent() if rng.random() < 0.3 else rng.choice(usual)
        if name not in taken and name.isidentifier():
            return name


def system_prompt(rng: random.Random) -> str:
    """Who the model is, in other words."""
    return expand(rng, _SYSTEM, {}).strip()


# For evaluation: none of these names is in the lists above (tests/train/test_renaming.py).
HELD_OUT_RENAMING = Renaming(
    {
        "list": "enumerate_entries", "read": "fetch_text", "grep": "locate_string", "count": "tally", "edit": "rewrite",
        "run": "invoke",
    },
    {
        ("list", "path"): "folder", ("read", "path"): "document", ("read", "offset"): "position", ("read", "limit"): "amount",
        ("grep", "pattern"): "phrase", ("grep", "path"): "document", ("count", "pattern"): "phrase",
        ("count", "path"): "document", ("edit", "path"): "document", ("edit", "old"): "present", ("edit", "new"): "wanted",
        ("run", "command"): "instruction",
    },
    {},
)  # fmt: skip
