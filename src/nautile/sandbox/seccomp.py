"""The system calls that a tenant may make: an allowlist, compiled by libseccomp into the program that the kernel runs.

What is not on the list fails with EPERM. Left out on purpose: namespaces and mounts, ptrace and other processes' memory, bpf,
io_uring, userfaultfd, perf, keys, kexec, modules, clocks, file handles, raw and netlink sockets. ``clone3`` fails with ENOSYS,
because a filter cannot see its flags; C libraries then use ``clone``, whose flags it can see.
"""

from __future__ import annotations

import errno
import importlib
import tempfile
from functools import lru_cache
from typing import Any

from nautile.sandbox.errors import SubstrateUnavailable

__all__ = ["ALLOWED", "SYSTEM_V", "program"]

_CALLS = """
accept accept4 access alarm arch_prctl bind brk capget chdir chmod chown clock_getres clock_gettime clock_nanosleep close
close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait
epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64
fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork fremovexattr
fsetxattr fstat fstatfs fsync ftruncate futex futex_requeue futex_wait futex_waitv futex_wake futimesat get_robust_list
get_thread_area getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp
getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid getsockname getsockopt gettid
gettimeofday getuid getxattr inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents
io_pgetevents io_setup io_submit ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self
lchown lgetxattr link linkat listen listxattr llistxattr lremovexattr lseek lsetxattr lstat madvise membarrier memfd_create
mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mprotect mremap msync munlock munlockall munmap nanosleep
newfstatat open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll
prctl pread64 preadv preadv2 pselect6 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recvfrom
recvmmsg recvmsg removexattr rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask
rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr
sched_setparam sched_setscheduler sched_yield seccomp select sendfile sendmmsg sendmsg sendto set_robust_list set_tid_address
setfsgid setfsuid setgid setgroups setitimer setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid
setsockopt setuid setxattr shutdown sigaltstack signalfd signalfd4 socketpair splice stat statfs statx symlink symlinkat sync
sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime timer_settime
timerfd_create timerfd_gettime timerfd_settime times tkill truncate umask uname unlink unlinkat utime utimensat utimes vfork
vmsplice wait4 waitid write writev
"""
_LASTING = """
shmget shmat shmctl shmdt semget semop semtimedop semctl msgget msgsnd msgrcv msgctl
mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
"""
ALLOWED, SYSTEM_V = tuple(str.split(_CALLS)), tuple(str.split(_LASTING))

_NAMESPACES = 0x7E020080  # every CLONE_NEW flag, CLONE_NEWTIME included
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_PERSONALITIES = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)
_TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX


@lru_cache(maxsize=2)
def program(*, system_v: bool) -> bytes:
    """The filter as BPF for this machine's own system calls. Raises SubstrateUnavailable without libseccomp.

    ``system_v``: whether shared memory, semaphores and queues that outlive their processes are allowed.
    """
    try:
        seccomp = importlib.import_module("pyseccomp")  # loads libseccomp, which may be missing
    except (ImportError, RuntimeError, OSError) as error:
        raise SubstrateUnavailable("seccomp", f"libseccomp cannot be loaded ({error})", "apt-get install libseccomp2") from None
    rules = seccomp.SyscallFilter(defaction=seccomp.ERRNO(errno.EPERM))
    rules.set_attr(seccomp.Attr.CTL_OPTIMIZE, 2)  # a binary tree instead of a list of 300 comparisons a call
    for name in [*ALLOWED, *(SYSTEM_V if system_v else ())]:
        _allow(seccomp, rules, name)
    _allow(seccomp, rules, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, _NAMESPACES, 0))
    for position in (0, 2):  # its own limits, or reading: one of the same user could be killed by the limits that it is given
        _allow(seccomp, rules, "prlimit64", seccomp.Arg(position, seccomp.EQ, 0))
    for family in _FAMILIES:
        _allow(seccomp, rules, "socket", seccomp.Arg(0, seccomp.EQ, family))
    for persona in _PERSONALITIES:
        _allow(seccomp, rules, "personality", seccomp.Arg(0, seccomp.EQ, persona))
    for first, size in _ioctl_blocks():
        _allow(seccomp, rules, "ioctl", seccomp.Arg(1, seccomp.MASKED_EQ, 2**64 - size, first))
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _ioctl_blocks() -> list[tuple[int, int]]:
    """Aligned blocks (first, size) that cover every 32-bit ioctl request but the ones that type into a terminal.

    The kernel drops the upper half of the argument and the filter sees all 64 bits: a comparison would be passed by a request
    with a bit set above, so each block fixes the upper half. The last block is a negative ``int`` made longer.
    """
    blocks = [(2**64 - 2**31, 2**31)]
    first = 0
    for stop in (*_TERMINAL_INJECTION, 2**32):
        while first < stop:
            size = first & -first or 2**32
            while first + size > stop:
                size //= 2
            blocks.append((first, size))
            first += size
        first = stop + 1
    return blocks


def _allow(seccomp: Any, rules: Any, name: str, *conditions: Any) -> None:
    try:
        rules.add_rule(seccomp.ALLOW, name, *conditions)
    except OSError as error:
        # An old libseccomp does not know a new call, which is then not allowed; anything else is a fault.
        if conditions or error.errno != errno.EINVAL:
            raise
