"""The filter of a container's first process: it is enough for that process, and for nothing else."""

import contextlib
import errno
import os
import signal
import tempfile
from pathlib import Path

import pyseccomp
import pytest

from nautile.sandbox import SubstrateUnavailable, bundle, kernel
from nautile.sandbox.seccomp_profile import FIRST_PROCESS, first_process_profile
from waiting import soon


def compiled(profile):
    """What an OCI runtime makes of a profile."""
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    rules = pyseccomp.SyscallFilter(defaction=pyseccomp.ERRNO(profile["defaultErrnoRet"]))
    for entry in profile["syscalls"]:
        assert entry["action"] == "SCMP_ACT_ALLOW"
        for name in entry["names"]:
            rules.add_rule(pyseccomp.ALLOW, name)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


@contextlib.contextmanager
def started(program, path):
    """A process that loads the filter, closes a descriptor, as crun does, and executes a program. Its number."""
    spare = os.open("/dev/null", os.O_RDONLY)
    child = os.fork()
    if child == 0:
        try:
            kernel._libc.prctl(38, 1, 0, 0, 0)  # no new rights, without which an ordinary user may load none
            kernel.load_seccomp(program)
            os.close(spare)
            os.execv(path, [path])
        finally:
            os._exit(99)
    os.close(spare)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


@pytest.fixture
def init(tmp_path):
    path = tmp_path / "init"
    path.write_bytes(bundle.init_program())
    path.chmod(0o755)
    return path


def call_of(process):
    """The system call that a process is in."""
    return Path(f"/proc/{process}/syscall").read_text().split()[0]


def test_the_first_process_gets_to_its_sleep_and_has_the_filter(init):
    with started(compiled(first_process_profile()), init) as process:
        soon(lambda: call_of(process) == "34")  # pause
        status = Path(f"/proc/{process}/status").read_text()
        assert "Seccomp:\t2" in status and "Name:\tinit" in status
        os.kill(process, signal.SIGSTOP)  # as a freezer does; it goes on sleeping after that
        os.kill(process, signal.SIGCONT)
        assert os.waitpid(process, os.WNOHANG) == (0, 0)


def test_any_other_program_cannot_even_begin(init):
    with started(compiled(first_process_profile()), "/bin/true") as process:
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) not in (0, 99)


def test_without_one_of_its_calls_it_would_not_sleep(init):
    profile = first_process_profile()
    profile["syscalls"][0]["names"].remove("execve")
    with started(compiled(profile), init) as process:
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != 0  # it cannot even leave properly


def test_it_names_this_processor_and_an_error(monkeypatch):
    profile = first_process_profile()
    assert profile["architectures"] == ["SCMP_ARCH_X86_64"] and profile["defaultErrnoRet"] == errno.EPERM
    assert set(FIRST_PROCESS) < set(profile["syscalls"][0]["names"])
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(SubstrateUnavailable, match="riscv64"):
        first_process_profile()
