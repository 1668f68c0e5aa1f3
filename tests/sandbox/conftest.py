"""Sandboxes shared by the tests of one process, and the rule that a missing package is a skip here and an error in CI."""

import os
import shutil

import pytest

from nautile.sandbox import MIB, Limits, Sandbox

SMALL = Limits(memory=96 * MIB, pids=48, disk=16 * MIB, inodes=2000, output=64 * 1024, seconds=30.0)


def need(program):
    if shutil.which(program) is None:
        text = f"{program} is missing: make setup-sandbox"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)


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
