"""What there is to run on a card, in calls that end in time: tests, sanitizer, variants of kernels, times, whole models.

    python bench/gpu_session.py kernels --out DIR    # tests, variants, times of kernels beside their peers
    python bench/gpu_session.py flash --out DIR      # V4-Flash whole and as a slice, prompts up to a million tokens
    python bench/gpu_session.py more --out DIR       # skewed routing, Pro's slice, the curve of lengths
    python bench/gpu_session.py rehearsal --out DIR  # on any machine: the same machinery on tiny shapes

Each part is a process of its own with a limit of its own; one that fails or hangs is ended and the next begins. session.json
says after every part what became of it; what a part measures it writes as it goes. The parts of a call together take nine
minutes at most (``--seconds``), and leave six files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FLASH = "bench/flash_decode.py --commit {commit} --out {out}"
KERNELS = "-m nautile.cli bench kernels --commit {commit} --out {out}"
TESTS = "bench/gpu_session.py tests --out {out}"
ON_CARD = ("tests/gpu", "tests/engine/test_gpu_runner.py", "tests/engine/test_one_answer_gpu.py")


@dataclass(frozen=True)
class Part:
    """One process: python with these arguments, as a shell would split them, in which {out} and {commit} are filled in.
    ``before``: what python runs in."""

    name: str
    arguments: str
    seconds: int
    before: tuple[str, ...] = ()

    def words(self, out: Path, commit: str) -> list[str]:
        """The arguments."""
        return shlex.split(self.arguments.format(out=shlex.quote(str(out)), commit=shlex.quote(commit)))


SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
PARTS = {
    "kernels": (
        Part("tests", TESTS, 170),
        Part("variants", KERNELS + "/variants.json --variants", 120),
        Part("times", KERNELS + "/kernels.json", 130),
        Part("sanitizer", TESTS + "/memcheck --paths tests/gpu/test_sparse_attention.py --match hoppers", 100, SANITIZER),
    ),
    "flash": (
        Part("slice", FLASH + "/slice.json --layers 6 --case 4096x1 4096x32 --chained 0 1 --check --profile", 150),
        Part("flash", FLASH + "/flash.json --case 4096x1 1000000x1 4096x8 --ahead 0 1 2 --steps 40 --check", 250),
        Part("prompts", FLASH + "/prompts.json --card-gb 80 --case --prefill 4096 65536 1048576", 140),
    ),
    "more": (
        Part("zipf", FLASH + "/zipf.json --zipf 1 --case 4096x1 4096x8 --ahead 0 1 --steps 40", 130),
        Part("pro", FLASH + "/pro.json --model pro --layers 6 --experts 256 --case 4096x1 4096x32", 150),
        Part("curve", FLASH + "/curve.json --case 16384x1 65536x1 262144x1 --ahead 1 --steps 40", 130),
        Part("machine", "bench/flash_machine.py --commit {commit} --out {out}/machine.json", 90),
    ),
    "rehearsal": (
        Part("tests", TESTS + " --paths tests/gpu/test_fp4_experts.py", 120),
        Part("hangs", "-c \"import time; print('here', flush=True); time.sleep(99)\"", 2),
        Part("fails", "-c \"raise SystemExit('on purpose')\"", 20),
        Part("tiny", FLASH + "/tiny.json --model tiny --case 300x1 --prefill 600 --chunk 200 --slice 64 --steps 2", 60),
    ),
}


def session(mode: str, out: Path, commit: str, limit: float) -> list[dict[str, Any]]:
    """Run the parts of a mode within ``limit`` seconds; returns what became of each."""
    began, found = time.monotonic(), []
    out.mkdir(parents=True, exist_ok=True)
    with (out / "session.log").open("ab") as log:
        for part in PARTS[mode]:
            left = limit - (time.monotonic() - began)
            found.append(run(part, out, commit, min(part.seconds, left), log))
            text = json.dumps({"mode": mode, "commit": commit, "parts": found}, indent=1)
            (out / "session.json").write_text(text + "\n", encoding="utf-8")
            print(json.dumps({key: value for key, value in found[-1].items() if key != "tail"}), flush=True)
    return found


def run(part: Part, out: Path, commit: str, seconds: float, log: Any) -> dict[str, Any]:
    """One part; its process group is ended at its limit."""
    if seconds < 1:
        return {"part": part.name, "outcome": "no time left", "seconds": 0.0, "tail": ""}
    if part.before and shutil.which(part.before[0]) is None:
        return {"part": part.name, "outcome": f"{part.before[0]} is not installed", "seconds": 0.0, "tail": ""}
    words = part.words(out, commit)
    log.write(f"\n=== {part.name}: {' '.join(words)}\n".encode())
    log.flush()
    first = log.tell()
    start = time.monotonic()
    process = subprocess.Popen(
        [*part.before, sys.executable, *words], cwd=ROOT, stdout=log, stderr=log, env=_environment(), start_new_session=True
    )
    try:
        code = process.wait(seconds)
        outcome = "passed" if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        outcome = f"ended after {seconds:.0f} s"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with Path(log.name).open("rb") as read:
        read.seek(first)
        tail = read.read()[-4000:].decode(errors="replace")
    return {"part": part.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1), "tail": tail}


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


# Tests --------------------------------------------------------------------------------------------------------------


class Timed:
    """A plugin for pytest: a limit for each test, and a line of JSON for each as it ends."""

    def __init__(self, path: Path, seconds: int) -> None:
        self.path, self.seconds, self.failed = path, seconds, 0
        path.write_text("", encoding="utf-8")

    def pytest_runtest_protocol(self, item: Any) -> None:
        """Arm the alarm; a test that does not let Python run is ended with the whole part instead."""
        del item
        signal.signal(signal.SIGALRM, self._alarm)
        signal.alarm(self.seconds)

    def _alarm(self, *_: object) -> None:
        raise TimeoutError(f"this test took longer than {self.seconds} s")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note what became of it."""
        if report.when == "teardown":
            signal.alarm(0)
        if report.when == "call" or report.outcome != "passed":
            line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            if report.outcome == "failed":
                self.failed += 1
                line["text"] = str(report.longrepr)[-1500:]
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def tests(out: Path, paths: list[str], match: str, seconds: int) -> int:
    """Run them in this process, the compilation for other machines left out; results in tests.jsonl."""
    import pytest  # noqa: PLC0415

    out.mkdir(parents=True, exist_ok=True)
    timed = Timed(out / "tests.jsonl", seconds)
    words = [*paths, "-q", "--no-header", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short", "--maxfail=40"]
    words += ["--deselect", "tests/gpu/test_compile.py", "--deselect", "tests/gpu/test_compile_decode.py"]
    code = pytest.main([*words, *(["-k", match] if match else [])], plugins=[timed])
    outcomes = [json.loads(line)["outcome"] for line in _lines(timed.path)]
    print({outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}, flush=True)
    return int(code)


def _lines(path: Path) -> Iterator[str]:
    yield from path.read_text(encoding="utf-8").splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=(*PARTS, "tests"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--seconds", type=float, default=540, help="for all parts together")
    parser.add_argument("--paths", nargs="*", default=list(ON_CARD), help="of mode tests")
    parser.add_argument("--match", default="", help="of mode tests: names that contain this")
    parser.add_argument("--each", type=int, default=60, help="seconds that one test may take")
    options = parser.parse_args()
    out = options.out.resolve()
    if options.mode == "tests":
        raise SystemExit(tests(out, options.paths, options.match, options.each))
    found = session(options.mode, out, options.commit, options.seconds)
    print(json.dumps({part["part"]: part["outcome"] for part in found}, indent=1))
    raise SystemExit(0 if all(part["outcome"] == "passed" for part in found) else 1)


if __name__ == "__main__":
    main()
