"""One behaviour for every substrate: what a command gives, what is refused, what an error says."""

import dataclasses
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nautile.sandbox import (
    MIB,
    InvalidRequest,
    Limits,
    Sandbox,
    SandboxClosed,
    SubstrateUnavailable,
    Unsupported,
)


def test_a_string_is_for_the_shell_and_a_list_is_argv(sandbox):
    result = sandbox.run("echo $((6*7)); echo err >&2; exit 3")
    assert (result.exit_code, result.stdout, result.stderr, result.ok) == (3, "42\n", "err\n", False)
    assert sandbox.run(["echo", "$((6*7))"]).stdout == "$((6*7))\n"


def test_stdin_environment_and_directory(sandbox):
    assert sandbox.run("cat", stdin="häj\n").stdout == "häj\n"
    big = bytes(range(256)) * 3000
    assert sandbox.run("wc -c; sha256sum", stdin=big).stdout.split()[0] == str(len(big))
    assert sandbox.run("echo $A $HOME; pwd", env={"A": "b c"}, cwd="/tmp").stdout == "b c /workspace\n/tmp\n"
    assert sandbox.run("pwd").stdout == "/workspace\n"
    assert sandbox.run("true", stdin=big).ok  # a command that does not read its input is no failure


@pytest.mark.parametrize(
    ("command", "code"),
    [("exit 0", 0), ("exit 255", 255), ("kill -TERM $$", 143), ("kill -KILL $$", 137), (["/no/such"], 127), (["/etc"], 126)],
)
def test_exit_codes_are_those_of_a_shell(sandbox, command, code):
    result = sandbox.run(command)
    assert (result.exit_code, result.infrastructure_error) == (code, None)


def test_output_that_is_not_text_is_not_lost(sandbox):
    result = sandbox.run("printf 'a\\377b'")
    assert (result.stdout_bytes, result.stdout) == (b"a\xffb", "a\ufffdb")


def test_the_time_limit_kills_the_whole_tree(sandbox):
    began = time.monotonic()
    result = sandbox.run("setsid sleep 7301 & (setsid setsid sleep 7302 &) ; trap '' TERM INT; sleep 7303", timeout=0.4)
    assert result.timed_out and result.exit_code == 137 and result.infrastructure_error is None
    assert time.monotonic() - began < 60
    assert sandbox.run("ps -e -o args | grep -c '[s]leep 73'").stdout == "0\n"


def test_what_a_command_leaves_running_ends_with_it(sandbox):
    result = sandbox.run("setsid sleep 7304 & echo started", timeout=300)
    assert result.stdout == "started\n" and result.ok and result.seconds < 120  # it does not wait for who holds the pipe
    assert sandbox.run("ps -e -o args | grep -c '[s]leep 7304'").stdout == "0\n"


def test_a_stopped_child_and_zombies_are_no_obstacle(sandbox):
    source = """
import os, signal, time
for _ in range(20):
    if os.fork() == 0:
        os._exit(0)
stopped = os.fork()
if stopped == 0:
    signal.pause()
os.kill(stopped, signal.SIGSTOP)
print("left", flush=True)
"""
    result = sandbox.python(source)
    assert (result.stdout, result.infrastructure_error) == ("left\n", None)
    assert int(sandbox.run("ps -e -o pid= | wc -l").stdout) < 8


def test_a_flood_is_cut_where_it_is_produced(sandbox):
    for seconds in (0.8, 8.0, 60.0):  # an emulated guest on a busy machine needs a while to begin
        result = sandbox.run("yes", timeout=seconds)
        if result.truncated:
            break
    assert result.truncated and result.timed_out
    assert len(result.stdout_bytes) < 64 * 1024 + 100
    one_line = sandbox.python("import sys\nfor _ in range(300): sys.stdout.write('x' * 10000)\nprint('end')", timeout=120)
    assert one_line.truncated and one_line.stdout.startswith("x" * 1000) and one_line.stdout.endswith("x" * 1000 + "end\n")
    assert "bytes omitted" in one_line.stdout
    total = 300 * 10000 + 4
    omitted = int(one_line.stdout.partition("[... ")[2].split()[0])
    assert omitted + 64 * 1024 == total


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(min_size=1, max_size=60).filter(lambda one: b"\0" not in one), min_size=1, max_size=5))
def test_arguments_arrive_as_they_were_given(sandbox, words):
    texts = [word.decode("utf-8", "ignore") for word in words]
    result = sandbox.run(["python3", "-I", "-S", "-c", "import sys; sys.stdout.write(ascii(sys.argv[1:]))", *texts])
    assert result.stdout == ascii(texts)


@pytest.mark.parametrize("kind", ["function", "container"])
def test_the_largest_output_that_is_allowed_comes_through(kind, crun):
    with Sandbox.create(kind, limits=Limits(memory=256 * MIB, output=31 * MIB)) as sandbox:
        result = sandbox.python("import os\nfor fd in (1, 2):\n    for _ in range(40): os.write(fd, b'x' * 2**20)", timeout=120)
        assert result.truncated and result.ok and result.infrastructure_error is None
        assert len(result.stdout_bytes) > 31 * MIB and len(result.stderr_bytes) > 31 * MIB


