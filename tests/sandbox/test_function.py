"""A function call leaves nothing: no file, no process, no memory, no shared object, and no worker that could not clean up."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agent.processes import began, gone, nap
from nautile.sandbox import MIB, InvalidRequest, Limits, Sandbox
from nautile.sandbox import function as module
from nautile.sandbox import worker as worker_module
from waiting import soon


def pids_of(sandbox):
    return {worker.process.pid for worker in list(sandbox.driver._all)}


def settled(sandbox, workers=1):
    """The workers' processes, when the one that comes with the second call has come."""
    assert sandbox.run("true").ok and sandbox.run("true").ok
    soon(lambda: len(pids_of(sandbox)) == workers + 1)
    return pids_of(sandbox)


def test_files_are_gone_after_the_call(function):
    function.run("echo x > /workspace/a; echo x > /tmp/.b; mkdir -p /dev/shm/c/d; ln -s /etc/passwd /tmp/l; mkfifo /tmp/p")
    assert function.run("find /workspace /tmp /dev/shm -mindepth 1").stdout == ""


def test_a_place_that_cannot_be_emptied_costs_the_worker(function):
    deep = "import os\nos.chdir('/tmp')\nfor _ in range(400):\n    os.mkdir('d'); os.chdir('d')"
    assert function.python(deep).ok
    assert function.run("find /tmp -mindepth 1 | wc -l").stdout == "0\n"
    assert function.run("mkdir -p /tmp/a/b; chmod 000 /tmp/a").ok
    assert function.run("find /tmp -mindepth 1 | wc -l").stdout == "0\n"


def test_memory_of_an_earlier_call_cannot_be_found(function):
    """The program, its input and its output of one call, looked for in the memory of the next fork."""
    secret = "".join(["lobster", "-", "7391"])
    assert function.python("import sys; print(sys.stdin.read() * 50)", stdin=secret).ok
    assert function.python(f"print('{secret}' * 3)").ok
    scan = """
import re
needle = ''.join(['lob', 'ster-', '7391']).encode()
found = 0
with open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb', 0) as memory:
    for line in maps:
        match = re.match(r'([0-9a-f]+)-([0-9a-f]+) rw', line)
        if match:
            begin, end = (int(one, 16) for one in match.groups())
            try:
                memory.seek(begin)
                found += memory.read(end - begin).count(needle)
            except (OSError, ValueError):
                pass
print(found)
"""
    assert int(function.python(f"keep = '{secret}'\n" + scan).stdout) > 1  # the scan finds what is there: its own source
    # Its needle is made of pieces, so that only another call's memory could hold it; made once, it is found once itself.
    assert int(function.python(scan).stdout) <= 1


def test_system_v_objects_cannot_be_left(function):
    source = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); print(libc.shmget(7, 4096, 0o1600), ctypes.get_errno())"
    assert function.python(source).stdout == "-1 1\n"


def test_the_worker_cannot_be_harmed(function):
    before = settled(function)
    source = """
import os, resource
for number in range(1, 65):
    os.kill(1, number)
try:
    resource.prlimit(1, resource.RLIMIT_CPU, (1, 1))  # after which the kernel would kill it
    print('limited')
except PermissionError:
    resource.prlimit(1, resource.RLIMIT_CPU)
    resource.prlimit(0, resource.RLIMIT_CPU, (60, 60))
for path in ('/proc/1/mem', '/proc/1/environ', '/proc/1/fd', '/proc/1/maps'):
    try:
        (os.listdir if path.endswith('fd') else lambda p: open(p, 'rb').read())(path)
        print('open', path)
    except OSError:
        pass
print(sorted(os.listdir('/proc/self/fd')))
"""
    assert function.python(source).stdout == "['0', '1', '2', '3']\n"  # 3 is the listing's own
    assert function.run("kill -9 -1; echo never").stdout in ("", "never\n")
    assert function.run("echo alive").stdout == "alive\n"
    assert pids_of(function) == before  # they are the same workers still


def test_how_a_call_is_scheduled_is_not_what_another_one_set():
    """The tenant has the user id of process 1, whose forks inherit its niceness, class and processors."""
    look = "import os; print(os.getpriority(0, 0), os.sched_getscheduler(0), sorted(os.sched_getaffinity(0)))"
    with Sandbox.create("function") as sandbox:
        usual = sandbox.python(look).stdout
        for harm in (
            "os.setpriority(os.PRIO_PROCESS, 1, 19)",
            "os.setpriority(os.PRIO_USER, os.getuid(), 5)",
            "os.sched_setscheduler(1, os.SCHED_BATCH, os.sched_param(0))",
            "os.sched_setaffinity(1, {min(os.sched_getaffinity(0))})",
        ):
            assert sandbox.python(f"import os; {harm}").ok
            assert {sandbox.python(look).stdout for _ in range(3)} == {usual}, harm


def test_a_program_finds_what_a_python_of_its_own_would_give_it(function):
    source = """
import gc, os, signal, sys
interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
print(gc.isenabled(), sys.stdin.seekable(), sys.stdout.seekable(), interrupts)
with open('/proc/self/fd/0', 'rb', 0) as given:
    print(given.read())
try:
    os.write(os.open('/proc/self/fd/0', os.O_WRONLY), b'x')
except PermissionError:
    print(sys.stdin.read(), sys.argv)
"""
    result = function.python(source, ["a b"], stdin="given")
    assert result.stdout == "True False False True\nb'given'\ngiven ['-c', 'a b']\n", result.stderr
    result = function.run("yes | head -1")
    assert (result.stdout, result.stderr, result.exit_code) == ("y\n", "", 0)  # SIGPIPE ends a command, as in a shell


