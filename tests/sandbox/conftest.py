"""Sandboxes shared by the tests of one process, and the rule that a missing package is a skip here and an error in CI."""

import contextlib
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from nautile.sandbox import MIB, Limits, Sandbox
from nautile.sandbox import container as container_module
from nautile.sandbox.container import KeeperClient
from nautile.sandbox.guest.hosted import hosts_directory, stop_hosts

SMALL = Limits(memory=96 * MIB, pids=48, disk=16 * MIB, inodes=2000, output=64 * 1024, seconds=30.0)


def need(program):
    if shutil.which(program) is None:
        text = f"{program} is missing: make setup-sandbox"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)


@pytest.fixture
def own_keeper():
    """A keeper for one test alone: its directory. What is there at the end has been forgotten by nobody."""
    with keeper_directory("one") as place:
        yield place


@pytest.fixture(scope="session", autouse=True)
def keeper_of_this_process():
    """Test processes side by side, and whatever else of this user runs, have keepers of their own."""
    with keeper_directory("all") as place:
        yield place


@contextlib.contextmanager
def keeper_directory(name):
    above = Path("/run") if os.geteuid() == 0 else Path(tempfile.gettempdir())
    place = above / f"nautile-test-{os.getpid()}-{name}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(container_module, "_runtime_directory", lambda: place)
        yield place
        KeeperClient().stop()
        if (machines := hosts_directory()).is_dir():
            stop_hosts()
            shutil.rmtree(machines, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)


def client_code(script):
    """The source of another process's program that uses the keeper of this one."""
    place = str(KeeperClient().place)
    return (
        "from pathlib import Path\nfrom nautile.sandbox import container\n"
        f"container._runtime_directory = lambda: Path({place!r})\n{script}"
    )


def arrives_while_it_runs(sandbox):
    """Output is given to ``on_output`` while the command runs: it does not end before somebody has heard what it said first."""
    seen, first = [], threading.Event()

    def watch(name, data):
        seen.append((name, bytes(data)))
        first.set()

    def answer():
        if first.wait(60):
            sandbox.write("heard", "")

    answering = threading.Thread(target=answer)
    answering.start()
    script = "echo a; until [ -e heard ]; do sleep 0.02; done; rm heard; echo b >&2"
    result = sandbox.run(script, timeout=90, on_output=watch)
    answering.join()
    assert (result.exit_code, result.stdout, result.stderr) == (0, "a\n", "b\n")
    assert seen == [("stdout", b"a\n"), ("stderr", b"b\n")]


@pytest.fixture(scope="session")
def function():
    need("bwrap")
    with Sandbox.create("function", limits=SMALL) as sandbox:
        yield sandbox


@pytest.fixture(scope="session")
def crun():
    need("crun")


@pytest.fixture(scope="session")
def container(crun):
    with Sandbox.create("container", limits=SMALL) as sandbox:
        yield sandbox


@pytest.fixture(params=["function", "container"])
def sandbox(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def fresh(crun):
    """Make containers that end with the test."""
    made = []

    def create(**options):
        made.append(Sandbox.create("container", **{"limits": SMALL, **options}))
        return made[-1]

    yield create
    for one in made:
        one.close()
