"""The vocabulary of the generated tasks: words, names, values; a part of it is kept for evaluation.

Nothing here touches files. ``Pool`` draws from a ``random.Random`` only, so a seed always gives the same task.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from nautile.train.tasks.lexicon import Lexicon
from nautile.train.tasks.wording import Wording

__all__ = ["HELD_OUT_WORDS", "TRAIN_WORDS", "Pool"]

_WORDS = """
able absent access account action active actor adapter add address admin advice after agent air alarm album alert align alpha
amber amount anchor angle animal answer apple archive area argument arm array arrow artist aspect asset atlas atom audio audit
author avenue average award axis back backup badge bag balance ball band bank bar barrel base basic basket batch battery beach
beacon beam bean bear bell belt bench beta bicycle bill binary bird bit blade block blue board boat body bolt bone book boot
border bottle bottom bound bowl box branch brand bread break brick bridge brief bright bring broken brook brown browser brush
bucket buffer bug build bundle burst bus button byte cabin cable cache cake call camera camp canal cancel candle canvas cap
capital car carbon card cargo carpet carry case cast castle catalog cell center chain chair chalk chance change channel chapter
charge chart check cheese chest child choice circle city claim class clay clean clear client climb clock close cloth cloud
cluster coach coal coast coat code coffee coin cold collect color column comet command comment common compass compile complete
config connect console contact content context control cookie copper copy coral core corner cotton count country course cover
craft crane cream create credit crew crop cross crowd crown crystal cup current curve custom cycle daemon dance dark data date
dawn day dead deal debug decade decimal deck deep default degree delay delete delta demand dense depth desert design desk detail
device dial diary diff digit dinner direct disk display distance dock doctor document dollar domain door dot double down draft
dragon draw dream dress drift drive driver drop drum dry dump dust duty eager eagle early earth east easy echo edge edit editor
effect egg elbow electric element email empty enable encode end energy engine enter entry envelope epoch equal error escape
estate even event exact example exit expand expire export extra eye fabric face factor fail fair falcon fall family fan farm
fast father fault feature fee feed fence fern fetch fever fiber field figure file fill filter final find finger finish fire
first fish fix flag flame flat fleet flight float flood floor flour flow flower fluid flush focus fog fold folder follow font
food foot force forest fork form format fortune forward fox frame free fresh front frost fruit fuel full function fund fuse
future gadget galaxy game garden gas gate gauge gear general gentle ghost giant gift glass global glove goal gold good graph
grass gravel gray green grid ground group grow guard guess guest guide guitar half hall hammer hand handle happy harbor hard
hash hat hawk head heap heart heat heavy height help hidden high hill history hold hole home honey hook horizon horse hospital
host hotel hour house hub human hundred hunter ice icon idea idle image import inch index info inner input insert install
instance interval invoice iron island item ivory jacket jade job join journal judge juice jump jungle junior just keep kernel
kettle key kick kind king kitchen kite knee knife knob label ladder lake lamp land lane language large laser last late latency
launch law layer layout lazy lead leaf league learn leather left legal lemon length lens letter level lever library license
lift light limit line linen link lion liquid list listen little load loan local lock log logic long loop loss loud low lucky
lunar lunch machine magic magnet mail main major make manager manual map maple marble march margin marine mark market mask
master match material matrix maximum meadow measure meat media medium member memory menu merge message metal meter method metric
middle mile milk mill mind mineral minimum minor mint minute mirror mission mixer mobile mode model modem module moment monitor
month moon morning motion motor mountain mouse move movie multi museum music mutex name narrow nation native nature needle nest
network neural never night noble node noise normal north note notice novel number object ocean octave offer office offset oil
olive open option orange orbit order organ origin other outer output oven owner oxygen pack packet page paint pair palace panel
paper parent park parse parser part partner party pass patch path patient pattern pause payment peak pearl pencil people pepper
period permit person phase phone photo phrase piano picture piece pilot pine pipe pixel place plain plan planet plant plate play
plugin plum pocket point policy pond pool port portal position post potato pound powder power prefix present press price pride
print prior prism private probe process product profile program project prompt proof proxy public pulse pump punch pure purple
push puzzle pyramid quality quantum quarter queen query queue quick quiet quota rabbit race radar radio rail rain random range
rank rapid rate raw reach read ready real reason record recovery red reduce region register relay release remote remove render
rent repair repeat replica report request reserve reset resource result retry return reverse review reward ribbon rice ride
right ring river road robot rocket role roof room root rope rose rotate round route router row royal rubber rule runner rust
safe sail salad salt sample sand satellite scale scan scene schema school science score screen script scroll seal search season
seat second secret section secure seed segment select sender sensor sequence serial series server service session shadow shape
share sharp sheet shelf shell shield ship shoe shop short shoulder side signal silent silk silver simple single sink site size
sketch skill skin sky sleep slice slot slow small smart smile smoke snapshot snow socket soft soil solar solid song sort sound
source south space spark special speed spell sphere spider spirit split spoon spring square stable stack staff stage stairs
stamp standard star start state static station status steam steel step stereo stick stock stone stop storage store storm story
stream street string strong studio style sugar suite sum summer sun supply surface swap sweet swift switch symbol sync system
table tail target task tax tea team temple tempo tenant tennis tent term test text theme theory thread threshold thunder ticket
tide tiger timber time timeout tiny title toast token tool tooth topic torch total touch tower town trace track trade traffic
train transfer travel tray treasure tree trial tribe trigger trip truck trust tube tunnel turbine turn twin type umbrella uncle
under union unique unit update upper urban usage user valid valley value vapor variable vault vector vehicle velvet vendor
verb version vertex vessel video view village violet virtual vision visit voice volume vote wagon wait walk wall warm watch
water wave wealth weather web week weight west whale wheat wheel white wide wild wind window wine wing winter wire wish wolf
wonder wood wool word work worker world worth wrap writer yard year yellow young zebra zero zone
"""

_ALL = tuple(dict.fromkeys(_WORDS.split()))
HELD_OUT_WORDS = tuple(word for word in _ALL if zlib.crc32(word.encode()) % 8 == 0)
TRAIN_WORDS = tuple(word for word in _ALL if zlib.crc32(word.encode()) % 8)

_ONSETS = (
    "b", "bl", "br", "c", "ch", "cl", "cr", "d", "dr", "f", "fl", "fr", "g", "gl", "gr", "h", "j", "k", "kl", "kr", "l", "m",
    "n", "p", "ph", "pl", "pr", "qu", "r", "s", "sh", "sk", "sl", "sm", "sn", "sp", "st", "str", "t", "th", "tr", "v", "w",
    "x", "y", "z",
)  # fmt: skip
_NUCLEI = ("a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ea", "ee", "ia", "io", "oa", "oo", "ou", "y")
_CODAS = (
    "",
    "",
    "",
    "b",
    "ck",
    "d",
    "f",
    "g",
    "k",
    "l",
    "ll",
    "m",
    "n",
    "nd",
    "ng",
    "nk",
    "p",
    "r",
    "rd",
    "s",
    "sh",
    "st",
    "t",
    "x",
)
_HEX = "0123456789abcdef"
_ALPHANUMERIC = "abcdefghijklmnopqrstuvwxyz0123456789"
_DOMAINS = ("com", "org", "net", "io", "dev", "local", "example", "test", "internal")


@dataclass(frozen=True)
class Pool:
    """Random words, names and values. With ``held_out`` half of the words come from the part kept for evaluation; with a
    ``lexicon`` its share of them is made of pieces of the vocabulary, with a ``wording`` requests are composed (training
    only)."""

    rng: random.Random
    held_out: bool = False
    lexicon: Lexicon | None = None
    wording: Wording | None = None

    def word(self) -> str:
        """A dictionary word, or in one case of four an invented one."""
        rng = self.rng
        if self.lexicon is not None and rng.random() < self.lexicon.share:
            return self.lexicon.word(rng)
        if rng.random() < 0.25:
            return self.invented()
        if self.held_out and rng.random() < 0.5:
            return rng.choice(HELD_OUT_WORDS)
        return rng.choice(TRAIN_WORDS)

    def words(self, count: int) -> list[str]:
        """``count`` words; dictionary words mostly (drawn together, which is much faster)."""
        source = HELD_OUT_WORDS if self.held_out and self.rng.random() < 0.5 else TRAIN_WORDS
        chosen = self.rng.choices(source, k=count)
        if count and self.rng.random() < 0.3:
            chosen[self.rng.randrange(count)] = self.invented()
        if self.lexicon is not None:
            share, made = self.lexicon.share, self.lexicon.word
            chosen = [made(self.rng) if self.rng.random() < share else word for word in chosen]
        return chosen

    def invented(self) -> str:
        """A pronounceable word that means nothing: one to three syllables."""
        rng = self.rng
        syllables = rng.choice((1, 2, 2, 2, 3))
        return "".join(rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(syllables))

    def sentence(self, low: int = 3, high: int = 10) -> str:
        """A line of words with a capital and a full stop."""
        text = " ".join(self.words(self.rng.randint(low, high)))
        return text[0].upper() + text[1:] + "."

    def snake(self, low: int = 1, high: int = 3) -> str:
        """snake_case, sometimes with a digit."""
        parts = [self.word() for _ in range(self.rng.randint(low, high))]
        if self.rng.random() < 0.12:
            parts.append(str(self.rng.randint(0, 99)))
        return "_".join(parts)

    def camel(self, low: int = 1, high: int = 3) -> str:
        """CamelCase, sometimes with an acronym in front."""
        text = "".join(self.word().capitalize() for _ in range(self.rng.randint(low, high)))
        return self.rng.choice(("HTTP", "JSON", "XML", "IO", "DB")) + text if self.rng.random() < 0.08 else text

    def number(self) -> str:
        """An integer of one to six digits, small ones more often."""
        return str(self.rng.randrange(10 ** self.rng.choice((1, 2, 2, 3, 3, 4, 5, 6))))

    def version(self) -> str:
        """Such as 1.2.3, 0.9, 2:1.4.5-3+b1 or 1.2.3~rc1-2ubuntu3."""
        rng = self.rng
        text = ".".join(str(rng.randint(0, 30)) for _ in range(rng.choice((2, 3, 3, 3, 4))))
        style = rng.random()
        if style < 0.2:
            text += f"-{rng.randint(1, 9)}"
        elif style < 0.3:
            text += f"-{rng.randint(1, 9)}{rng.choice(('+b1', '+deb12u1', 'ubuntu2', '.1', 'build1'))}"
        elif style < 0.36:
            text = f"{rng.randint(1, 4)}:{text}-{rng.randint(1, 5)}"
        elif style < 0.42:
            text += rng.choice(("rc1", "~rc2", "-beta", "a1", ".dev0"))
        return text

    def date(self) -> str:
        """YYYY-MM-DD."""
        rng = self.rng
        return f"{rng.randint(1995, 2035)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"

    def clock(self) -> str:
        """HH:MM:SS."""
        rng = self.rng
        return f"{rng.randrange(24):02}:{rng.randrange(60):02}:{rng.randrange(60):02}"

    def hexadecimal(self, length: int | None = None) -> str:
        """Lower-case hexadecimal digits, 6 to 12 of them unless told."""
        return "".join(self.rng.choices(_HEX, k=length or self.rng.randint(6, 12)))

    def path(self) -> str:
        """An absolute Unix path, for use as a value only."""
        top = self.rng.choice(("/etc", "/usr/lib", "/usr/share", "/var/log", "/var/lib", "/opt", "/home", "/srv", "/tmp"))
        parts = self.words(self.rng.randint(1, 3))
        return "/".join([top, *parts]) + self.rng.choice(("", "", ".conf", ".log", ".so", ".d", ".pid"))

    def address(self) -> str:
        """An IPv4 address, a host name, or either with a port."""
        rng = self.rng
        if rng.random() < 0.4:
            text = ".".join(str(rng.randint(1, 254)) for _ in range(4))
        else:
            text = ".".join([*self.words(rng.randint(1, 2)), rng.choice(_DOMAINS)])
        return f"{text}:{rng.randint(80, 65000)}" if rng.random() < 0.3 else text

    def value(self) -> str:
        """A setting's value without spaces, quotes, commas or semicolons: number, word, version, path, address, ..."""
        return self.rng.choices(_VALUES, cum_weights=_VALUE_WEIGHTS)[0](self)

    def phrase_value(self) -> str:
        """Two to four words, for the formats that quote their values or end them at the end of the line."""
        words = self.words(self.rng.randint(2, 4))
        style = self.rng.randrange(4)
        if style == 0:
            return " ".join(word.capitalize() for word in words)
        if style == 1:
            return f"{words[0].capitalize()} {self.version()} ({words[1]})"
        return " ".join(words)


