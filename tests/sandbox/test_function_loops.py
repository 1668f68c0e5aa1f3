"""The loop of a function worker's process 1, in C and in Python: calls end in the same way, and C touches few pages."""

import os
from pathlib import Path

import pytest

from conftest import SMALL
from nautile.sandbox import Sandbox
from nautile.sandbox import worker as module

CALLS = [
    ("command", "exit 7", 20.0),
    ("command", "kill -9 $$", 20.0),
    ("command", "setsid sleep 600 & echo left > /tmp/a; mkdir -p /dev/shm/d/e; echo out; echo err >&2", 20.0),
    ("command", "ls -A /tmp /workspace /dev/shm; ps -e -o comm= | grep -c sleep", 20.0),
    ("command", "sleep 600", 0.3),
    (
        "python",
        "import os; os.fork() or os._exit(3); os.wait(); print(len(os.listdir('/proc/self/fd')))",
        20.0,
    ),
    ("python", "raise SystemExit('why')", 20.0),
    ("command", "true", 20.0),
]


def outcomes(sandbox):
    found = []
    for kind, text, seconds in CALLS:
        done = sandbox.python(text, timeout=seconds) if kind == "python" else sandbox.run(text, timeout=seconds)
        found.append((text, done.exit_code, done.stdout, done.stderr, done.timed_out, done.infrastructure_error))
    return found


@pytest.fixture(params=["C", "Python"])
def way(request, monkeypatch):
    if request.param == "Python":
        monkeypatch.setattr(module, "_loop", lambda: None)
    elif module._loop() is None:
        pytest.skip("there is no C compiler")
    return request.param


EXPECTED = [
    (7, "", "", False),
    (137, "", "", False),
    (0, "out\n", "err\n", False),
    (1, "/dev/shm:\n\n/tmp:\n\n/workspace:\n0\n", "", False),
    (137, "", "", True),
    (0, "4\n", "", False),
    (1, "", "why\n", False),
    (0, "", "", False),
]


def test_calls_end_alike_and_leave_nothing(way):
    with Sandbox.create("function", limits=SMALL) as sandbox:
        for (text, *found), expected in zip(outcomes(sandbox), EXPECTED, strict=True):
            assert (*found[:4], found[4]) == (*expected, None), (way, text)


def test_what_a_call_made_of_its_worker_ends_it(way):
    """Another scheduling of process 1, or a place that cannot be emptied: the next call gets another worker."""
    with Sandbox.create("function", limits=SMALL) as sandbox:
        first = {one.process.pid for one in sandbox.driver._all}
        assert sandbox.run("renice -n 3 -p 1 > /dev/null; nice").stdout == "0\n"
        assert sandbox.run("cut -d' ' -f19 /proc/1/stat; nice").stdout == "0\n0\n"
        assert not first & {one.process.pid for one in sandbox.driver._all}


def test_process_one_copies_few_pages():
    if module._loop() is None:
        pytest.skip("there is no C compiler")
    with Sandbox.create("function", limits=SMALL) as sandbox:
        for _ in range(4):
            assert sandbox.python("pass").ok
        before = {worker: faults(worker) for worker in sandbox.driver._all}
        for _ in range(40):
            assert sandbox.python("pass").ok
        touched = sum(faults(worker) - count for worker, count in before.items())
    assert touched < 40 * 20  # 99 a call in Python


def faults(worker):
    """The page faults of a worker's process 1 alone."""
    number = worker.process.pid
    while b"python" not in Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")[0]:
        number = int(Path(f"/proc/{number}/task/{number}/children").read_text().split()[0])
    assert os.readlink(f"/proc/{number}/ns/pid") != os.readlink("/proc/self/ns/pid")
    return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[7])
