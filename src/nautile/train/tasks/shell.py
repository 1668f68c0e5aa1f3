"""Kinds that need one shell command: count_files, largest_file, sum_column."""

from __future__ import annotations

from nautile.train.tasks.base import Kind, Step, Task, approach, quote
from nautile.train.tasks.words import Pool
from nautile.train.tasks.workspace import Workspace

__all__ = ["CountFiles", "LargestFile", "SumColumn"]

_NUMBER_ONLY = ("Answer with the number only.", "Just the number.", "Give only the number.", "Number only.")


def _folder_phrase(pool: Pool, folder: str) -> str:
    if folder == ".":
        return pool.rng.choice(("this directory", "the directory", "the current directory", "here", "this folder"))
    name = quote(pool, folder, 0.6)
    return pool.rng.choice((name, f"the directory {name}", f"the folder {name}"))


class CountFiles(Kind):
    """How many files with an extension there are in a directory and below it."""

    name = "count_files"
    needs = "any"
    suffixes = _NUMBER_ONLY
    templates = (
        "How many {extension} files are in {folder}?",
        "How many {extension} files are there in {folder}?",
        "How many {extension} files does {folder} have?",
        "How many {extension} files does {folder} contain?",
        "How many {extension} files can be found in {folder}?",
        "How many files in {folder} end in {extension}?",
        "How many files in {folder} end with {extension}?",
        "How many files with the extension {extension} are in {folder}?",
        "How many files in {folder} have the extension {extension}?",
        "How many files whose name ends in {extension} are in {folder}?",
        "Count the {extension} files in {folder}.",
        "Count all {extension} files in {folder}.",
        "Count the files in {folder} that end in {extension}.",
        "Count the files in {folder} whose names end with {extension}.",
        "Count the files with the extension {extension} in {folder}.",
        "In {folder}, how many {extension} files are there?",
        "In {folder}, how many files end in {extension}?",
        "In {folder}, count the files with the extension {extension}.",
        "What is the number of {extension} files in {folder}?",
        "What's the number of files ending in {extension} in {folder}?",
        "Number of {extension} files in {folder}?",
        "Tell me how many {extension} files are in {folder}.",
        "Tell me how many files in {folder} end in {extension}.",
        "Tell me the number of {extension} files in {folder}.",
        "Give me the number of {extension} files in {folder}.",
        "Give me the count of {extension} files in {folder}.",
        "I need the number of {extension} files in {folder}.",
        "I want to know how many {extension} files {folder} has.",
        "Find out how many {extension} files are in {folder}.",
        "Could you count the {extension} files in {folder}?",
        "Can you tell me how many {extension} files there are in {folder}?",
        "Check how many {extension} files are in {folder}.",
    )
    held_out_templates = (
        "What does the total of {extension} files in {folder} come to?",
        "Say how many files named something {extension} lie in {folder}.",
        "Work out how many {extension} files {folder} holds.",
        "State the tally of {extension} files for {folder}.",
    )

    @classmethod
    def make(cls, pool: Pool, workspace: Workspace, held_out_wording: bool = False) -> Task | None:
        rng, files = pool.rng, workspace.files()
        folder = rng.choice([".", *workspace.folders()])
        paths = workspace.under(folder)
        extensions = ["." + path.rpartition(".")[2] for path in paths if "." in path.rpartition("/")[2][1:]]
        extension = rng.choice([*extensions, ".txt", ".py"])
        answer = str(sum(path.endswith(extension) for path in paths))
        command = f"find {folder} -type f -name '*{extension}' | wc -l"
        where = "this directory" if folder == "." else f'"{folder}"'
        step = Step(f'I count the files of {where} that end in "{extension}".', "run", {"command": command}, answer)
        shown = extension if rng.random() < 0.5 else quote(pool, extension, 0.0)
        prompt = cls.ask(pool, held_out_wording, {"folder": _folder_phrase(pool, folder), "extension": shown})
        return Task(cls.name, files, prompt, answer, (step,), f"The count is {answer}.", answer)


