"""A sandbox as an environment of Harbor (Terminal-Bench and its like): ``pip install harbor`` needs Python 3.12.

    harbor run ... --environment-import-path nautile.sandbox.adapters.harbor:NautileEnvironment --ek image=/path/to/rootfs

Commands run as the sandbox's own user, who owns /workspace and /tmp. There is no Docker here: a task that is a Dockerfile needs
``image``, a directory (or for a fleet a name) with what that file would have built.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nautile.sandbox.errors import InvalidRequest, SandboxError, SubstrateUnavailable, Unsupported
from nautile.sandbox.limits import MIB, Limits
from nautile.sandbox.sandbox import Sandbox

try:
    from harbor.environments.base import BaseEnvironment, ExecResult
    from harbor.environments.capabilities import EnvironmentCapabilities, EnvironmentResourceCapabilities
    from harbor.models.task.config import NetworkMode
except ImportError as _error:
    raise SubstrateUnavailable("harbor", f"it is not installed ({_error})", "pip install harbor, with Python 3.12") from None

__all__ = ["NautileEnvironment"]

_LONGEST = 86_400.0  # seconds of a command for which no time limit was given
# A policy can change later only if there is a proxy from the beginning: this stands for nothing, an address of nobody's.
_NOBODY = ["192.0.2.1:9"]
_TIMED_OUT = 124  # what timeout(1) gives


class NautileEnvironment(BaseEnvironment):  # type: ignore[misc, unused-ignore]
    """One sandbox for a trial. Options, as ``--ek``: kind, image, fleet, token, ports (of the hosts it may reach: 443,80)."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._kind = str(options.pop("kind", "container"))
        self._image, self._fleet, self._token = (options.pop(name, None) for name in ("image", "fleet", "token"))
        self._ports = [int(port) for port in str(options.pop("ports", "443,80")).split(",")]
        self._sandbox: Sandbox | None = None
        super().__init__(*arguments, **options)

    @staticmethod
    def type() -> str:
        """Its name in Harbor's results."""
        return "nautile"

    @classmethod
    def resource_capabilities(cls) -> Any:
        """Limits are ceilings, enforced by the kernel."""
        return EnvironmentResourceCapabilities(cpu_limit=True, memory_limit=True, fractional_cpus=True)

    @classmethod
    def preflight(cls) -> None:
        """Nothing to be logged in to."""

    @property
    def capabilities(self) -> Any:
        """No network, or names that may be reached, changeable while it lives. Never the open network."""
        return EnvironmentCapabilities(
            disable_internet=True,
            network_allowlist=True,
            network_allowlist_hostnames=True,
            network_allowlist_wildcard_hostnames=True,
            network_allowlist_ipv4_addresses=True,
            dynamic_network_policy=True,
        )

    def _validate_definition(self) -> None:
        wanted = self.task_env_config.docker_image or (Path(self.environment_dir) / "Dockerfile").exists()
        if wanted and self._image is None:
            raise InvalidRequest(
                f"the task {self.environment_name} is built from a Docker image, and there is no Docker here: pass "
                "--ek image=DIRECTORY with its root file system (docker export, or an OCI layout unpacked)"
            )

    def _rules(self, policy: Any) -> list[str]:
        if policy.network_mode == NetworkMode.PUBLIC:
            remedy = "set the task's network_mode to allowlist, or to no-network"
            raise Unsupported(self._kind, "open network", "sandboxes reach listed hosts only", remedy)
        if policy.network_mode == NetworkMode.NO_NETWORK:
            return []
        return [f"{host}:{port}" for host in policy.allowed_hosts for port in self._ports]

    def _make(self) -> Sandbox:
        limits, own = Limits(), self.task_env_config
        memory = self._effective_memory_mb * MIB if self._effective_memory_mb else 2048 * MIB
        disk = own.storage_mb * MIB if own.storage_mb else limits.disk
        chosen = Limits(memory=memory, cpus=self._effective_cpus, disk=min(disk, memory), pids=2048)
        network = self._rules(self.network_policy) or _NOBODY
        return Sandbox.create(
            self._kind, image=self._image, limits=chosen, network=network, fleet=self._fleet, token=self._token
        )

    async def start(self, force_build: bool) -> None:
        """Make the sandbox; nothing is built."""
        del force_build
        self._sandbox = await asyncio.to_thread(self._make)

    async def stop(self, delete: bool) -> None:
        """End it; nothing of it stays, ``delete`` or not."""
        del delete
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            await asyncio.to_thread(sandbox.close)

    @property
    def sandbox(self) -> Sandbox:
        """The sandbox. Raises SandboxError before ``start``."""
        if self._sandbox is None:
            raise SandboxError("the environment was not started: await start() first")
        return self._sandbox

    async def _apply_network_policy(self, network_policy: Any) -> None:
        await asyncio.to_thread(self.sandbox.set_policy, self._rules(network_policy) or _NOBODY)

    async def upload_file(self, source_path: Path | str, target_path: str) -> None:
        """A file of this machine."""
        await asyncio.to_thread(self.sandbox.upload, Path(source_path), target_path)

    async def upload_dir(self, source_dir: Path | str, target_dir: str) -> None:
        """A directory of this machine."""
        await asyncio.to_thread(self.sandbox.upload, Path(source_dir), target_dir)

    async def download_file(self, source_path: str, target_path: Path | str) -> None:
        """A file to this machine, in place of what is there."""
        await asyncio.to_thread(self._download, source_path, Path(target_path))

    async def download_dir(self, source_dir: str, target_dir: Path | str) -> None:
        """A directory to this machine; files that are there are replaced, others stay."""
        await asyncio.to_thread(self._download, source_dir, Path(target_dir))

    def _download(self, path: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".nautile-", dir=target.parent) as scratch:
            found = Path(scratch, "found")
            self.sandbox.download(path, found)
            if found.is_dir():
                shutil.copytree(found, target, dirs_exist_ok=True)
            else:
                os.replace(found, target)

    async def exec(
        self,
        command: str,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_sec: int | None = None,
        user: str | int | None = None,
    ) -> Any:
        """A command of bash. A failing sandbox is an error, a failing command is not; at its time limit the status is 124."""
        if self._resolve_user(user) is not None:
            why, remedy = "a sandbox has one user, without rights over it", "leave user out"
            raise Unsupported(self._kind, f"command as user {self._resolve_user(user)!r}", why, remedy)
        argv, environment = ["/bin/bash", "-c", command], self._merge_env(env)
        result = await asyncio.to_thread(self.sandbox.run, argv, timeout_sec or _LONGEST, cwd=cwd, env=environment)
        if result.infrastructure_error is not None:
            raise SandboxError(result.infrastructure_error)
        code = _TIMED_OUT if result.timed_out else result.exit_code
        return ExecResult(stdout=result.stdout, stderr=result.stderr, return_code=code)
