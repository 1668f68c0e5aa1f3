"""Kinds that change the directory and are graded by it: edit_value, replace_text, rename_file."""

from __future__ import annotations

import re
from dataclasses import replace

from nautile.train.tasks.base import Kind, Step, Task, approach, quote
from nautile.train.tasks.counting import piece_of_line
from nautile.train.tasks.documents import Document, Setting, SettingFormat
from nautile.train.tasks.words import Pool
from nautile.train.tasks.workspace import Workspace

__all__ = ["EditValue", "RenameFile", "ReplaceText"]


class EditValue(Kind):
    """Give a key of a settings file another value: look for the line, then edit it."""

    name = "edit_value"
    needs = "settings"
    templates = (
        "Set {key} to {value} in {file}.",
        "Set the value of {key} to {value} in {file}.",
        "Set {key} in {file} to {value}.",
        "Set the setting {key} of {file} to {value}.",
        "In {file}, set {key} to {value}.",
        "In {file}, change {key} to {value}.",
        "In {file}, change the value of {key} to {value}.",
        "In {file}, give {key} the value {value}.",
        "In {file}, {key} should be {value}.",
        "In {file}, make {key} {value}.",
        "Change {key} to {value} in {file}.",
        "Change {key} in {file} to {value}.",
        "Change the value of {key} in {file} to {value}.",
        "Change the value of {key} to {value} in {file}.",
        "Update {key} to {value} in {file}.",
        "Update {key} in {file} to {value}.",
        "Update {file}: {key} should be {value}.",
        "Update the value of {key} in {file}; it should be {value}.",
        "Edit {file} so that {key} is {value}.",
        "Edit {file} and set {key} to {value}.",
        "Edit {key} in {file}: the new value is {value}.",
        "Make {key} {value} in {file}.",
        "Make {file} set {key} to {value}.",
        "Give {key} the value {value} in {file}.",
        "Give the setting {key} in {file} the new value {value}.",
        "I want {key} to be {value} in {file}.",
        "I need {key} set to {value} in {file}.",
        "I would like {key} in {file} to be {value}.",
        "Could you set {key} to {value} in {file}?",
        "Can you change {key} to {value} in {file}?",
        "Modify {file}: set {key} to {value}.",
        "Assign {value} to {key} in {file}.",
        "The value of {key} in {file} should be {value}; change it.",
        "{key} in {file} must become {value}.",
    )
    held_out_templates = (
        "Adjust {file} such that {key} reads {value}.",
        "See to it that {key} equals {value} in {file}.",
        "Let {key} be {value} from now on in {file}.",
        "Put {value} as what {key} holds in {file}.",
    )

    @classmethod
    def make(cls, pool: Pool, workspace: Workspace, held_out_wording: bool = False) -> Task | None:
        files = workspace.files()
        path = pool.rng.choice(workspace.paths("settings"))
        document = workspace.documents[path]
        setting = pool.rng.choice(document.settings)
        value = pool.phrase_value() if document.format and document.format.spaces and pool.rng.random() < 0.12 else pool.value()
        old = document.lines[setting.line].strip()
        if document.format is None or value == setting.value or files[path].decode().count(old) != 1 or "\t" in old:
            return None
        key, lines = setting.key, workspace.grep(path, setting.key)
        if len(lines) > 6:
            return None
        new = document.format.line(key, value).strip()
        found = approach(
            pool,
            workspace,
            path,
            lambda name: Step(f'I look for "{key}" in "{name}".', "grep", {"pattern": key, "path": name}, shows=old),
            wrong=0.03,
        )
        thought = f"It says {old}"
        edit = Step(thought, "edit", {"path": found.path, "old": old, "new": new}, shows=f"line {setting.line + 1}")
        _apply(document, setting, value, document.format)
        asked = {"file": found.phrase, "key": quote(pool, key, 0.5), "value": quote(pool, value, 0.4)}
        prompt = cls.ask(pool, held_out_wording, asked)
        after = {path: workspace.content(path)}
        done = f'"{key}" is now "{value}".'
        return Task(cls.name, files, prompt, None, (*found.steps, edit), "It is done.", done, after)


def _apply(document: Document, setting: Setting, value: str, format_: SettingFormat) -> None:
    document.lines[setting.line] = format_.line(setting.key, value)
    document.settings[document.settings.index(setting)] = replace(setting, value=value)


