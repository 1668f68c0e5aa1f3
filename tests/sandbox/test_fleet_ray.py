"""Edges under Ray: on two nodes of a cluster in this machine, each with its actor. ``pip install 'nautile[ray]'``."""

import os
import signal
import time

import pytest

from nautile.sandbox import Sandbox
from nautile.sandbox.fleet import wire
from nautile.sandbox.fleet.client import Fleet
from nautile.sandbox.fleet.quota import Quota, issue
from nautile.sandbox.fleet.ray import edge_names, launch
from sandbox.conftest import SMALL, need
from sandbox.test_fleet import Process, seen


def test_every_node_has_an_edge_of_its_own_name():
    hosts = ["Big.Host", "big-host", "other", "big-host", "x" * 60, "x" * 60]
    names = edge_names([{"NodeID": str(number), "NodeManagerHostname": host} for number, host in enumerate(hosts)])
    assert list(names) == [str(number) for number in range(6)] and len(set(names.values())) == 6
    assert [names[one] for one in "0123"] == ["big-host", "big-host-2", "other", "big-host-3"]
    assert all(wire.is_edge_name(name) for name in names.values())


@pytest.fixture
def cluster():
    """Two nodes. Nothing of Ray is left after it."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'nautile[ray]'")
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=small)
    try:
        found.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        ray.init(address=found.address, log_to_driver=False)
        yield ray
    finally:
        ray.shutdown()
        found.shutdown()


def answers_again(nodes, seconds=60.0):
    """Whether every edge does, in the end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if all(ray_get(actor.answers.remote()) for actor in nodes.actors.values()):
                return True
        except Exception:  # an actor that is being started again says so in several ways
            time.sleep(0.2)
    return False


def ray_get(reference):
    import ray  # noqa: PLC0415

    return ray.get(reference, timeout=30)


@pytest.mark.slow
def test_an_actor_on_each_node_keeps_an_edge_running(cluster, tmp_path):
    need("bwrap")
    nodes = launch(str(tmp_path / "state"), options=["--orphan", "60"])
    token = issue(tmp_path / "tokens.json", "lab", Quota())
    edges = [option for url in nodes.urls for option in ("--edge", url)]
    gateway = Process("gateway", str(tmp_path / "tokens.json"), *edges, "--listen", "127.0.0.1:0")
    try:
        assert len(nodes.actors) == len(set(nodes.urls)) == 2
        fleet, used = Fleet(gateway.url, token), set()
        seen(fleet, 2)
        while len(used) < 2:  # both are placed on
            with Sandbox.create("function", limits=SMALL, fleet=fleet) as sandbox:
                assert sandbox.run("echo here").stdout == "here\n"
                used.add(sandbox.info.id.partition(".")[0])
        first, second = nodes.actors.values()
        before = ray_get(first.process.remote())
        os.kill(before, signal.SIGKILL)  # its supervisor starts it again
        cluster.kill(second, no_restart=False)  # and Ray its supervisor, at the same address
        urls = nodes.urls
        assert answers_again(nodes) and nodes.urls == urls and ray_get(first.process.remote()) != before
        seen(fleet, 2)
        with Sandbox.create("function", limits=SMALL, fleet=fleet) as sandbox:
            assert sandbox.run("echo again").stdout == "again\n"
        processes = [ray_get(actor.process.remote()) for actor in nodes.actors.values()]
    finally:
        gateway.end()
        nodes.stop()
    assert not any(os.path.exists(f"/proc/{process}") for process in processes)
