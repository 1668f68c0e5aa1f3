"""What there is to run on a card, in calls that end in time: tests, sanitizer, variants of kernels, times, whole models.

    python bench/gpu_session.py kernels --out DIR    # tests, variants, times of kernels beside their peers
    python bench/gpu_session.py flash --out DIR      # V4-Flash whole and as a slice, prompts up to a million tokens
    python bench/gpu_session.py more --out DIR       # skewed routing, Pro's slice, the curve of lengths
    python bench/gpu_session.py rehearsal --out DIR  # on any machine: the same machinery on tiny shapes

Each part is a process of its own with a limit of its own; one that fails or hangs is ended and the next begins. One whose
file does not grow for a while hangs in a single kernel: it is started again behind the case or test that it hung in.
session.json says after every part what became of it; what a part measures it writes as it goes. The parts of a call together
take nine minutes at most (``--seconds``), the most valuable first, and leave eight files at most.
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
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FLASH = "bench/flash_decode.py --commit {commit} --out {out}"
KERNELS = "bench/kernels.py --commit {commit} --out {out}"
TESTS = "bench/gpu_session.py tests --out {out}"
LOST = 3  # exit status: a fault of a kernel, after which the card does not answer this process
LOG = 2 << 20  # bytes of one part's output that are kept
ON_CARD = ("tests/gpu", "tests/engine/test_gpu_runner.py", "tests/engine/test_one_answer_gpu.py")


@dataclass(frozen=True)
class Part:
    """One process: python with these arguments, as a shell would split them, in which {out}, {commit} and {ways} are filled
    in. ``before``: what python runs in. ``watch``: the file in OUT that grows; after ``stall`` seconds without that the process
    is started again with --resume."""

    name: str
    arguments: str
    seconds: int
    before: tuple[str, ...] = ()
    watch: str = ""
    stall: int = 0

    def words(self, out: Path, commit: str, ways: str) -> list[str]:
        """The arguments."""
        return shlex.split(self.arguments.format(out=shlex.quote(str(out)), commit=shlex.quote(commit), ways=ways))


SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
PARTS = {
    "kernels": (
        Part("variants", KERNELS + "/variants.json --variants", 190, watch="variants.json", stall=40),
        Part("times", KERNELS + "/kernels.json", 110, watch="kernels.json", stall=50),
        Part("tests", TESTS + " --shards 4 --seconds 143", 150),
        Part("sanitizer", TESTS + "/memcheck --paths tests/gpu/test_sparse_attention.py --match hoppers", 80, SANITIZER),
    ),
    "flash": (
        *(
            Part(way, FLASH + f"/slice.json --resume --layers 6 --case 4096x1 --ways {way} --check", 40)
            for way in ("plain", "all", "vector")
        ),
        Part("flash", FLASH + "/flash.json --case 4096x1 1000000x1 4096x8 --ahead 1 0 --steps 40 --ways {out}/slice.json", 180),
        Part("prompts", FLASH + "/prompts.json --card-gb 80 --case --prefill 4096 65536 1048576", 130),
        Part("check", FLASH + "/check.json --card-gb 80 --case --check", 80),
    ),
    "more": (
        *(
            Part(way, FLASH + f"/slice.json --resume --layers 6 --case 4096x1 --ways {way} --check --profile", 40)
            for way in ("direct", "chained", "all")
        ),
        Part("batch", FLASH + "/slice.json --resume --layers 6 --case 4096x32 --ways plain chained --profile", 50),
        Part("zipf", FLASH + "/zipf.json --zipf 1 --case 4096x1 4096x8 --ahead 0 1 --steps 40 --ways {ways}", 100),
        Part("curve", FLASH + "/curve.json --case 16384x1 65536x1 262144x1 --ahead 1 --steps 40 --ways {ways}", 100),
        Part("pro", FLASH + "/pro.json --model pro --layers 6 --experts 256 --case 4096x1 4096x32 --ways {ways}", 90),
        Part("machine", "bench/flash_machine.py --commit {commit} --out {out}/machine.json", 60),
    ),
    "rehearsal": (
        Part("tests", TESTS + " --shards 2 --seconds 110 --paths tests/gpu/test_fp4_experts.py", 120),
        Part("hangs", "-c \"import time; print('here', flush=True); time.sleep(99)\"", 2),
        Part("stalls", "-c \"import sys, time; time.sleep(0 if '--resume' in sys.argv else 99)\"", 20, watch="none", stall=1),
        Part("fails", "-c \"raise SystemExit('on purpose')\"", 20),
        Part("talks", "-c \"print('x' * 9000000)\"", 20),
        *(
            Part(f"tiny {way}", FLASH + f"/slice.json --resume --model tiny --case 90x1 --ways {way} --check --steps 2", 60)
            for way in ("plain", "all")
        ),
        Part("lost", "-c \"import sys; sys.exit(0 if '--resume' in sys.argv else 3)\"", 20),
        Part("like", FLASH + "/tiny.json --model tiny --case 300x1 --prefill 600 --chunk 200 --slice 64 --steps 2 "
             "--ways {out}/slice.json", 60),
    ),
}  # fmt: skip


def session(mode: str, out: Path, commit: str, limit: float, ways: str) -> list[dict[str, Any]]:
    """Run the parts of a mode within ``limit`` seconds; returns what became of each."""
    began, found = time.monotonic(), []
    out.mkdir(parents=True, exist_ok=True)
    with (out / "session.log").open("ab") as log:
        for part in PARTS[mode]:
            left = limit - (time.monotonic() - began)
            found.append(run(part, part.words(out, commit, ways), out, min(part.seconds, left), log))
            text = json.dumps({"mode": mode, "commit": commit, "parts": found}, indent=1)
            (out / "session.json").write_text(text + "\n", encoding="utf-8")
            print(json.dumps({key: value for key, value in found[-1].items() if key != "tail"}), flush=True)
    return found


def run(part: Part, words: list[str], out: Path, seconds: float, log: Any) -> dict[str, Any]:
    """One part, whose output goes to the log when it has ended."""
    if seconds < 1:
        return {"part": part.name, "outcome": "no time left", "seconds": 0.0, "tail": ""}
    if part.before and shutil.which(part.before[0]) is None:
        return {"part": part.name, "outcome": f"{part.before[0]} is not installed", "seconds": 0.0, "tail": ""}
    start = time.monotonic()
    with tempfile.TemporaryFile() as own:
        watch = out / part.watch if part.watch else None
        outcome = supervised([*part.before, sys.executable, *words], own, seconds, watch, part.stall)
        size = own.seek(0, os.SEEK_END)
        own.seek(max(0, size - LOG))
        text = own.read()
    log.write(f"\n=== {part.name}: {' '.join(words)}\n".encode() + text)
    log.flush()
    spent = round(time.monotonic() - start, 1)
    return {"part": part.name, "outcome": outcome, "seconds": spent, "tail": text[-4000:].decode(errors="replace")}


def supervised(command: list[str], log: Any, seconds: float, watch: Path | None = None, stall: float = 0) -> str:
    """Run it; says what became of it. Its process group is ended at the limit. It is started again with --resume when it has
    ended with status 3 (the card no longer answers it), and when ``watch`` has not grown for ``stall`` seconds."""
    end, again = time.monotonic() + seconds, 0
    while True:
        process = subprocess.Popen(
            [*command, "--resume"] if again else command,
            cwd=ROOT, stdout=log, stderr=log, env=_environment(), start_new_session=True,
        )  # fmt: skip
        outcome = _watched(process, end, watch, stall)
        if not outcome and time.monotonic() > end - 5:
            outcome = "limit"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if outcome:
            outcome = outcome if outcome != "limit" else f"ended after {seconds:.0f} s"
            return f"{outcome}, started again {again} times" if again else outcome
        again += 1


def _watched(process: subprocess.Popen[bytes], end: float, watch: Path | None, stall: float) -> str:
    """How the process ended, "limit" at the limit, nothing when its file has not changed for ``stall`` seconds."""
    last = time.time()
    while (code := process.poll()) is None:
        if time.monotonic() > end:
            return "limit"
        if watch is not None:
            with contextlib.suppress(OSError):
                last = max(last, watch.stat().st_mtime)
            if time.time() - last > stall:
                return ""
        time.sleep(0.1)
    return {0: "passed", LOST: ""}.get(code, f"exit status {code}")


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


# Tests --------------------------------------------------------------------------------------------------------------


class Timed:
    """A plugin for pytest: its share of the tests, a limit for each of them, and a line of JSON as each begins and ends."""

    def __init__(self, path: Path, seconds: int, shard: tuple[int, int], resume: bool) -> None:
        """``resume``: what the file names has been run, or hung."""
        self.path, self.seconds, self.shard = path, seconds, shard
        self.done = {json.loads(line)["test"] for line in _lines(path)} if resume and path.exists() else set[str]()
        if not resume:
            path.write_text("", encoding="utf-8")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep those of this shard that have not been run. Tests of one function stay together: they share kernels."""
        number, count = self.shard
        items[:] = [
            item for item in items
            if item.nodeid not in self.done and zlib.crc32(item.nodeid.split("[")[0].encode()) % count == number
        ]  # fmt: skip

    def pytest_runtest_protocol(self, item: Any) -> None:
        """Arm the alarm; a test that does not let Python run is ended with its process instead."""
        self._write({"test": item.nodeid, "outcome": "began"})
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
                line["text"] = str(report.longrepr)[-1500:]
            self._write(line)
            if report.outcome == "failed" and not _card_lives():
                os._exit(LOST)

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _card_lives() -> bool:
    import torch  # noqa: PLC0415

    try:
        return not torch.cuda.is_available() or torch.zeros(1, device="cuda").add_(1).item() == 1
    except RuntimeError:
        return False


