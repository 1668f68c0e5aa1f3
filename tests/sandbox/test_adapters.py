"""Other projects' interfaces: SWE-ReX against its own abstract classes, Harbor against classes of the same shape."""

import asyncio
import enum
import importlib
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from nautile.sandbox import InvalidRequest, SandboxError, SubstrateUnavailable, Unsupported
from nautile.sandbox.adapters.swerex import deployment
from sandbox.conftest import SMALL

rex = pytest.importorskip("swerex.runtime.abstract", reason="swe-rex is missing: pip install swe-rex")
exceptions = pytest.importorskip("swerex.exceptions")
AbstractDeployment = pytest.importorskip("swerex.deployment.abstract").AbstractDeployment


def awaited(work):
    return asyncio.run(work)


@pytest.mark.usefixtures("crun")
def test_swe_rex_runs_its_sessions_commands_and_files_in_a_sandbox(tmp_path):
    (tmp_path / "up").write_text("uploaded")

    async def work():
        place = deployment(limits=SMALL)
        assert isinstance(place, AbstractDeployment)
        with pytest.raises(exceptions.DeploymentNotStartedError):
            _ = place.runtime
        await place.start()
        runtime = place.runtime
        assert isinstance(runtime, rex.AbstractRuntime) and await place.is_alive(timeout=60.0)
        await runtime.write_file(rex.WriteFileRequest(path="/workspace/rc", content="export FROM_RC=1\n"))
        await runtime.create_session(rex.CreateBashSessionRequest(startup_source=["/workspace/rc"], startup_timeout=60.0))
        with pytest.raises(exceptions.SessionExistsError):
            await runtime.create_session(rex.CreateBashSessionRequest())
        say = lambda command, **more: runtime.run_in_session(rex.BashAction(command=command, **more))  # noqa: E731
        await say("cd /tmp; x=$((40+2))  # a comment")
        seen = await say("pwd; echo $x $FROM_RC >&2; cat <<E\nhere\nE")
        assert (seen.output, seen.exit_code) == ("/tmp\n42 1\nhere\n", 0)
        assert (await say("printf 'no newline'; false", check="silent")).exit_code == 1
        assert (await say("read -r x; echo got $x $?", check="ignore")).output == "got 1\n"  # nobody types into it
        with pytest.raises(exceptions.NonZeroExitCodeError, match="exited with 3"):
            await say("(exit 3)")
        with pytest.raises(Unsupported, match="interaction"):
            await say("python3", is_interactive_command=True)
        with pytest.raises(exceptions.CommandTimeoutError):
            await say("sleep 30", timeout=0.3)
        with pytest.raises(exceptions.SessionDoesNotExistError):
            await say("true")
        await runtime.create_session(rex.CreateBashSessionRequest(session="two"))
        await runtime.close_session(rex.CloseBashSessionRequest(session="two"))
        done = await runtime.execute(
            rex.Command(command=["sh", "-c", "echo $A; echo e >&2; exit 4"], env={"A": "b"}, cwd="/tmp")
        )
        assert (done.stdout, done.stderr, done.exit_code) == ("b\n", "e\n", 4)
        both = await runtime.execute(rex.Command(command="echo o; echo e >&2", shell=True, merge_output_streams=True))
        assert both.stdout == "o\ne\n" and both.stderr == ""
        with pytest.raises(exceptions.NonZeroExitCodeError):
            await runtime.execute(rex.Command(command=["false"], check=True))
        with pytest.raises(exceptions.CommandTimeoutError):
            await runtime.execute(rex.Command(command=["sleep", "9"], timeout=0.2))
        with pytest.raises(InvalidRequest):
            await runtime.execute(rex.Command(command="echo"))
        await runtime.upload(rex.UploadRequest(source_path=str(tmp_path / "up"), target_path="/workspace/up"))
        assert (await runtime.read_file(rex.ReadFileRequest(path="/workspace/up"))).content == "uploaded"
        await place.stop()
        await place.stop()

    awaited(work())


class Mode(enum.StrEnum):
    """Of harbor.models.task.config."""

    NO_NETWORK = "no-network"
    PUBLIC = "public"
    ALLOWLIST = "allowlist"


@dataclass
class Policy:
    """Of the same."""

    network_mode: Mode = Mode.NO_NETWORK
    allowed_hosts: tuple = ()


