"""The sandbox keeps its word. Each confinement is also tried without it, which proves that the attempt would succeed."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.processes import began, gone, nap
from nautile.agent import toolbox
from nautile.sandbox import (
    BubblewrapMissingError,
    DirectoryError,
    NamespacesRefusedError,
    SandboxError,
    confine,
    open_sandbox,
)

PROGRAM = Path(toolbox.__file__)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    (place / "work").mkdir()
    (place / "work" / "notes").write_text("one\ntwo\n")
    (place / "secret").write_text("hidden\n")
    (place / "work" / "link").symlink_to(place / "secret")
    return place


@pytest.fixture(scope="module")
def confined(place):
    return open_sandbox(place / "work")  # without bubblewrap this fails, and says what to install


@pytest.fixture(scope="module")
def free(place):
    return open_sandbox(place / "work", unconfined=True)


def shell(sandbox, command, time_limit=60.0):
    request = {"tool": "run", "arguments": {"command": command}, "time_limit": time_limit}
    return sandbox.call(PROGRAM, request, time_limit=time_limit + 60)["output"]


def test_tools_work_inside(confined, place):
    request = {"tool": "edit", "arguments": {"path": "notes", "old": "two", "new": "three"}}
    assert confined.call(PROGRAM, request, time_limit=60) == {"ok": True, "output": "edited notes line 2"}
    assert (place / "work" / "notes").read_text() == "one\nthree\n"
    assert shell(confined, "echo made > made; awk 'BEGIN {print 6 * 7}'; pwd") == "42\n/workspace"
    assert (place / "work" / "made").read_text() == "made\n"


def test_nothing_else_of_the_host_is_there(confined, free, place):
    home = str(Path.home())
    look = f"cat {place}/secret /etc/passwd; ls {home} /home /srv /var"
    output = shell(confined, look)
    assert "hidden" not in output and "root:x:0" not in output
    assert output.count("No such file") == 6 - os.path.realpath(sys.base_prefix).startswith(home + "/")
    assert "hidden" in shell(free, look) and "root:x:0" in shell(free, look)
    assert sorted(shell(confined, "ls /").split()) == sorted(
        {"bin", "dev", "etc", "lib", "nautile", "proc", "sbin", "tmp", "usr", "workspace"}
        | {name for name in ("lib32", "lib64", "libx32") if Path("/", name).exists()}
        | {part for part in [Path(os.path.realpath(sys.base_prefix)).parts[1]] if part != "usr"}
    )


def test_a_link_out_of_the_workspace_leads_nowhere(confined, free):
    assert "No such file" in shell(confined, "cat link")
    assert shell(free, "cat link") == "hidden"
    request = {"tool": "read", "arguments": {"path": "link"}}
    for sandbox in (confined, free):
        assert sandbox.call(PROGRAM, request, time_limit=60)["output"] == "error: link is outside the workspace"


def test_only_the_workspace_can_be_written(confined):
    for target in ("/usr/bin/x", "/etc/x", "/x", "/nautile/toolbox.py"):
        assert shell(confined, f"echo x > {target}").endswith("[exit 2]")
    for target in ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger"):
        assert shell(confined, f"test -w {target}") == "[exit 1]"  # asked, not tried: root's host would suffer
    assert shell(confined, "id -u; grep -c 'CapEff:.0000000000000000' /proc/self/status; hostname") == "1000\n1\nnautile"
    assert "[exit" in shell(confined, "unshare -U true")


def test_the_environment_stays_outside(confined, free, monkeypatch):
    monkeypatch.setenv("NAUTILE_TEST_SECRET", "leaked")
    assert "leaked" not in shell(confined, "env; cat /proc/*/environ")
    assert "leaked" in shell(free, "env")


def test_there_is_no_network(confined, free):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = f"import socket; socket.create_connection(('127.0.0.1', {port}), 60); print('connected')"
        command = f'{os.path.realpath(sys._base_executable)} -I -S -c "{script}"'
        assert shell(free, command) == "connected"
        assert "ConnectionRefusedError" in shell(confined, command)
    assert shell(confined, "sed 1,2d /proc/net/dev | cut -d: -f1") == "    lo"


def test_processes_of_the_host_cannot_be_seen(confined):
    assert int(shell(confined, "ls /proc | grep -c '^[0-9]'")) < 10


@pytest.mark.parametrize("name", ["confined", "free"])
def test_the_time_limit_ends_everything(name, request):
    sandbox = request.getfixturevalue(name)
    assert shell(sandbox, f"setsid {nap(7201)} & {nap(7202)}", 0.4) == "[killed after 0.4 s]"
    assert gone(nap(7201), nap(7202))


def test_a_tool_that_does_not_answer_is_killed(confined, tmp_path):
    (tmp_path / "tool.py").write_text("import time; time.sleep(7203)")
    start = time.monotonic()
    with pytest.raises(SandboxError, match=r"did not answer within 0.5 s and was killed"):
        confined.call(tmp_path / "tool.py", {}, time_limit=0.5)
    assert time.monotonic() - start < 120


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import sys\nwhile True: sys.stdout.write('x' * 2**20)", "wrote more than an answer can hold"),
        ("print('{')", "gave no answer"),
        ("print('[]')", "not an object"),
        ("import sys; sys.exit('broken')", "gave no answer: broken"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "gave no answer: it was killed"),
    ],
)
def test_answers_are_not_trusted(confined, tmp_path, program, error):
    (tmp_path / "tool.py").write_text(program)
    with pytest.raises(SandboxError, match=error):
        confined.call(tmp_path / "tool.py", {}, time_limit=60)


def test_a_killed_caller_leaves_nothing(place):
    """The sandbox dies with the process that opened it, even one that is killed without warning."""
    request = json.dumps({"tool": "run", "arguments": {"command": nap(7204)}, "time_limit": 600})
    script = (
        "import json; from pathlib import Path; from nautile.sandbox import open_sandbox; "
        f"open_sandbox(Path({str(place / 'work')!r})).call(Path({str(PROGRAM)!r}), json.loads({request!r}), time_limit=600)"
    )
    caller = subprocess.Popen([sys.executable, "-c", script])
    assert began(nap(7204)) and caller.poll() is None
    caller.kill()
    caller.wait()
    assert gone(nap(7204))


def test_a_directory_that_is_not_one(place):
    with pytest.raises(DirectoryError, match="does not exist"):
        open_sandbox(place / "none")
    with pytest.raises(DirectoryError, match="is not a directory"):
        open_sandbox(place / "secret", unconfined=True)


def test_a_missing_bubblewrap_says_what_to_install(place):
    with pytest.raises(BubblewrapMissingError, match=r"apt-get install bubblewrap .*--unconfined"):
        open_sandbox(place / "work", bwrap="/nowhere/bwrap")


def test_a_refusing_kernel_has_an_error_of_its_own(place, tmp_path):
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    refusing.chmod(0o755)
    with pytest.raises(NamespacesRefusedError, match=r"setting up uid map: Permission denied.*--unconfined"):
        open_sandbox(place / "work", bwrap=str(refusing))


@pytest.mark.parametrize(
    ("path", "value", "remedy"),
    [
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1\n", "bwrap-userns-restrict"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0\n", "sysctl kernel.unprivileged_userns_clone=1"),
        ("/proc/sys/user/max_user_namespaces", "0\n", "sysctl user.max_user_namespaces=15000"),
        ("", "", "--security-opt seccomp=unconfined"),
    ],
)
def test_the_remedy_fits_the_machine(monkeypatch, path, value, remedy):
    def read_text(self, encoding=None):
        if str(self) == path:
            return value
        raise FileNotFoundError(path)

    monkeypatch.setattr(confine.Path, "read_text", read_text)
    assert remedy in confine._refusal("bwrap: No permissions to create a new namespace")


def test_nothing_runs_unconfined_unless_asked(place, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BubblewrapMissingError):
        open_sandbox(place / "work")
    assert open_sandbox(place / "work", unconfined=True).confinement == "none"
