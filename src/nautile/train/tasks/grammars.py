"""The clauses of every kind of task, in the notation of ``wording``: what a request may say at its core.

Data only. A clause has each slot of its kind once; ``{@}`` is the place of those kinds that ask about a file.
"""

from __future__ import annotations

from collections.abc import Mapping

from nautile.train.tasks.wording import Grammar

__all__ = ["GRAMMARS"]

_SHARED: dict[str, str] = {
    "number": "[the number|the count|the [~total|~exact|~overall|~full] number|the [~total|~exact|~overall] count|the quantity|"
    "the amount|the figure for the number]",
    "count": "[count|count up|count|~tot up|~add up|~enumerate|~reckon|~compute the number of|determine the number of|"
    "~calculate the number of|establish the number of|get the number of|find the number of|check the number of|measure the "
    "number of|count all|count all of]",
    "many": "[how many|how many|how many|what number of|how many of the|just how many|exactly how many]",
    "have": "[~contain|~contain|~include|~have|~hold|~mention|~show|~feature|~match|~bear|~display|~list|~use|~comprise|~cite|"
    "~refer to|~name|~quote]",
    "has": "[~contains|~contains|~includes|~has|~holds|~mentions|~shows|~features|~matches|~bears|~displays|~lists|~uses|"
    "~cites|~names|~quotes|~refers to]",
    "having": "[with|with|containing|including|holding|mentioning|that ~contain|that ~contain|that ~include|that ~have|which "
    "~contain|which ~include|that ~mention|that ~hold|that match|matching|featuring|showing|where you find|in which one can "
    "see|in which there is|that ~show|where there is]",
    "occurs": "[occurs|appears|is found|can be found|comes up|is mentioned|exists|is|is contained|is used|is written|can be "
    "seen|stands|is located|is listed|~arises|pops up|happens to be|lives|is visible|sits]",
    "occur": "[occur|appear|come up|exist|show|stand|pop up|~arise|sit|live]",
    "text": "[{text}|{text}|{text}|{text}|the text {text}|the string {text}|the phrase {text}|the characters {text}|the "
    "pattern {text}|the expression {text}|the sequence {text}|the words {text}|the term {text}|the piece of text {text}]",
    "line": "[line|line|line|row]",
    "lines": "[lines|lines|lines|lines|rows|text lines]",
    "key": "[{key}|{key}|{key}|{key}|the key {key}|the setting {key}|the option {key}|the parameter {key}|the entry {key}|the "
    "variable {key}|the field {key}|the property {key}|the setting named {key}|the key called {key}|the attribute {key}|the "
    "config key {key}|{key} (a setting)]",
    "afile": "[file|file|file|document|one|one of the files|one of these files]",
    "seek": "[find|look up|search for|look for|locate|~identify|~discover|~spot|~detect|seek|track down|~hunt for|~trace|"
    "determine|~pinpoint|~uncover]",
    "to": "[to|to|to|to|so that it is|to the value|to the new value]",
    "show": "[show|show me|print|display|read|read me|read out|give|give me|output|~type|~echo|~dump|~quote|~repeat|~fetch|"
    "get|get me|~return|~write out|~cite|~extract|~present|~reproduce|~render|~list|tell me|let me see|~reveal|~transmit]",
    "here": "[in|in|in|inside|within|below|under] {folder}",
    "numeral": "[line {number}|line {number}|line {number}|line {number}|line number {number}|line no. {number}|line "
    "#{number}|row {number}|the line with the number {number}|the line numbered {number}|line nr. {number}]",
    "column": "[column {number}|column {number}|column {number}|column {number}|column number {number}|column no. {number}|"
    "column #{number}|the column with the number {number}|field {number}]",
}  # fmt: skip

_NUMBER = "[the number|the count|a number|the figure|one number|the bare number|digits|an integer]"
_LINE_NUMBER = "[the number|the line number|the number of the line|a number|digits|the bare number]"
_PATH = "[the path|the file name|the name|the name of the file|its path|its name]"
_VALUE = "[the value|its value|the bare value|the plain value|what it is set to]"
_LINE = "[the line|its text|the text|the text of the line|the plain line|the line itself]"


