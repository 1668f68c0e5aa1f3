"""An engine that the machine has no room for is refused at its start."""

from __future__ import annotations

import pytest

from nautile.engine import Engine, EngineConfig
from nautile.engine import engine as engine_module
from nautile.engine.memory import free_host_memory
from oracles.random_models import tiny_network


def machine(root, available=None, limit=None, current=0, inactive=0):
    (root / "proc").mkdir()
    (root / "sys/fs/cgroup").mkdir(parents=True)
    if available is not None:
        (root / "proc/meminfo").write_text(f"MemTotal: 900 kB\nMemAvailable: {available} kB\n")
    if limit is not None:
        (root / "sys/fs/cgroup/memory.max").write_text(f"{limit}\n")
        (root / "sys/fs/cgroup/memory.current").write_text(f"{current}\n")
        (root / "sys/fs/cgroup/memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")
    return root


@pytest.mark.parametrize(
    ("told", "free"),
    [
        ({"available": 500}, 500 * 1024),
        ({"available": 500, "limit": "max"}, 500 * 1024),
        ({"available": 500, "limit": 10_000, "current": 4000, "inactive": 1000}, 7000),
        ({"available": 5, "limit": 10_000}, 5 * 1024),
        ({"limit": 100, "current": 300}, 0),
        ({}, None),
    ],
)
def test_what_is_free_is_what_machine_and_group_both_have(tmp_path, told, free):
    assert free_host_memory(machine(tmp_path, **told)) == free


def test_a_pool_that_is_too_large_for_the_machine_is_refused(monkeypatch):
    model = tiny_network((0, 4), seed=1)
    sizes = EngineConfig(pool_bytes=2 << 20, snapshot_bytes=1 << 20, host_bytes=3 << 20, max_running=1, runner="torch")
    for free, fits in ((6 << 20, True), (3 << 20, False), (None, True)):
        monkeypatch.setattr(engine_module, "free_host_memory", lambda free=free: free)
        if fits:
            Engine(model, sizes).close()
        else:
            with pytest.raises(ValueError, match=r"pool_bytes, snapshot_bytes and host_bytes want .* GiB are free: lower them"):
                Engine(model, sizes)