class Base(ABC):
    """Harbor 0.25's BaseEnvironment, as far as an environment of another project meets it: the same abstract methods."""

    def __init__(self, environment_dir, environment_name, session_id, trial_paths, task_env_config, network_policy=None):
        self.environment_dir, self.environment_name, self.task_env_config = environment_dir, environment_name, task_env_config
        self.network_policy, self._persistent_env = network_policy or Policy(), {"TASK": "1"}
        self._effective_memory_mb, self._effective_cpus = task_env_config.memory_mb, task_env_config.cpus
        self._validate_definition()

    def _resolve_user(self, user):
        return user

    def _merge_env(self, env):
        return {**self._persistent_env, **(env or {})}

    async def set_network_policy(self, policy):
        await self._apply_network_policy(policy)

    @abstractmethod
    def type(self): ...

    @abstractmethod
    def _validate_definition(self): ...

    @abstractmethod
    def start(self): ...

    @abstractmethod
    def stop(self): ...

    @abstractmethod
    def upload_file(self): ...

    @abstractmethod
    def upload_dir(self): ...

    @abstractmethod
    def download_file(self): ...

    @abstractmethod
    def download_dir(self): ...

    @abstractmethod
    def exec(self): ...


@pytest.fixture
def harbor(monkeypatch):
    def module(name, **content):
        made = types.ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    for name in ("harbor", "harbor.environments", "harbor.models", "harbor.models.task"):
        module(name)
    module("harbor.environments.base", BaseEnvironment=Base, ExecResult=SimpleNamespace)
    capabilities = {"EnvironmentCapabilities": SimpleNamespace, "EnvironmentResourceCapabilities": SimpleNamespace}
    module("harbor.environments.capabilities", **capabilities)
    module("harbor.models.task.config", NetworkMode=Mode)
    monkeypatch.delitem(sys.modules, "nautile.sandbox.adapters.harbor", raising=False)
    yield importlib.import_module("nautile.sandbox.adapters.harbor").NautileEnvironment
    sys.modules.pop("nautile.sandbox.adapters.harbor", None)


CONFIG = SimpleNamespace(docker_image=None, memory_mb=96, cpus=1, storage_mb=16)


@pytest.mark.usefixtures("crun")
def test_a_harbor_environment_is_a_sandbox(harbor, tmp_path):
    async def work():
        place = harbor(tmp_path, "task", "s", None, CONFIG)
        assert place.type() == "nautile" and place.capabilities.disable_internet and place.preflight() is None
        with pytest.raises(SandboxError, match="not started"):
            await place.exec("true")
        await place.start(False)
        done = await place.exec("echo $TASK $X; pwd; exit 5", cwd="/tmp", env={"X": "y"})
        assert (done.stdout, done.return_code) == ("1 y\n/tmp\n", 5)
        assert (await place.exec("sleep 9", timeout_sec=1)).return_code == 124
        with pytest.raises(Unsupported, match="as user 'root'"):
            await place.exec("true", user="root")
        (tmp_path / "d").mkdir()
        (tmp_path / "d/f").write_text("x")
        await place.upload_dir(tmp_path / "d", "/workspace/d")
        await place.upload_file(tmp_path / "d/f", "/workspace/one")
        (tmp_path / "back").mkdir()
        (tmp_path / "back/stays").write_text("s")
        await place.download_dir("/workspace/d", tmp_path / "back")
        await place.download_file("/workspace/one", tmp_path / "back/f")
        assert {one.name: one.read_text() for one in (tmp_path / "back").iterdir()} == {"stays": "s", "f": "x"}
        await place.set_network_policy(Policy(Mode.ALLOWLIST, ("example.org",)))
        with pytest.raises(Unsupported, match="open network"):
            await place.set_network_policy(Policy(Mode.PUBLIC))
        await place.set_network_policy(Policy())
        await place.stop(True)

    awaited(work())


def test_a_harbor_task_that_needs_docker_says_what_to_do(harbor, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM scratch")
    with pytest.raises(InvalidRequest, match="--ek image"):
        harbor(tmp_path, "task", "s", None, CONFIG)
    assert harbor(tmp_path, "task", "s", None, CONFIG, image=str(tmp_path))


def test_without_the_other_project_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "swerex.deployment.abstract", None)
    with pytest.raises(SubstrateUnavailable, match="pip install swe-rex"):
        deployment()
    monkeypatch.setitem(sys.modules, "harbor", None)
    sys.modules.pop("nautile.sandbox.adapters.harbor", None)
    with pytest.raises(SubstrateUnavailable, match="pip install harbor"):
        importlib.import_module("nautile.sandbox.adapters.harbor")
