"""Requests in words that supervised training does not compose: what reinforcement practises on.

``PRACTISED`` is for training, ``FRESH`` for measuring: no sentence is in both, and neither shares four words in a row with the
wordings that ``nautile.evals`` keeps (tests/train/test_variants.py). Slots are those of the kind's own templates.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["FRESH", "PRACTISED", "UNDECIDED"]

PRACTISED: Mapping[str, tuple[str, ...]] = {
    "count_lines": (
        "Were I to filter {file} by {text}, what number of lines would survive?",
        "Of all lines in {file}, to how many does {text} belong?",
        "I wonder about {text} in {file}: the size of that crowd of lines, please.",
        "What would grep -c {text} {file} print?",
        "{file} has some lines with {text} in them. Their headcount?",
        "Check {file} against {text} and report the hits, one per line.",
        "A number: lines of {file} touched by {text}.",
        "Scan {file}; each line with {text} scores a point. What is the score?",
    ),
    "find_definition": (
        "Whereabouts in {file} does the {what} {name} come to life? I need the line.",
        "If I jump to the {what} {name} in {file}, which line do I land on?",
        "Where would an editor take me in {file}, given the {what} {name}? The line.",
        "Line of birth of the {what} {name} in {file}?",
        "The {what} {name}, {file}: give me its starting line.",
        "In {file}, past which line does the {what} {name} open?",
        "I want to set a breakpoint on the {what} {name} in {file}; which line?",
        "Navigate {file} until {what} {name} shows up and name the line.",
    ),
    "lookup_value": (
        "How is {key} configured by {file}?",
        "{file} assigns something to {key}. What?",
        "What stands to the right of {key} in {file}?",
        "Resolve {key} using {file}.",
        "Were a program to load {file}, what would it get for {key}?",
        "The contents of {key}, going by {file}?",
        "{key} in {file} is equal to?",
        "Quote me what {file} gives {key}.",
    ),
    "find_file": (
        "Somebody wrote {text} into one of these files. Into which?",
        "Where was {text} put down? I want the path.",
        "Only one file knows {text}. Which one?",
        "Hunt {text} down and hand over the path.",
        "What file would I open to see {text}?",
        "I lost track of {text}; which file has it?",
        "{text} is hiding somewhere in this directory. Where?",
        "Trace {text} back to its file.",
    ),
    "find_line": (
        "The debut of {text} in {file} happens on which line?",
        "How far down {file} must I go, in lines, to see {text} for the first time?",
        "Counting lines from one, where does {file} start to mention {text}?",
        "Jump to {text} in {file}: line, please.",
        "Before which line is there no {text} in {file}? I mean the line of the very first one.",
        "What line would grep -n -m 1 {text} {file} give?",
        "{file}, {text}: number of the first line that matches.",
        "Scroll {file} until {text} shows; which line are you on?",
    ),
    "file_length": (
        "How tall is {file}, counted in lines?",
        "What would wc -l say about {file}?",
        "If {file} were printed one line a row, how many rows would there be?",
        "Up to which line number does {file} go?",
        "{file}: number of lines, all of them.",
        "Lines in {file}? All together.",
        "Someone asked me for the length of {file}, in lines.",
        "How many newline-ended lines make up {file}?",
    ),
    "read_line": (
        "Jump to line {number} of {file} and tell me what you see.",
        "What would sed -n {number}p {file} print?",
        "Line {number}, {file}: its words, please.",
        "Scroll {file} down to line {number} and quote it.",
        "Were I on line {number} of {file}, what would be before my eyes?",
        "{file} at {number}: which text is there?",
        "I need to cite line {number} of {file}. How does it go?",
        "How does line {number} of {file} run?",
    ),
    "last_line": (
        "How does {file} end? The final line, please.",
        "What would tail -n 1 {file} print?",
        "Scroll to the very end of {file} and quote the line there.",
        "After everything else, what does {file} say? I need that line.",
        "The lowest line in {file}, word for word?",
        "{file} stops after which line?",
        "Which line is the newest if {file} only ever grows at its end?",
        "No line comes after it in {file}. What does it say?",
    ),
    "edit_value": (
        "From now on {file} should give {value} for {key}.",
        "In {file}, {key} is wrong; it ought to be {value}.",
        "Give {key} a fresh value in {file}, namely {value}.",
        "I want {file} to hand out {value} when asked for {key}.",
        "{key} should no longer be what it is in {file}: {value} is right.",
        "Tune {key} to {value}, in {file}.",
        "Whatever {key} was in {file}, make that {value}.",
        "Correct {file}: {key} has to be {value}.",
    ),
    "replace_text": (
        "{old} is outdated in {file}; the right thing is {new}.",
        "In {file}, {old} is a typo for {new}. Mend it.",
        "Rewrite {file} with {new} in the place where {old} is.",
        "Every trace of {old} should leave {file}, {new} takes over.",
        "sed s/{old}/{new}/ on {file}, if you please.",
        "Drop {old} from {file} and write {new} there.",
        "{file} says {old}. It must say {new}.",
        "Fix {file}: not {old} but {new}.",
    ),
    "rename_file": (
        "{file} is a bad name. {new} is better; see to that.",
        "I'd rather find {file} under {new}.",
        "mv {file} {new}",
        "Move what is in {file} to {new}.",
        "Let us say goodbye to the name {file} and use {new}.",
        "{file} gets a fresh name, {new}.",
        "Our convention wants {new} where {file} is now.",
        "The file {file} shall be {new}.",
    ),
    "count_files": (
        "Walk through {folder}: how often do you meet a file with {extension} at its end?",
        "What would find {folder} -name '*{extension}' | wc -l print?",
        "{folder}: number of {extension} files, subfolders included.",
        "How rich is {folder} in {extension} files? A number.",
        "If all but the {extension} files left {folder}, how many would stay?",
        "I collect {extension} files. How many would {folder} give me?",
        "The {extension} population of {folder}?",
        "Add up the {extension} files below {folder}.",
    ),
    "largest_file": (
        "Sort the files of {folder} by bytes; which one is the {which}?",
        "In bytes, what is the {which} file under {folder}?",
        "Compare the sizes in {folder}. Who is the {which}?",
        "{folder}: its {which} file, please.",
        "Among everything in {folder}, which file would be the {which}?",
        "Disk usage of {folder}: name the {which} one.",
        "Find me the {which} of them all in {folder}.",
        "Line up the files in {folder} by weight and pick the {which}.",
    ),
    "sum_column": (
        "Take column {number} of {file} and fold it with plus.",
        "What would a spreadsheet show under column {number} of {file} as SUM?",
        "Column {number} in {file}: all numbers in one sum, please.",
        "{file}, column {number}. Total?",
        "Running down column {number} of {file}, what have you collected at the end?",
        "How much do the rows of {file} have in column {number}, taken as one?",
        "I need the grand total for column {number} in {file}.",
        "Accumulate column {number} over {file}.",
    ),
}

# Of those above (by place) the ones that the shipped model does now and then. They change with the weights: count again with
# bench/rollout_variance.py.
UNDECIDED: Mapping[str, tuple[int, ...]] = {
    "count_lines": (1, 6),
    "find_definition": (4,),
    "lookup_value": (0, 3, 5),
    "find_file": (0, 6),
    "find_line": (0, 1, 3, 6, 7),
    "file_length": (1, 2),
    "read_line": (1,),
    "edit_value": (0, 2, 3, 5, 6),
    "replace_text": (2, 7),
    "rename_file": (4, 5, 6),
    "count_files": (6,),
}

FRESH: Mapping[str, tuple[str, ...]] = {
    "count_lines": (
        "Which number do I get if I only keep the lines of {file} with {text} and count those?",
        "{text} marks some lines of {file}. Tell me how many are marked.",
    ),
    "find_definition": (
        "I lost the {what} {name} in {file}. On what line was it made?",
        "{what} {name}: take me there in {file}; a line will do.",
    ),
    "lookup_value": (
        "Which value would {file} hand to a reader of {key}?",
        "{key}, as laid down in {file}, is what?",
    ),
    "find_file": (
        "Some file here talks about {text}. Its path?",
        "Go and discover who mentions {text}; a path is what I need.",
    ),
    "find_line": (
        "When I read {file} line by line, at which number do I run into {text}?",
        "{text} begins to appear in {file} on line what?",
    ),
    "file_length": (
        "How many lines deep is {file}?",
        "Measure {file} by its lines and give me the figure.",
    ),
    "read_line": (
        "Put your finger on line {number} of {file}; what is under it?",
        "I have page {file} open at line {number}. Read it to me.",
    ),
    "last_line": (
        "Everything in {file} leads up to one final line. Quote it.",
        "Skip all of {file} but its end; which line remains?",
    ),
    "edit_value": (
        "{file} is to carry {value} for {key} from today.",
        "Repair {file}; {key} must become {value}.",
    ),
    "replace_text": (
        "{old} has no business in {file}; {new} has.",
        "Wherever you meet {old} in {file}, write {new} over it.",
    ),
    "rename_file": (
        "{new} is what {file} should have been called. Make it so.",
        "Swap the label on {file}: it reads {new} now.",
    ),
    "count_files": (
        "Suppose I list {folder} with everything below and cross out all but {extension}. How many files are left?",
        "{extension} files in {folder}: their number?",
    ),
    "largest_file": (
        "Weigh the files in {folder}; which is the {which}?",
        "{which} file of the lot in {folder}?",
    ),
    "sum_column": (
        "All of column {number} in {file}, piled up, makes how much?",
        "Reduce column {number} of {file} to its sum.",
    ),
}