def tests(out: Path, options: argparse.Namespace) -> int:
    """Run them in this process, the compilation for other machines left out; results in tests.jsonl."""
    import pytest  # noqa: PLC0415

    out.mkdir(parents=True, exist_ok=True)
    shard, count = map(int, options.shard.split("/"))
    timed = Timed(out / "tests.jsonl", options.each, (shard, count), options.resume)
    words = [*options.paths, "-q", "--no-header", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short", "--maxfail=40"]
    words += ["--deselect", "tests/gpu/test_compile.py", "--deselect", "tests/gpu/test_compile_decode.py"]
    code = pytest.main([*words, *(["-k", options.match] if options.match else [])], plugins=[timed])
    print(_counts(timed.path), flush=True)
    return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else int(code)


def sharded(out: Path, options: argparse.Namespace) -> int:
    """The same in several processes at once; one that hangs in a test goes on behind it. tests.jsonl grows as they go."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "bench/gpu_session.py", "tests", "--each", str(options.each), "--match", options.match]
    command += ["--paths", *options.paths]
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "log").open("w+b") as log:
        places = [Path(scratch) / str(number) for number in range(options.shards)]
        with ThreadPoolExecutor(options.shards) as pool:
            running = [
                pool.submit(
                    supervised, [*command, "--out", str(place), "--shard", f"{place.name}/{len(places)}"],
                    log, options.seconds, place / "tests.jsonl", options.each + 10,
                )
                for place in places
            ]  # fmt: skip
            while wait(running, 1).not_done:
                _merge(places, out / "tests.jsonl")
        _merge(places, out / "tests.jsonl")
        log.seek(0)
        print(log.read()[-60000:].decode(errors="replace"))
    print([one.result() for one in running], _counts(out / "tests.jsonl"), flush=True)
    return int(any(not one.result().startswith("passed") for one in running))


def _merge(places: list[Path], target: Path) -> None:
    parts = [place / "tests.jsonl" for place in places]
    target.write_text("".join(part.read_text(encoding="utf-8") for part in parts if part.exists()), encoding="utf-8")


def _counts(path: Path) -> dict[str, int]:
    """Tests by their last outcome; those that only "began" hung or were running."""
    last = {(line := json.loads(text))["test"]: line["outcome"] for text in _lines(path)}
    return {outcome: list(last.values()).count(outcome) for outcome in sorted(set(last.values()))}


def _lines(path: Path) -> Iterator[str]:
    yield from path.read_text(encoding="utf-8").splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=(*PARTS, "tests"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--seconds", type=float, default=540, help="for all parts, or all shards, together")
    parser.add_argument("--paths", nargs="*", default=list(ON_CARD), help="of mode tests")
    parser.add_argument("--match", default="", help="of mode tests: names that contain this")
    parser.add_argument("--each", type=int, default=45, help="seconds that one test may take")
    parser.add_argument("--shards", type=int, default=1, help="of mode tests: processes at once")
    parser.add_argument("--shard", default="0/1", help="of mode tests: which of them this is")
    parser.add_argument("--resume", action="store_true", help="of mode tests: go on behind those that tests.jsonl names")
    parser.add_argument("--ways", default="plain", help="of mode more: how decode steps are computed, see flash_decode.py")
    options = parser.parse_args()
    out = options.out.resolve()
    if options.mode == "tests":
        raise SystemExit(sharded(out, options) if options.shards > 1 else tests(out, options))
    found = session(options.mode, out, options.commit, options.seconds, options.ways)
    print(json.dumps({part["part"]: part["outcome"] for part in found}, indent=1))
    raise SystemExit(0 if all(part["outcome"] == "passed" for part in found) else 1)


if __name__ == "__main__":
    main()
