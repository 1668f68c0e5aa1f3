"""Which system calls the first process of a container may make, as the OCI configuration says it (``linux.seccomp``).

Commands are no children of that process, and have a filter of their own (seccomp.py). It makes two calls and sleeps;
before that crun, which loads the filter as the last thing, closes what it has open and executes it. All else fails with EPERM.
"""

from __future__ import annotations

import errno
import platform
from typing import Any

from nautile.sandbox.errors import SubstrateUnavailable

__all__ = ["FIRST_PROCESS", "RUNTIME", "first_process_profile"]

FIRST_PROCESS = ("rt_sigaction", "munmap", "pause")  # what bundle.init_program calls
RUNTIME = ("close", "execve")  # what crun still calls when the filter is there
_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64"}


def first_process_profile() -> dict[str, Any]:
    """The value of ``linux.seccomp``. Raises SubstrateUnavailable for a processor that has no first process."""
    architecture = _ARCHITECTURES.get(platform.machine())
    if architecture is None:
        why = f"there is no filter for the first process on {platform.machine()} yet"
        raise SubstrateUnavailable("container", why, "use kind='function'")
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.EPERM,
        "architectures": [architecture],  # calls in another architecture's numbers end the process
        "syscalls": [{"names": sorted((*FIRST_PROCESS, *RUNTIME)), "action": "SCMP_ACT_ALLOW"}],
    }