def test_python_runs_a_program_inside(sandbox):
    assert sandbox.python("import sys; print(sys.argv[1], sys.stdin.read())", ["a"], stdin="b").stdout == "a b\n"
    failed = sandbox.python("raise ValueError('no')")
    assert failed.exit_code == 1 and "ValueError: no" in failed.stderr
    assert sandbox.python("import sys; sys.exit('said')").stderr == "said\n"
    assert sandbox.python("import sys; sys.exit(7)").exit_code == 7


def test_memory_is_limited_and_told_apart(sandbox):
    result = sandbox.python("data = bytearray(300 * 2**20)\nfor i in range(0, len(data), 4096): data[i] = 1", timeout=120)
    assert result.memory_killed and result.exit_code == 137 and result.infrastructure_error is None
    assert sandbox.run("echo alive").stdout == "alive\n"


def test_processes_are_limited(sandbox):
    result = sandbox.run("for i in $(seq 100); do sleep 300 & done; wait", timeout=90)
    assert "fork" in result.stderr.lower() or "Resource temporarily unavailable" in result.stderr
    assert sandbox.run("echo alive").stdout == "alive\n"


def test_the_disk_is_limited(sandbox):
    fill = "for i in 1 2 3 4 5 6; do head -c 8000000 /dev/zero > $d/f$i; done; du -sm $d"
    script = f"for d in /workspace /tmp /dev/shm; do {fill}; done"
    result = sandbox.run(script, timeout=120)
    assert result.stderr.count("No space left") >= 3 or result.memory_killed
    sizes = [int(line.split()[0]) for line in result.stdout.splitlines()]
    assert all(size <= 17 for size in sizes)
    sandbox.run("rm -f /workspace/f* /tmp/f* /dev/shm/f*")


def test_a_processor_quota_holds():
    with Sandbox.create("function", limits=Limits(memory=96 * MIB, cpus=0.25)) as slow:
        source = "import time, os\nt=time.monotonic()\nwhile time.monotonic()-t < 1.0: pass\nprint(time.process_time())"
        assert float(slow.python(source).stdout) < 0.5


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (lambda s: s.run(""), None),
        (lambda s: s.run([]), "not empty"),
        (lambda s: s.run([""]), "first word is empty"),
        (lambda s: s.run("a\0b"), "NUL"),
        (lambda s: s.run([1]), "strings"),
        (lambda s: s.run("true", timeout=0), "timeout"),
        (lambda s: s.run("true", timeout=float("nan")), "timeout"),
        (lambda s: s.run("true", env={"A=B": "c"}), "="),
        (lambda s: s.run("\ud800"), "UTF-8"),
    ],
)
def test_requests_without_meaning_are_refused(sandbox, action, reason):
    if reason is None:
        assert action(sandbox).ok
    else:
        with pytest.raises(InvalidRequest, match=reason):
            action(sandbox)


@pytest.mark.parametrize(
    "limits",
    [
        *({"memory": one} for one in (0, -1, 1.5, True)),
        *({"pids": one} for one in (0, 1, "9")),
        {"output": 32 * MIB},
        {"cpus": 0},
        *({name: 0} for name in ("disk", "inodes", "open_files", "output", "seconds")),
    ],
)
def test_limits_without_meaning_are_refused(limits):
    with pytest.raises(InvalidRequest, match=f"limits: {next(iter(limits))} is"):
        Limits(**limits)


@pytest.mark.parametrize("limits", [{"memory": 2**55}, {"cpus": 9999.0}])
def test_more_than_the_machine_has_is_refused_where_the_sandbox_is_made(limits):
    """Not where the limits are written down: that may be another machine, the client of a fleet."""
    with pytest.raises(InvalidRequest, match=f"limits: {next(iter(limits))} is .* the machine has"):
        Sandbox.create("function", limits=Limits(**limits))


def test_a_kind_that_is_not_there_says_so_and_nothing_weaker_is_given():
    with pytest.raises(InvalidRequest, match="choose one of function, container"):
        Sandbox.create("docker")
    for kind in ("microvm", "vm"):
        with pytest.raises(SubstrateUnavailable, match="firecracker"):
            Sandbox.create(kind, allow_emulation=True, runtime="firecracker")
    with pytest.raises(SubstrateUnavailable, match="kata"):
        Sandbox.create("container", runtime="kata")
    with pytest.raises(Unsupported, match="use kind='container'"):
        Sandbox.create("function", image="/usr")


def test_a_missing_program_names_its_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubstrateUnavailable, match="apt-get install bubblewrap"):
        Sandbox.create("function")


def test_what_a_function_cannot_do_is_unsupported_with_the_reason(function):
    calls = {
        "files": lambda: function.read("x"),
        "session": function.session,
        "pause": function.pause,
        "snapshot": function.snapshot,
        "fork": function.fork,
        "pack_diff": lambda: function.pack_diff("/tmp/x"),
        "network": lambda: function.set_policy(None),
    }
    assert set(calls) == {field.name for field in dataclasses.fields(function.capabilities)} - {"memory_snapshot"}
    for call in calls.values():
        with pytest.raises(Unsupported, match=r"function: no .*use kind='container'"):
            call()


def test_a_closed_sandbox_says_so():
    sandbox = Sandbox.create("function")
    sandbox.close()
    sandbox.close()
    with pytest.raises(SandboxClosed):
        sandbox.run("true")
