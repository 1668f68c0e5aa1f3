"""Edges on the machines of a Ray cluster: one actor a node, which keeps its edge running; never one a sandbox.

    import ray
    from nautile.sandbox.fleet.ray import launch
    ray.init(address="auto")
    nodes = launch("/var/lib/nautile", secret_file="/shared/secret")
    print(nodes.urls)                      # one a line for `nautile sandbox gateway --edges-file`

An actor whose process dies is started again by Ray on its node; the edge finds its sandboxes as after any restart. ``pip
install 'nautile[ray]'``.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nautile.sandbox.errors import SubstrateUnavailable
from nautile.sandbox.fleet.supervisor import Supervisor, node_name

__all__ = ["EdgeActor", "Nodes", "edge_names", "launch"]


class EdgeActor:
    """What runs on a node: a supervisor and its edge."""

    def __init__(self, name: str, state: str, secret_file: str | None, options: list[str], address: str | None = None) -> None:
        host = address or _own_address()
        place = Path(state) / name
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        given = ["--state", str(place), "--evict", *options]  # an edge may outlive its actor's process
        secret = None
        if secret_file is not None:
            secret = Path(secret_file).read_text(encoding="utf-8").strip()
            given += ["--secret-file", secret_file, "--listen", f"{host}:{_port(place)}"]
        else:
            given += ["--listen", f"unix:{place}/edge.sock"]
        self.supervisor = Supervisor(name, given, secret)
        self.supervisor.start()

    def url(self) -> str:
        """Where gateways find the edge."""
        return self.supervisor.url

    def answers(self) -> bool:
        """Whether the edge answers now."""
        return self.supervisor.answers()

    def process(self) -> int:
        """The edge's process."""
        return self.supervisor.process

    def stop(self) -> None:
        """End the edge with its sandboxes."""
        self.supervisor.stop()


def _own_address() -> str:
    """This machine's address, as its nodes see it."""
    import ray  # noqa: PLC0415

    return str(ray.util.get_node_ip_address())


def _port(place: Path) -> int:
    """The port that an edge keeps from run to run, chosen once: gateways know it there."""
    file = place / "port"
    if not file.exists():
        with socket.socket() as found:
            found.bind(("", 0))
            file.write_text(str(found.getsockname()[1]))
    return int(file.read_text())


@dataclass(frozen=True)
class Nodes:
    """The actors, by Ray's node id."""

    actors: dict[str, Any]

    @property
    def urls(self) -> list[str]:
        """Of every edge."""
        import ray  # noqa: PLC0415

        return list(ray.get([actor.url.remote() for actor in self.actors.values()]))

    def stop(self) -> None:
        """End every edge and its actor."""
        import ray  # noqa: PLC0415

        ray.get([actor.stop.remote() for actor in self.actors.values()])
        for actor in self.actors.values():
            ray.kill(actor)


def edge_names(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """By Ray's node id: the edge's name, which is its machine's. Of several nodes on a machine the others get a number."""
    names: dict[str, str] = {}
    for node in sorted(nodes, key=lambda one: str(one["NodeID"])):
        name = node_name(str(node["NodeManagerHostname"]))
        numbered = (f"{name[:36].strip('-')}-{number}" for number in range(2, len(nodes) + 2))
        names[node["NodeID"]] = (
            name if name not in names.values() else next(one for one in numbered if one not in names.values())
        )
    return names


def launch(state: str, *, secret_file: str | None = None, options: list[str] | None = None) -> Nodes:
    """An edge on every node that is alive now; ``state`` and ``secret_file`` are paths on each of them.

    Without ``secret_file`` edges listen on Unix sockets: for a cluster of one machine. Raises SubstrateUnavailable.
    """
    try:
        import ray  # noqa: PLC0415
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415
    except ImportError as error:
        raise SubstrateUnavailable("fleet", f"Ray is not installed ({error})", "pip install 'nautile[ray]'") from None
    made = {}
    for node, name in edge_names([node for node in ray.nodes() if node["Alive"]]).items():
        where = NodeAffinitySchedulingStrategy(node, soft=False)
        actor = ray.remote(EdgeActor).options(num_cpus=0, max_restarts=-1, scheduling_strategy=where)
        made[node] = actor.remote(name, state, secret_file, options or [])
    ray.get([actor.url.remote() for actor in made.values()])
    return Nodes(made)