_THING = (
    "[the {what} {name}|the {what} {name}|the {what} {name}|{what} {name}|the {what} called {name}|"
    "the {what} named {name}|{name} (a {what})|{name}, the {what},|a {what} {name}|that {what} {name}|{name}|"
    "{name}|{name}]"
)
_OLD = "[{old}|{old}|{old}|{old}|the text {old}|the string {old}|the words {old}|the part {old}]"
_FILE = "[{file}|{file}|{file}|the file {file}|the file called {file}|the file named {file}]"
_EXTENSION = (
    "[{extension} files|{extension} files|{extension} files|files with the extension {extension}|"
    "files [that end|ending] [in|with|on] {extension}|files whose [name|names] [ends|end] [in|"
    "with] {extension}|files of [the type|type] {extension}|files with the ending {extension}|"
    "files with a name that ends in {extension}|files with the suffix {extension}]"
)


def _grammar(answer: str, phrases: Mapping[str, str] | None = None, topic: str = "", **moods: tuple[str, ...]) -> Grammar:
    return Grammar(answer=answer, topic=topic, phrases={**_SHARED, **(phrases or {})}, **moods)


GRAMMARS: dict[str, Grammar] = {
    "count_lines": _grammar(
        _NUMBER,
        topic="text",
        direct=(
            "<many> <lines> {@} <have> <text>",
            "<many> <lines> {@} are there [with|that <have>|containing] <text>",
            "<many> <lines> [are there with|there are with|do you find with|do we have with|can be found with] <text> {@}",
            "[on|in] <many> <lines> {@} does <text> <occur>",
            "[on|in] <many> <lines> does <text> <occur> {@}",
            "[on|in] <many> <lines> {@} can <text> be [found|seen|read]",
            "[how often|how frequently|how many times] is there a <line> with <text> {@}",
            "what is <number> of <lines> <having> <text> {@}",
            "<text> [is|is found|appears|occurs] [in|on] <many> <lines> {@}",
            "<many> <lines> {@} would [match|be found] if i searched for <text>",
            "<many> [matches|hits|matching lines] [for|of] <text> [are there|do you see|do we have|does one get] {@}",
        ),
        indirect=(
            "<many> <lines> {@} <have> <text>",
            "<many> <lines> there are <having> <text> {@}",
            "[on|in] <many> <lines> {@} <text> <occurs>",
            "[on|in] <many> <lines> <text> <occurs> {@}",
            "<many> <lines> {@} there are <having> <text>",
            "<many> lines a search for <text> {@} [finds|gives|returns|yields]",
        ),
        nominal=(
            "<number> of <lines> {@} <having> <text>",
            "<number> of <lines> <having> <text> {@}",
            "<number> of [matches|matching lines|hits] for <text> {@}",
            "[a count|the count] of the <lines> <having> <text> {@}",
        ),
        imperative=(
            "<count> <lines> {@} <having> <text>",
            "<count> the <lines> {@} <having> <text>",
            "<count> the <lines> <having> <text> {@}",
            "<seek> <text> {@} and [count the lines|say how many lines match|tell me the number of lines|report the count]",
            "[look for|search for] <text> {@} and [~count the lines that match|give the number of lines]",
            "count [in how many|on how many] <lines> {@} <text> <occurs>",
            "count, line by line, how often <text> <occurs> {@}",
        ),
        statement=(
            "[i need|i want|wanted:|needed:] <number> of <lines> <having> <text> {@}",
            "[some|a few|several] <lines> {@} <have> <text>; [how many are there|how many|count them|their number, please]",
            "lines <having> <text> {@}: [how many|count|number]",
        ),
    ),
    "find_definition": _grammar(
        _LINE_NUMBER,
        {"thing": _THING},
        topic="name",
        direct=(
            "[on|at|in] [which|what] line {@} is <thing> [~defined|~declared|~implemented|~introduced|~written|~created]",
            "[on|at|in] [which|what] line is <thing> [~defined|~declared|~implemented|~written|~created] {@}",
            "[where|where exactly|in which place] is <thing> [~defined|~declared|~implemented|~introduced|located] {@}",
            "[which|what] line {@} [~defines|~declares|~implements|starts|~introduces|~creates] <thing>",
            "[which|what] line [~defines|~declares|~implements|starts] <thing> {@}",
            "where {@} [does <thing> start|does <thing> begin|can i find <thing>|do i find <thing>|is <thing>|do we have "
            "<thing>]",
            "where does [the definition|the declaration|the code|the implementation] of <thing> [start|begin] {@}",
            "what is the line [number |] of [the definition of|] <thing> {@}",
        ),
        indirect=(
            "[on|at|in] [which|what] line {@} <thing> is [~defined|~declared|~implemented|~written|~introduced]",
            "[on|at] [which|what] line <thing> is [~defined|~declared|~implemented|~introduced] {@}",
            "where <thing> is [~defined|~declared|~implemented|located|~introduced] {@}",
            "[which|what] line {@} [~defines|~declares|~implements|starts|~introduces] <thing>",
            "where {@} <thing> [starts|begins|is|~resides]",
            "where the [definition|declaration|implementation|code] of <thing> is {@}",
        ),
        nominal=(
            "the line [number |] [of|where] <thing> [is [~defined|~declared|~implemented]|starts|begins] {@}",
            "the [line|line number|place|position|location] of the [definition|declaration] of <thing> {@}",
            "the line {@} that [~defines|~declares|~implements|starts|~introduces] <thing>",
            "the number of the line {@} [on|at] which <thing> is [~defined|~declared]",
        ),
        imperative=(
            "<seek> [the definition of|the declaration of|the implementation of|the start of|] <thing> {@}",
            "<seek> the line {@} [where|on which|at which] <thing> is [~defined|~declared|~implemented]",
            "<seek> the line [where|on which] <thing> [is [~defined|~declared]|starts|begins] {@}",
            "<seek> <thing> {@} and [give me|tell me|report|note|say] the line [number|]",
            "[go|take me|point me|jump|lead me] to [the definition of|the line that defines] <thing> {@}",
        ),
        statement=(
            "i [can't find|am looking for|need|search|want to edit|have to change] <thing> {@}; [which line is it|where is it|"
            "what line is it on|tell me the line|on which line does it start]",
            "<thing> is [~defined|~declared|~implemented|somewhere] {@}; [which line|where|on which line|find it|give the "
            "line]",
            "definition of <thing> {@}",
        ),
    ),
    "lookup_value": _grammar(
        _VALUE,
        topic="key",
        direct=(
            "what is [the [~current|~present|~actual|] value of|the value for|the setting of|] <key> {@}",
            "[what|which] value [does|did|would] <key> have {@}",
            "[what|which] value [has|is given to|is assigned to|belongs to|is set for|is there for|do you see for] <key> {@}",
            "what [is|was|has been] <key> [set|~configured|assigned] to {@}",
            "[how|to what|to which value] is <key> [set|~configured|~defined|~initialised|~specified] {@}",
            "what do [we|you|they] [have|see|find|get|read] for <key> {@}",
            "what does it say [for|about|after|behind|next to|at] <key> {@}",
            "what [comes after|stands after|is written after|is written next to|is behind|follows] <key> {@}",
            "what does {file} [say|give|set|have|~define|list|~specify|contain|~declare|state] for <key>",
            "[what|which] value does {file} [give|~assign|~attach|set] to <key>",
            "what did [someone|we|they|somebody|the admin|the author] [put|write|enter|choose|set] for <key> {@}",
        ),
        indirect=(
            "what <key> is [set to|] {@}",
            "what [the value of|the setting of] <key> is {@}",
            "[which|what] value <key> [has|~takes|gets|~possesses|was given|is set to] {@}",
            "[which|what] value [is assigned|is given|was assigned] to <key> {@}",
            "how <key> is [set|~configured|~defined|~specified] {@}",
            "what {file} [says|has|gives|contains|lists|states] for <key>",
            "what [stands|is written|comes] [after|behind|next to] <key> {@}",
        ),
        nominal=(
            "the [~current|~present|~actual|~configured|] value of <key> {@}",
            "the value [for|behind|belonging to|assigned to|stored under|given to|next to|that belongs to|that goes with] "
            "<key> {@}",
            "[the setting|the entry|the content|the contents] [of|for] <key> {@}",
            "what <key> is set to {@}",
            "<key> {@}",
            "<key> from {file}",
        ),
        imperative=(
            "[look up|find|read|~fetch|get|~retrieve|~extract|~obtain|~grab|check|see|~query|~consult|~dig out|~take|pick] "
            "[the value of|the value for|the setting|] <key> {@}",
            "[look up|find|read|~fetch|get|~retrieve|~extract|~obtain|~grab] [the value of|] <key> from {file}",
            "read {file} and [tell me|report|print|give me|say|note] [the value of|] <key>",
            "[search|look|search through] {@} for <key> and [give me its value|tell me the value|say what it is set to|report "
            "its value]",
            "<seek> <key> {@} and [give me its value|tell me the value|say what it is set to|report it|read its value]",
            "[show|print|display|output] [me |] [the value of|what is set for|] <key> {@}",
        ),
        statement=(
            "<key> {@} [has|must have|should have|has got] [a|some] value; [which one|what is it|tell me|i need it|what]",
            "i [forgot|don't know|can't remember|lost track of|am not sure about] [the value of|] <key> {@}",
            "value [of|for] <key> {@}",
            "someone [set|changed|edited] <key> {@}; what [is it now|is its value|does it say now]",
        ),
    ),
    "find_line": _grammar(
        _LINE_NUMBER,
        topic="text",
        direct=(
            "[on|at|in] [which|what] <line> {@} does <text> [first|] [occur|appear|show|come up] [for the first time|first|]",
            "[on|at|in] [which|what] <line> does <text> [first occur|first appear|occur for the first time|come first] {@}",
            "[which|what] <line> {@} is the first [to ~contain|with|that <has>|to ~mention|containing] <text>",
            "[which|what] is the first <line> {@} [with|that <has>|containing] <text>",
            "where {@} [does <text> first appear|is the first <text>|does <text> occur first|is <text> first used]",
            "what is the [line number|number of the line] of the first [occurrence|appearance|match|hit] of <text> {@}",
            "[which|what] <line> {@} <has> <text> [first|for the first time|before all others]",
        ),
        indirect=(
            "[on|at|in] [which|what] <line> {@} <text> [first occurs|first appears|occurs for the first time|comes up first]",
            "[on|at] [which|what] <line> <text> [first occurs|first appears|is found first|is seen first] {@}",
            "where <text> [first occurs|first appears|comes up first|is first mentioned] {@}",
            "[which|what] <line> {@} is the first [with|that <has>|to ~contain] <text>",
            "which <line> {@} [first|] <has> <text> first",
        ),
        nominal=(
            "the [line number|number] of the first [occurrence|appearance|match|mention|hit] of <text> {@}",
            "the number of the first <line> {@} [with|that <has>|containing] <text>",
            "the first <line> number [with|that <has>|containing] <text> {@}",
            "the first [occurrence|match|mention] of <text> {@}, [by line number|as a line number|its line]",
            "the line number where <text> [first occurs|first appears|is found first|starts to appear] {@}",
        ),
        imperative=(
            "<seek> the first <line> {@} [with|that <has>|containing] <text> [and give its number|; i need the number|and "
            "tell me its number|and report its line number|]",
            "<seek> the first [occurrence|match|mention|appearance] of <text> {@} [and say on which line it is|; which line|"
            "and give the line|]",
            "<seek> <text> {@} [and tell me the first line number|and give me the first line|; which line is the first]",
            "[go|scan|read] {@} [from the start|line by line] until you [meet|find|see] <text>; [which line is it|give the "
            "line number|what line is that]",
        ),
        statement=(
            "<text> [occurs|appears|is] {@}; [on which line first|where first|which line is the first|give the first line "
            "number]",
            "[i want|i need|wanted:] the first line number of <text> {@}",
            "first line with <text> {@}",
        ),
    ),
    "find_file": _grammar(
        _PATH,
        topic="text",
        direct=(
            "[which|what] <afile> [here |of this directory |in this folder |]<has> <text>",
            "[which|what] [file|document] [here |] has a line with <text>",
            "in [which|what] [file|document|place] [is|can i find|do i find|do you find|do we have|does one find] <text>",
            "in [which|what] [file|document] does <text> <occur>",
            "[which|what] of [the|these|all|our|my] [files|documents] <has> <text>",
            "what is the [name|path] of the [file|document] [with|that <has>|containing] <text>",
            "where [is|can i find|do i find|does one find|have i put|did i write] <text>",
            "where in [this directory|the directory|this folder|all these files|the project] is <text>",
            "<text> is in [which|what] [file|document]",
        ),
        indirect=(
            "[which|what] [file|document] [here |] <has> <text>",
            "in [which|what] [file|document] <text> <occurs>",
            "[which|what] of [the|these|all] [files|documents] <has> <text>",
            "where <text> <occurs>",
            "which file has <text> in it",
        ),
        nominal=(
            "the [file|document] [with|that <has>|containing|in which i can find|where one finds|including|which <has>] <text>",
            "the [name|path|file name] of the [file|document] [with|that <has>|containing|which <has>] <text>",
            "the file <text> is in",
        ),
        imperative=(
            "<seek> the [file|document] [with|that <has>|containing|including|which <has>] <text>",
            "[search|look through|go through|scan|check|grep|read] [all files|the files|every file|the directory|the whole "
            "directory|everything here|this folder] for <text> [and tell me the file|and name the file|; which file has it|"
            "and give its path|and say which one it is]",
            "<seek> <text> [in the files|among these files|in this directory|]; [in which file is it|which file is it in|name "
            "the file|give me the file|give the path]",
            "[find|see|check|determine] in which [file|document] <text> <occurs>",
        ),
        statement=(
            "[one|some file|a file|exactly one file] [here |] <has> <text>; [which|which one|find it|name it|what is its name|"
            "where is it]",
            "i [lost|misplaced|forgot|can't find|am looking for|need] the [file|document] [with|that <has>|containing] <text>",
            "<text> [is|must be|should be|has to be] in [some file|one of these files|a file here]; [which|find it|which one]",
            "file with <text>",
        ),
    ),
    "file_length": _grammar(
        _NUMBER,
        topic="file",
        direct=(
            "<many> lines [does {file} have|does {file} contain|does {file} hold|has {file}|are in {file}|are there in {file}|"
            "make up {file}|can be counted in {file}|does {file} comprise|do you count in {file}|is {file} long]",
            "how long is {file} [in lines|, counted in lines|, measured by its lines|if you count lines]",
            "what is [<number> of [all |]lines|the line count|the length in lines] [of|in] {file}",
            "how [big|large|long] is {file}, [in lines|as a number of lines|counting lines]",
            "of how many lines [is {file} made|does {file} consist]",
            "{file} [has|contains|holds|consists of] how many lines",
        ),
        indirect=(
            "<many> lines [{file} has|{file} contains|{file} holds|are in {file}|there are in {file}|{file} ~comprises|{file} "
            "is long]",
            "how long {file} is [in lines|, in lines|, counted in lines]",
            "how many lines of text {file} has",
        ),
        nominal=(
            "<number> of [all |]<lines> [of|in] {file}",
            "the [~total |~overall |]line count [of|for] {file}",
            "the length of {file} [in lines|, in lines|as a number of lines]",
            "[a count|the count] of [all|the|every one of the] lines in {file}",
        ),
        imperative=(
            "<count> [all the lines|all lines|the lines|every line|each line] [of|in] {file}",
            "[~measure|~compute|determine|get|check|report] the [length|line count] of {file} [in lines|, in lines]",
            "[look at|open|take|check|go over] {file} and [count its lines|say how many lines it has|report its line count|"
            "count all lines]",
            "run through {file} and count [each line|its lines]",
        ),
        statement=(
            "{file} has [some|many|a few|a number of] lines; [how many|count them|their number|tell me how many]",
            "i need to know the length of {file}; [count its lines|in lines|how many lines is it]",
            "line count {@}",
            "number of lines {@}",
        ),
    ),
    "read_line": _grammar(
        _LINE,
        direct=(
            "what [is|stands|is written|can be read|do you see|do you read|do we have|is printed] [on|at|in] <numeral> {@}",
            "what does <numeral> {@} [say|contain|hold|read|show|look like|consist of]",
            "what is [<numeral>|the text of <numeral>|the content of <numeral>|the wording of <numeral>] {@}",
            "[which|what] text [is on|is at|stands on|do you find on] <numeral> {@}",
            "what does {file} [say|have|contain|show] [on|at|in] <numeral>",
            "how does <numeral> {@} [read|go]",
        ),
        indirect=(
            "what [is|stands|is written] [on|at|in] <numeral> {@}",
            "what <numeral> {@} [says|contains|is|reads|looks like|holds]",
            "what the text of <numeral> {@} is",
            "what {file} [says|has|contains] [on|at] <numeral>",
            "how <numeral> {@} reads",
        ),
        nominal=(
            "<numeral> {@}",
            "[the text|the content|the contents|the words] of <numeral> {@}",
            "what is on <numeral> {@}",
            "<numeral> from {file}",
        ),
        imperative=(
            "<show> <numeral> {@}",
            "<show> [the text of|the content of|] <numeral> {@}",
            "<show> <numeral> from {file}",
            "[open|take|go to|look at|jump to] {file} and [read|show me|print|give me|tell me] <numeral>",
            "[go to|jump to|look at|scroll to] <numeral> {@} and [read it|tell me what is there|show it|print it|quote it]",
        ),
        statement=(
            "i [need|want|would like] [to see|to read|to have|] <numeral> {@}",
            "<numeral> {@} [interests me|is what i need|is missing in my notes|looks wrong]; [what does it say|read it|show "
            "it]",
        ),
    ),
    "last_line": _grammar(
        _LINE,
        topic="file",
        direct=(
            "what [is|stands|is written|can be read] [on|at|in] the [last|final|very last] line {@}",
            "what is the [last|final|very last|~ultimate|~concluding] line {@}",
            "what does the [last|final|very last] line {@} [say|contain|read|hold]",
            "[how|with which line|with what line] does {file} [end|stop|finish|conclude]",
            "[which|what] line is [the last|at the end|the final one] {@}",
            "[which|what] line [ends|~concludes|comes last in|is last in] {file}",
            "what [is|stands|comes] at the [end|very end] of {file}",
        ),
        indirect=(
            "what [is|stands] on the [last|final] line {@}",
            "what the [last|final|very last] line {@} [is|says|contains]",
            "how {file} [ends|stops|concludes]",
            "which line {@} is the [last|final] [one|]",
            "what comes at the end of {file}",
        ),
        nominal=(
            "the [last|last|final|very last|~concluding|~ultimate] line {@}",
            "[the text|the content] of the [last|final] line {@}",
            "the line that [ends|comes last in|is at the end of] {file}",
            "the [last|final] line from {file}",
        ),
        imperative=(
            "<show> [the [last|last|final|very last] line|the line at the [end|very end]] {@}",
            "[go|jump|scroll] to the end of {file} and [read|show me|give me|print|tell me] the [last|final] line",
            "[look at|check|open] {file} and [read|show me|give me|print|tell me] its [last|final] line",
            "skip to the [last|final] line {@} and [read it|show it|quote it]",
        ),
        statement=(
            "i [need|want|would like] [to see|to read|] the [last|final|very last] line {@}",
            "only the [last|final] line {@} [matters|is of interest|is needed]",
            "{file} ends with [some|a] line; [which one|what does it say|show it|read it]",
        ),
    ),
    "edit_value": _grammar(
        "",
        topic="key",
        imperative=(
            "[set|set|change|change|~update|~switch|~alter|~modify|~turn|~reset|~bring|~move|~raise|~lower|~edit] [the value "
            "of|] <key> {@} <to> {value}",
            "[set|change|~update|~switch|~alter|~modify|~reset|~edit] [the value of|] <key> <to> {value} {@}",
            "[give|~hand] <key> the [new |]value {value} {@}",
            "[give|~hand] <key> {@} the [new |]value {value}",
            "[assign|~attach] [the value|] {value} to <key> {@}",
            "make <key> {@} [equal to|be|have the value] {value}",
            "make <key> [equal to|have the value] {value} {@}",
            "[write|put|enter|use|~insert|store] {value} [as the value of|as the new value of|for|as the value for] <key> {@}",
            "[replace|~overwrite] the [old |current |] value of <key> {@} [with|by] {value}",
            "[edit|~update|modify|change|open] {file} so that <key> [is|has the value|becomes|gets the value|is set to|is "
            "now] {value}",
            "[edit|open|modify|update] {file} and [set|change|switch] <key> <to> {value}",
            "[edit|update|in] {file}: <key> [should be|must be|is to be|gets|becomes] {value}",
            "ensure that <key> {@} [is|has the value|is set to] {value}",
            "~configure <key> [as|with|to be] {value} {@}",
            "have <key> {@} set to {value}",
        ),
        statement=(
            "<key> {@} [should|must|has to|needs to|ought to|is to|shall] [be|become|have the value|get the value|be set to|be "
            "changed to] {value}",
            "[i want|we want|i need|we need|i'd like|i would like] <key> [to be|set to|changed to|to have the value] {value} "
            "{@}",
            "the value of <key> {@} is [wrong|outdated|too old|not right]; [it should be|change it to|make it|it must be|set "
            "it to|use] {value}",
            "the [new|right|correct|desired|wanted] value [of|for] <key> {@} is {value}",
            "{value} is the [right|new|correct|desired] value [for|of] <key> {@}",
            "there is a wrong value for <key> {@}; [it should be|the right one is|make it] {value}",
            "new value [for|of] <key> {@}: {value}",
            "<key> {@} is {value} [from today|as of now|from this day]",
        ),
    ),
    "replace_text": _grammar(
        "",
        {"old": _OLD},
        topic="old",
        imperative=(
            "[replace|replace|~swap out|~overwrite|~exchange|~substitute] <old> {@} [with|by] {new}",
            "[replace|replace|~overwrite|~substitute] <old> [with|by] {new} {@}",
            "[change|turn|~convert|~alter|~rewrite|~transform|~modify|~correct|~edit] <old> {@} [to|into] {new}",
            "[change|turn|~convert|~alter|~rewrite|~transform|~modify|~correct] <old> [to|into] {new} {@}",
            "[write|put|use|~insert|~place|~type|~enter|have] {new} [instead of|in place of|rather than|where it says|where "
            "you find|where there is|in the position of] <old> {@}",
            "[remove|delete|drop|take out|cut] <old> {@} and [write|put|insert|use] {new} [instead|there|in its place|at that "
            "spot]",
            "[find|look for|locate|search for] <old> {@} and [replace it with|make it|change it to|turn it into|overwrite it "
            "with] {new}",
            "[fix|correct|edit|repair|update|change] {file}: <old> [should be|must be|becomes|is to be|->|=>|to] {new}",
            "[edit|change|update|modify] {file} so that <old> [becomes|turns into|is replaced with|is changed to] {new}",
            "[edit|change|update|modify] {file} so that it [says|has|contains|shows] {new} [instead of|in place of|rather "
            "than] <old>",
            "[in the spot where|at the place where] {file} [has|contains|shows] <old>, [write|put|use] {new}",
            "[swap|exchange|trade] <old> for {new} {@}",
            "let {file} [contain|have|say|show] {new} [instead of|in place of|rather than] <old>",
            "use {new} as a replacement for <old> {@}",
        ),
        statement=(
            "<old> {@} [should|must|has to|needs to|ought to] [be|become|be replaced by|be replaced with|be changed to|turn "
            "into] {new}",
            "{@} it [says|reads] <old>, but it [should|must|ought to] [say|be|read] {new}",
            "{new} should [stand|be|appear|go|be written] {@} [instead of|in place of|where now there is|rather than] <old>",
            "instead of <old>, {file} [should|must|ought to] [say|have|contain|show] {new}",
            "<old> {@} is [wrong|a mistake|a typo|an error|not right]; [the right text is|it should be|correct is|make it|it "
            "must be] {new}",
            "[i want|we want|i need|i'd like] <old> {@} [replaced with|replaced by|changed to|turned into|to be] {new}",
            "i [would rather have|prefer|want|need] {new} [instead of|in place of|rather than] <old> {@}",
            "{file} [wrongly says|has] <old> [instead of|where it should be] {new}; [fix that|correct it|please fix it|change "
            "it]",
            "there is [a mistake|a typo|an error|something wrong] {@}: <old> [should be|must be|has to be|instead of] {new}",
            "<old> -> {new} {@}",
        ),
    ),
    "rename_file": _grammar(
        "",
        {"file": _FILE},
        topic="file",
        imperative=(
            "[rename|rename|~move|~retitle|~rechristen] <file> [to|to|as|into|so that it is called] {new}",
            "change the [name|file name|path|title] of <file> [to|into] {new}",
            "give <file> the [new |] name {new}",
            "[call|name] <file> {new} [instead|in the future|after this|]",
            "use {new} as the [new |]name [of|for] <file>",
            "let {new} be the [new |]name [of|for] <file>",
            "[replace|change|swap] the name {file} [with|by|for] {new}",
            "~move <file> so that [its path|its name|it] is {new}",
            "edit the name of <file>: it [should be|becomes|is] {new}",
            "make <file> have the name {new}",
        ),
        statement=(
            "<file> [should|must|has to|needs to|ought to|is to|shall] be [called|named|renamed to|renamed as|titled] {new}",
            "<file> [has|got|was given] the wrong name; [it should be|call it|the right one is|rename it to|make it] {new}",
            "the [new|right|better|correct] name [of|for] <file> is {new}",
            "[i want|we want|i need|i'd like|i would like] <file> [to be called|to have the name|renamed to|to be named] {new}",
            "{new} is a better name for <file>; [rename it|change it|please rename]",
            "<file> [is called|has the name] something else now: {new}; rename it",
            "{file} -> {new}, [rename it|rename|a rename]",
            "{new} should be the name of <file>",
        ),
    ),
    "count_files": _grammar(
        _NUMBER,
        {"ext": _EXTENSION},
        direct=(
            "<many> <ext> [are|are there|exist|can be found|do you see|do we have|lie] <here>",
            "<many> <ext> does {folder} [have|contain|hold|include]",
            "what is <number> of <ext> <here>",
            "<here>, <many> <ext> [are there|do you find|exist]",
        ),
        indirect=(
            "<many> <ext> [are|there are|exist|one finds|you find] <here>",
            "<many> <ext> {folder} [has|contains|includes]",
        ),
        nominal=(
            "<number> of <ext> <here>",
            "[a count|the count] of [all |the |]<ext> <here>",
        ),
        imperative=(
            "<count> [all |the |]<ext> <here>",
            "<seek> all <ext> <here> and [count them|tell me how many there are|give their number|report the count]",
            "[look|go|check] <here> and count [all |the |]<ext>",
            "count, <here>, [all |the |]<ext>",
        ),
        statement=(
            "there are [some|several|a few] <ext> <here>; [how many|count them|tell me how many]",
            "[number|count] of <ext> <here>",
        ),
    ),
    "largest_file": _grammar(
        _PATH,
        direct=(
            "[which|what] file <here> is the {which} [one|of all|by size|in size|]",
            "[which|what] is the {which} file <here>",
            "[which|what] [file|one] is the {which} [of the files|among the files|of all files|] <here>",
            "what is the [name|path] of the {which} file <here>",
            "what [is the {which} file called|is the {which} file's name] <here>",
            "<here>, [which|what] file is the {which} [one|]",
            "[which|what] of the files <here> is the {which}",
        ),
        indirect=(
            "[which|what] file <here> is the {which} [one|of all|]",
            "[which|what] the {which} file <here> is",
            "which of the files <here> is the {which}",
        ),
        nominal=(
            "the {which} file <here>",
            "the [name|path] of the {which} file <here>",
            "the {which} of [all|the] files <here>",
            "the file <here> that is the {which}",
        ),
        imperative=(
            "<seek> the {which} file <here>",
            "<seek> the {which} of [all |the |]files <here>",
            "[compare|look at|check] [the sizes of |] the files <here> and [name|tell me|give me|report] the {which}",
            "<here>, <seek> the {which} file",
            "sort the files <here> by size and [tell me|give me|name] the {which}",
        ),
        statement=(
            "one of the files <here> is the {which}; [which|which one|name it|find it]",
            "[i need|i'm interested in|i want] [only |] the {which} file <here>",
        ),
    ),
    "sum_column": _grammar(
        _NUMBER,
        direct=(
            "what is the [sum|total|grand total|sum total] of [the numbers in |the values in |all values of |all numbers in |]"
            "<column> {@}",
            "what do [the numbers|the values|all numbers|all values|the entries] [in|of] <column> {@} [add up to|sum to|"
            "amount to|sum up to]",
            "what does <column> {@} [add up to|sum to|amount to|sum up to]",
            "how much [is|makes|do you get for] the sum of <column> {@}",
            "what [sum|total] [do you get for|does one get for|has] <column> {@}",
        ),
        indirect=(
            "what the [sum|total] of [the numbers in |the values in |] <column> {@} is",
            "what <column> {@} [adds up to|sums to|amounts to]",
            "what [all values|the values|the numbers] [in|of] <column> {@} [add up to|sum to]",
        ),
        nominal=(
            "the [sum|sum|total|grand total] [of|over|for] [the numbers in |the values in |all values of |all entries of |"
            "]<column> {@}",
            "the sum you get [by adding up|when you add up] <column> {@}",
        ),
        imperative=(
            "[sum|sum up|add up|add together|total|~accumulate] [the numbers in |the values in |all values of |all numbers of "
            "|the entries of |]<column> {@}",
            "[compute|calculate|determine|work out|get|find|evaluate|form|~derive] the [sum|total] [of|over] [the numbers in |"
            "the values in |]<column> {@}",
            "[add|take] all [numbers|values|entries] [of|in] <column> {@} [together|and sum them]",
            "[open|read|take] {file} and [add up|sum|sum up|total] <column>",
        ),
        statement=(
            "<column> {@} [holds|has|contains] numbers; [add them up|sum them|what is their sum|i need their sum]",
            "[sum|total] of <column> {@}",
        ),
    ),
}
