"""Tasks for an agent with tools: each kind makes a directory, a prompt, an expert's steps and a grader from a seed."""

from nautile.train.tasks.base import HELD_OUT_START, Kind, Step, Task, compared
from nautile.train.tasks.counting import CountLines, FileLength, FindLine
from nautile.train.tasks.editing import EditValue, RenameFile, ReplaceText
from nautile.train.tasks.finding import FindDefinition, FindFile, LookupValue
from nautile.train.tasks.lexicon import Lexicon
from nautile.train.tasks.reading import LastLine, ReadLine
from nautile.train.tasks.shell import CountFiles, LargestFile, SumColumn
from nautile.train.tasks.words import Pool
from nautile.train.tasks.workspace import Workspace

__all__ = ["DEMO_KINDS", "HELD_OUT_START", "KINDS", "Kind", "Lexicon", "Pool", "Step", "Task", "Workspace", "compared"]

KINDS: dict[str, type[Kind]] = {
    kind.name: kind
    for kind in (
        CountLines, FindDefinition, LookupValue, FindFile, FindLine, FileLength, ReadLine, LastLine, EditValue, ReplaceText,
        RenameFile, CountFiles, LargestFile, SumColumn,
    )
}  # fmt: skip
DEMO_KINDS = ("count_lines", "find_definition", "lookup_value")