def test_calls_of_any_length_arrive_and_those_too_long_are_refused(function):
    long = "x" * 3_000_000
    assert function.python(f"print(len({long!r}))").stdout == "3000000\n"
    with pytest.raises(InvalidRequest, match="give data as stdin"):
        function.python("#" * 2**24)
    assert function.run("wc -c", stdin=b"y" * 5_000_000).stdout == "5000000\n"


def test_output_comes_while_the_call_runs_and_a_caller_that_fails_loses_the_worker_only(function):
    class CallerError(Exception):
        pass

    def fail(name, data):
        raise CallerError(name, data)

    start = time.monotonic()
    with pytest.raises(CallerError) as failure:
        function.run("echo out; sleep 600", timeout=600, on_output=fail)
    assert failure.value.args == ("stdout", b"out\n") and time.monotonic() - start < 120
    assert function.run("echo next").stdout == "next\n"


def test_a_time_limit_that_comes_as_the_call_ends_does_not_reach_the_next_one(function):
    for _ in range(12):
        first = function.run("sleep 0.01", timeout=0.012)
        assert first.ok or first.timed_out
        assert function.run("sleep 0.02; echo whole").stdout == "whole\n"


def test_a_worker_that_its_tenant_starves_is_ended_from_outside(monkeypatch):
    monkeypatch.setattr(worker_module, "_ANSWER_LIMIT", 0.1)
    with Sandbox.create("function") as sandbox:
        (worker,) = sandbox.driver._all
        worker.group.freeze(True)  # process 1 has been starved when its word is needed
        result = sandbox.run("sleep 30", timeout=0.4)
        assert result.timed_out and result.exit_code == 137 and result.infrastructure_error is None
        assert sandbox.run("echo next").stdout == "next\n" and worker not in sandbox.driver._all


def test_a_killed_worker_is_an_infrastructure_error_and_is_replaced():
    with Sandbox.create("function") as sandbox:
        (worker,) = sandbox.driver._all
        result = sandbox.run("echo on; sleep 600", timeout=600, on_output=lambda *_: worker.group.kill())
        assert result.infrastructure_error is not None and result.exit_code == -1
        assert sandbox.run("echo again").stdout == "again\n"
        assert worker not in sandbox.driver._all


def test_callers_share_the_workers():
    with Sandbox.create("function", workers=2) as sandbox:
        results = [None] * 12

        def call(index):
            results[index] = sandbox.python(f"print({index})").stdout

        threads = [threading.Thread(target=call, args=(index,)) for index in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [f"{index}\n" for index in range(12)]
        assert len(settled(sandbox, workers=2)) == 3


def test_no_more_calls_run_at_once_than_were_asked_for(tmp_path):
    with Sandbox.create("function", workspace=tmp_path) as sandbox:
        settled(sandbox)
        script = "mkdir running || echo together; sleep 0.05; rmdir running"
        threads = [threading.Thread(target=lambda: results.append(sandbox.run(script).stdout)) for _ in range(4)]
        results = []
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [""] * 4


def test_a_worker_retires(monkeypatch):
    monkeypatch.setattr(module, "_RECYCLE", 3)
    with Sandbox.create("function") as sandbox:
        (first,) = pids_of(sandbox)
        for _ in range(6):  # three for each of two
            assert sandbox.run("true").ok
        assert sandbox.run("echo next").stdout == "next\n"
        assert first not in pids_of(sandbox)
        soon(lambda: not os.path.exists(f"/proc/{first}"))


def test_a_workspace_is_the_callers_directory(tmp_path):
    (tmp_path / "in").write_text("given")
    with Sandbox.create("function", workspace=tmp_path) as sandbox:
        assert sandbox.run("cat in; echo made > out; ln -s /etc/passwd away").stdout == "given"
        assert sandbox.run("cat out").stdout == "made\n"
    assert (tmp_path / "out").read_text() == "made\n"
    assert (tmp_path / "out").stat().st_uid == tmp_path.stat().st_uid


def test_closing_leaves_nothing():
    sandbox = Sandbox.create("function", limits=Limits(memory=64 * MIB), workers=2)
    places = [place for worker in sandbox.driver._all for place in worker.group.places]
    pids = pids_of(sandbox)
    assert places and all(place.is_dir() for place in places)
    descriptors = len(os.listdir("/proc/self/fd"))
    sandbox.close()
    assert not any(place.exists() for place in places)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert len(os.listdir("/proc/self/fd")) < descriptors


def test_a_killed_client_leaves_no_process_and_the_next_one_sweeps_its_groups():
    script = (
        "from nautile.sandbox import Sandbox\n"
        "s = Sandbox.create('function')\n"
        "(w,) = s.driver._all\n"
        "print(next(iter(w.group.places)), flush=True)\n"
        f"s.run({nap(7311)!r}, timeout=600)"
    )
    client = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    group = Path(client.stdout.readline().strip())
    assert began(nap(7311)) and group.is_dir()
    client.kill()
    client.communicate()
    assert gone(nap(7311))
    Sandbox.create("function").close()
    soon(lambda: not group.exists())  # removed by this one, or by another process's that sweeps at the same moment


def test_a_function_starts_from_no_descriptor_or_variable_of_ours(function, monkeypatch, tmp_path):
    monkeypatch.setenv("NAUTILE_TEST_SECRET", "leaked")
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        with Sandbox.create("function") as sandbox:
            assert "leaked" not in sandbox.run("env; cat /proc/*/environ 2>/dev/null").stdout
            assert sandbox.run("ls /proc/self/fd | wc -l").stdout == "4\n"