_SWITCHES = ("true", "false", "yes", "no", "on", "off", "True", "False", "none", "auto", "null")
_UNITS = ("s", "ms", "m", "h", "d", "MB", "GB", "K", "M", "G", "%", "px")
_WEIGHTED_VALUES: tuple[tuple[Callable[[Pool], str], int], ...] = (
    (Pool.number, 24),
    (Pool.word, 18),
    (Pool.version, 8),
    (Pool.path, 8),
    (Pool.address, 8),
    (lambda pool: pool.rng.choice(_SWITCHES), 5),
    (lambda pool: f"{pool.rng.randint(0, 99)}.{pool.rng.randint(0, 999)}", 5),
    (lambda pool: f"{pool.rng.randint(1, 999)}{pool.rng.choice(_UNITS)}", 5),
    (lambda pool: pool.snake(2, 3), 5),
    (lambda pool: "-".join(pool.words(pool.rng.randint(2, 3))), 4),
    (Pool.hexadecimal, 2),
    (lambda pool: f"{pool.word()}@{pool.word()}.{pool.rng.choice(_DOMAINS)}", 1),
    (lambda pool: f"https://{pool.word()}.{pool.rng.choice(_DOMAINS)}/{pool.word()}", 2),
    (Pool.date, 1),
    (lambda pool: pool.word().upper(), 2),
    (lambda pool: pool.camel(2, 2), 2),
    (lambda pool: "".join(pool.rng.choices(_ALPHANUMERIC, k=pool.rng.randint(4, 10))), 2),
)
_VALUES = tuple(maker for maker, _ in _WEIGHTED_VALUES)
_VALUE_WEIGHTS = tuple(itertools.accumulate(weight for _, weight in _WEIGHTED_VALUES))