class LargestFile(Kind):
    """The largest or smallest file of a directory, itself and below."""

    name = "largest_file"
    needs = "any"
    suffixes = ("Answer with the path only.", "Just the file name.", "Give only the path.", "Only the path, please.")
    templates = (
        "Which file in {folder} is the {which}?",
        "Which file is the {which} in {folder}?",
        "Which file of {folder} is the {which}?",
        "Which is the {which} file in {folder}?",
        "Which of the files in {folder} is the {which}?",
        "Which of the files of {folder} is the {which} one?",
        "What is the {which} file in {folder}?",
        "What is the {which} file of {folder}?",
        "What's the {which} file in {folder}?",
        "What is the name of the {which} file in {folder}?",
        "What is the path of the {which} file in {folder}?",
        "What file is the {which} in {folder}?",
        "In {folder}, which file is the {which}?",
        "In {folder}, what is the {which} file?",
        "In {folder}, find the {which} file.",
        "Find the {which} file in {folder}.",
        "Find the {which} file of {folder}.",
        "Find out which file in {folder} is the {which}.",
        "Tell me the {which} file in {folder}.",
        "Tell me which file in {folder} is the {which}.",
        "Tell me the name of the {which} file in {folder}.",
        "Give me the {which} file in {folder}.",
        "Give me the name of the {which} file in {folder}.",
        "Give me the path of the {which} file of {folder}.",
        "I need the {which} file in {folder}.",
        "I want to know which file in {folder} is the {which}.",
        "I am looking for the {which} file in {folder}.",
        "Could you find the {which} file in {folder}?",
        "Can you tell me which file in {folder} is the {which}?",
        "Name the {which} file in {folder}.",
        "Show me the {which} file in {folder}.",
        "Look for the {which} file in {folder}.",
    )
    held_out_templates = (
        "By size, which file of {folder} is the {which}?",
        "Determine the {which} among the files in {folder}.",
        "Say which file of {folder} one would call the {which}.",
        "Point out the {which} file that {folder} holds.",
    )

    @classmethod
    def make(cls, pool: Pool, workspace: Workspace, held_out_wording: bool = False) -> Task | None:
        rng, files = pool.rng, workspace.files()
        folder = rng.choice([".", *workspace.folders()])
        paths = workspace.under(folder)
        sizes = [len(files[path]) for path in paths]
        if len(paths) < 2 or len(set(sizes)) < len(sizes):
            return None
        large = rng.random() < 0.6
        which = rng.choice(("largest", "largest", "biggest") if large else ("smallest",))
        path = paths[sizes.index((max if large else min)(sizes))]
        command = rf'find {folder} -type f -printf "%s %p\n" | sort -n | {"tail" if large else "head"} -n 1'
        where = "this directory" if folder == "." else f'"{folder}"'
        word = "largest" if large else "smallest"
        shown = f"./{path}" if folder == "." else path
        step = Step(f"I look for the {word} file of {where}.", "run", {"command": command}, f" {shown}")
        prompt = cls.ask(pool, held_out_wording, {"folder": _folder_phrase(pool, folder), "which": which})
        return Task(cls.name, files, prompt, shown, (step,), f'The file is "{shown}".', shown)


class SumColumn(Kind):
    """The sum of a column of a comma-separated table, the column given by its number."""

    name = "sum_column"
    needs = "table"
    suffixes = _NUMBER_ONLY
    templates = (
        "What is the sum of column {number} of {file}?",
        "What is the sum of column {number} in {file}?",
        "What's the sum of column {number} of {file}?",
        "What is the total of column {number} of {file}?",
        "What's the total of column {number} in {file}?",
        "What do the numbers in column {number} of {file} add up to?",
        "What does column {number} of {file} add up to?",
        "What is the sum of the numbers in column {number} of {file}?",
        "What is the sum of all values in column {number} of {file}?",
        "Sum column {number} of {file}.",
        "Sum up column {number} of {file}.",
        "Sum up column {number} in {file}.",
        "Sum the numbers in column {number} of {file}.",
        "Sum the values of column {number} in {file}.",
        "Add up column {number} of {file}.",
        "Add up the numbers in column {number} of {file}.",
        "Add up the values in column {number} of {file}.",
        "Compute the sum of column {number} of {file}.",
        "Compute the total of column {number} in {file}.",
        "Calculate the sum of column {number} of {file}.",
        "Calculate the total of column {number} of {file}.",
        "In {file}, what is the sum of column {number}?",
        "In {file}, sum column {number}.",
        "In {file}, add up column {number}.",
        "Tell me the sum of column {number} of {file}.",
        "Tell me the total of column {number} in {file}.",
        "Give me the sum of column {number} of {file}.",
        "Give me the total of column {number} of {file}.",
        "I need the sum of column {number} in {file}.",
        "I want the total of column {number} of {file}.",
        "Could you sum column {number} of {file}?",
        "Can you add up column {number} of {file}?",
        "{file}: what is the sum of column {number}?",
        "Sum of column {number} of {file}?",
    )
    held_out_templates = (
        "How much is column {number} of {file} altogether?",
        "Put together all numbers of column {number} in {file}.",
        "Which total results from column {number} of {file}?",
        "Say what column {number} makes in sum over {file}.",
    )

    @classmethod
    def make(cls, pool: Pool, workspace: Workspace, held_out_wording: bool = False) -> Task | None:
        files = workspace.files()
        path = pool.rng.choice(workspace.paths("table"))
        document = workspace.documents[path]
        number, _ = pool.rng.choice(document.columns)
        answer = str(sum(int(line.split(",")[number - 1]) for line in document.lines[1:]))
        found = approach(
            pool,
            workspace,
            path,
            lambda name: Step(
                f'I sum column {number} of "{name}".',
                "run",
                {"command": f"awk -F, '{{s += ${number}}} END {{print s}}' {name}"},
                answer,
            ),
            wrong=0.0,
        )
        prompt = cls.ask(pool, held_out_wording, {"file": found.phrase, "number": str(number)})
        return Task(cls.name, files, prompt, answer, found.steps, f"The sum is {answer}.", answer)
