"""Run tests that `make test` leaves out, and write down what came out: counts, seconds, failures, commit and machine.

    python bench/suite.py [--out bench/results/suite_one_answer.json] -- -m slow tests/engine/test_one_answer.py

What follows `--` goes to pytest. Exit status: pytest's. A result is written whether tests pass or fail.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nautile.evals.tools import commit, device_name


class Tally:
    """What pytest reports, by outcome; a test that errs in its set-up or its end counts as failed."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Hook: one phase (set-up, call, end) of one test."""
        name = report.nodeid
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration
        worst = self.outcomes.get(name, "")
        if report.failed or worst == "failed":
            self.outcomes[name] = "failed"
        elif report.skipped or report.when == "call":
            self.outcomes[name] = report.outcome

    def summary(self) -> dict[str, Any]:
        """Counts, the failed tests by name, and seconds of the slowest."""
        counts = {kind: sum(found == kind for found in self.outcomes.values()) for kind in ("passed", "failed", "skipped")}
        failed = sorted(name for name, found in self.outcomes.items() if found == "failed")
        slowest = sorted(self.seconds, key=self.seconds.__getitem__, reverse=True)[:10]
        return {**counts, "failures": failed, "slowest_seconds": {name: round(self.seconds[name], 1) for name in slowest}}


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("pytest", nargs="+", help="after --: arguments of pytest")
    options = parser.parse_args()
    tally, began, tested = Tally(), time.time(), commit()  # the commit before, not after an hour
    status = int(pytest.main([*options.pytest, "-p", "no:cacheprovider"], plugins=[tally]))
    result = {
        "arguments": options.pytest,
        "device": device_name(),
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "commit": tested,
        "seconds": round(time.time() - began, 1),
        "exit_status": status,
        **tally.summary(),
    }
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
