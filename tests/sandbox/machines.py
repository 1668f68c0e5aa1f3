"""What the tests of virtual machines share: how one is made, and that a missing part is a skip here and an error in CI."""

import os

import pytest

from nautile.sandbox import MIB, Limits, Sandbox, SubstrateUnavailable
from sandbox.conftest import need

SMALL = Limits(memory=96 * MIB, pids=48, disk=16 * MIB, inodes=2000, output=64 * 1024, seconds=60.0)
PARTS = ("qemu-system-x86_64", "bwrap", "gcc")


def create(kind="microvm", **options):
    """A machine; skips or fails when this machine lacks a part."""
    for program in PARTS:
        need(program)
    try:
        return Sandbox.create(kind, **{"limits": SMALL, "allow_emulation": True, **options})
    except SubstrateUnavailable as error:
        if "no kernel for guests" not in str(error) and "is missing" not in str(error):
            raise
        text = f"{error} (make setup-sandbox)"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
