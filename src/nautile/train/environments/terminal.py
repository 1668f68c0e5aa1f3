"""Terminal-shaped, held out: an instruction, a machine, a hidden test that runs the program left behind on other inputs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import ClassVar

from nautile.train.environment import Action, Environment, Grade, Outcome, Script, Shape

__all__ = ["StatusReport"]

_PATHS = ("/", "/login", "/search", "/items", "/cart", "/api/v1/users", "/health")
_CODES = (200, 200, 200, 200, 301, 404, 404, 500, 503)


def _log(rng: random.Random, lines: int) -> str:
    rows = []
    for _ in range(lines):
        address = ".".join(str(rng.randrange(1, 255)) for _ in range(4))
        rows.append(f'{address} "GET {rng.choice(_PATHS)}" {rng.choice(_CODES)} {rng.randrange(80, 9000)}')
    return "".join(f"{row}\n" for row in rows)


def _report(log: str, floor: int) -> str:
    """What the program must print: status codes from ``floor`` on with their counts, most frequent first, ties by code."""
    counts = Counter(int(line.split()[3]) for line in log.splitlines())
    ranked = sorted((code for code in counts if code >= floor), key=lambda code: (-counts[code], code))
    return "".join(f"{code} {counts[code]}\n" for code in ranked)


class StatusReport(Environment):
    """Write a shell script that reports the status codes of an access log; it is run on logs that nobody has shown."""

    kind: ClassVar[str] = "terminal_status_report"
    shape: ClassVar[Shape] = "terminal"
    held_out: ClassVar[bool] = True

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rng = random.Random(f"{self.kind}:{seed}")
        self.script = rng.choice(("report.sh", "summary.sh", "codes.sh"))
        self.floor = rng.choice((200, 300, 400))
        self.log = _log(rng, rng.randrange(20, 60))
        self.hidden = [_log(rng, count) for count in (1, 37, 200)]

    @property
    def prompt(self) -> str:
        """See ``Environment.prompt``."""
        return (
            "access.log has one request a line: address, request in quotes, status code, bytes. Write a shell script "
            f"{self.script} that takes the path of such a log as its argument and prints every status code from {self.floor} "
            "on with its count, as in `404 17`, most frequent first and equal counts by code. It will be run with sh on other "
            "logs."
        )

    def files(self) -> Mapping[str, bytes]:
        """See ``Environment.files``."""
        return {"access.log": self.log.encode()}

    def grade(self, outcome: Outcome) -> Grade:
        """Run the script on logs of one, 37 and 200 lines and compare what it prints with what it should."""
        if self.script not in outcome.files():
            return Grade(0.0, f"there is no {self.script}")
        for log in self.hidden:
            ran = outcome.hidden_run(["sh", self.script, "hidden.log"], {"hidden.log": log.encode()})
            if not ran.ok or ran.stdout != _report(log, self.floor):
                return Grade(0.0, f"{self.script} printed something else for a log of {log.count(chr(10))} lines")
        return Grade(1.0, "done")

    def _with(self, name: str, body: str, answer: str = "done") -> Script:
        command = f"cat > {self.script} <<'END'\n{body}\nEND"
        return Script(name, (Action("run", {"command": command}),), answer)

    def expert(self) -> Script:
        """One line of awk and sort."""
        program = f"awk '$4 >= {self.floor} {{n[$4]++}} END {{for (c in n) print c, n[c]}}' \"$1\" | sort -k2,2nr -k1,1n"
        return self._with("expert", program)

    def adversaries(self) -> tuple[Script, ...]:
        """No script, the right output for the log that was shown, a script that only succeeds, one without the order."""
        shown = _report(self.log, self.floor)
        plain = f"awk '$4 >= {self.floor} {{n[$4]++}} END {{for (c in n) print c, n[c]}}' \"$1\" | sort -k1,1nr -k2,2n"
        swap = Action("run", {"command": f"printf '%s' '{shown}' > out; ln -s out {self.script}"})
        return (
            Script("only claims", (), f"I have written {self.script}."),
            Script("answers instead", (), shown),
            self._with("the shown log's report", f"cat <<'X'\n{shown}X"),
            self._with("exits with success", "exit 0"),
            self._with("another order", plain),
            Script("a link", (swap,), "done"),
        )