class ReplaceText(Kind):
    """Replace a text that occurs once in a file."""

    name = "replace_text"
    needs = "any"
    templates = (
        "Replace {old} with {new} in {file}.",
        "Replace {old} by {new} in {file}.",
        "Replace the text {old} with {new} in {file}.",
        "Replace {old} in {file} with {new}.",
        "Replace {old} in {file} by {new}.",
        "In {file}, replace {old} with {new}.",
        "In {file}, replace {old} by {new}.",
        "In {file}, change {old} to {new}.",
        "In {file}, change the text {old} into {new}.",
        "In {file}, write {new} instead of {old}.",
        "In {file}, turn {old} into {new}.",
        "In {file}, {old} should read {new}.",
        "In {file}, put {new} in place of {old}.",
        "Change {old} to {new} in {file}.",
        "Change {old} into {new} in {file}.",
        "Change the text {old} in {file} to {new}.",
        "Edit {file}: replace {old} with {new}.",
        "Edit {file} and change {old} to {new}.",
        "Edit {file} so that {old} becomes {new}.",
        "Swap {old} for {new} in {file}.",
        "Substitute {old} with {new} in {file}.",
        "Turn {old} into {new} in {file}.",
        "Write {new} instead of {old} in {file}.",
        "Put {new} in place of {old} in {file}.",
        "Correct {file}: {old} should be {new}.",
        "There is a mistake in {file}: {old} should be {new}.",
        "Fix {file}: {old} must be {new}.",
        "Could you replace {old} with {new} in {file}?",
        "Can you change {old} to {new} in {file}?",
        "I want {old} replaced with {new} in {file}.",
        "I need {old} changed to {new} in {file}.",
        "Modify {file}: {old} becomes {new}.",
        "Rewrite {old} as {new} in {file}.",
    )
    held_out_templates = (
        "Let {new} take the place of {old} in {file}.",
        "Exchange {old} against {new} within {file}.",
        "Where {file} says {old}, have it say {new}.",
        "Make {file} read {new} where it read {old}.",
    )

    @classmethod
    def make(cls, pool: Pool, workspace: Workspace, held_out_wording: bool = False) -> Task | None:
        rng, files = pool.rng, workspace.files()
        path = rng.choice(workspace.paths("text") or workspace.paths())
        document = workspace.documents[path]
        number = rng.randrange(len(document.lines))
        old = piece_of_line(pool, document.lines[number])
        content = files[path].decode()
        if not 3 <= len(old) <= 50 or "\t" in old or content.count(old) != 1 or old[0] in "\"'`" or old[-1] in "\"'`":
            return None
        new = rng.choice((pool.word, pool.snake, pool.value, pool.phrase_value))()
        if new == old:
            return None
        found = approach(
            pool,
            workspace,
            path,
            lambda name: Step(
                f'I replace "{old}" with "{new}" in "{name}".',
                "edit",
                {"path": name, "old": old, "new": new},
                f"line {number + 1}",
            ),
            wrong=0.03,
        )
        document.lines[number] = document.lines[number].replace(old, new, 1)
        # What the generator knew about this document may no longer hold.
        workspace.documents[path] = Document(document.name, document.lines, "text")
        prompt = cls.ask(
            pool, held_out_wording, {"file": found.phrase, "old": quote(pool, old, 0.2), "new": quote(pool, new, 0.2)}
        )
        after, done = {path: workspace.content(path)}, f"Replaced on line {number + 1}."
        return Task(cls.name, files, prompt, None, found.steps, "It is done.", done, after)


class RenameFile(Kind):
    """Give a file another name: a shell command."""

    name = "rename_file"
    needs = "any"
    templates = (
        "Rename {file} to {new}.",
        "Rename the file {file} to {new}.",
        "Rename {file} as {new}.",
        "Rename the file {file}; its new name is {new}.",
        "Rename {file}; it should be called {new}.",
        "Move {file} to {new}.",
        "Move the file {file} to {new}.",
        "Change the name of {file} to {new}.",
        "Change the file name {file} to {new}.",
        "Change the name of the file {file}: it is {new} now.",
        "Give {file} the name {new}.",
        "Give {file} the new name {new}.",
        "Give the file {file} a new name: {new}.",
        "Call {file} {new} instead.",
        "I want {file} to be called {new}.",
        "I want {file} renamed to {new}.",
        "I need {file} renamed to {new}.",
        "I would like {file} to be named {new}.",
        "Could you rename {file} to {new}?",
        "Could you move {file} to {new}?",
        "Can you rename {file} to {new}?",
        "Can you give {file} the name {new}?",
        "{file} should be called {new}.",
        "{file} should be renamed to {new}.",
        "{file} must be named {new}.",
        "The file {file} should be named {new}.",
        "The file {file} needs a new name: {new}.",
        "The new name of {file} is {new}; rename it.",
        "Let {file} be called {new}.",
        "Make {new} the name of {file}.",
        "Use the name {new} for {file}.",
        "Name {file} {new} from now on.",
        "mv {file} {new}",
    )
    held_out_templates = (
        "Have {file} go by {new} from today.",
        "Turn the name {file} into {new}.",
        "Relabel {file} as {new}.",
        "From {file} to {new}: rename, please.",
    )

    @classmethod
    def make(cls, pool: Pool, workspace: Workspace, held_out_wording: bool = False) -> Task | None:
        rng, files = pool.rng, workspace.files()
        path = rng.choice(workspace.paths())
        folder, _, old_name = path.rpartition("/")
        extension = re.search(r"\.\w+$", old_name)
        suffix = extension[0] if extension and rng.random() < 0.6 else rng.choice(("", ".txt", ".old", ".bak", ".md", ".orig"))
        name = rng.choice((pool.word, pool.snake, pool.invented))() + suffix
        new = f"{folder}/{name}" if folder else name
        if new in workspace.documents or any(other.startswith(f"{new}/") for other in workspace.documents):
            return None
        step = Step(f'I rename "{path}" to "{new}".', "run", {"command": f"mv {path} {new}"}, "(no output)")
        document = workspace.documents.pop(path)
        workspace.documents[new] = replace(document, name=name)
        prompt = cls.ask(pool, held_out_wording, {"file": quote(pool, path, 0.5), "new": quote(pool, new, 0.5)})
        after = {new: files[path]}
        return Task(cls.name, files, prompt, None, (step,), "It is done.", f'It is now "{new}".', after, (path,))
