"""The chaos experiments in small: all is killed at random, nothing is lost or done twice, and the counting would see it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.conftest import client_code

CHAOS = Path(__file__).parents[2] / "bench/sandbox/chaos.py"


def chaos(*arguments):
    code = client_code(
        f"import runpy, sys\nsys.argv = sys.argv[1:]\nsys.path.insert(0, {str(CHAOS.parent)!r})\n"
        f"runpy.run_path({str(CHAOS)!r}, run_name='__main__')"
    )
    argv = [sys.executable, "-c", code, str(CHAOS), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.usefixtures("crun")
def test_whatever_is_killed_nothing_is_lost_and_nothing_runs_twice():
    found = chaos("kills", "--kills", "60", "--seed", "5")
    assert (
        found["kills_in_all"] == 60
        and set(found["kills"]) >= {"client", "edge", "gateway", "agent"}
        and found["acknowledged_operations"] > 50
    )
    assert (found["acknowledged_and_lost"], found["run_twice"], found["contradictions"]) == (0, 0, 0), found["faults"]
    assert found["left"] == {"processes": 0, "directories": 0, "cgroups": 0, "mounts": 0, "keeper": None}


@pytest.mark.slow
@pytest.mark.usefixtures("crun")
def test_the_counting_catches_an_edge_that_carries_out_again():
    assert chaos("kills", "--kills", "60", "--seed", "3", "--careless")["run_twice"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("crun")
def test_containers_that_come_and_go_leave_nothing_even_when_their_edge_is_killed():
    found = chaos("cycles", "--cycles", "100", "--batch", "25", "--every", "50")
    assert found["failures"] == 0 and found["containers_found_again"] == "10/10"
    before, after = (found[f"descriptors_of_edge_keeper_and_namespaces_{when}"] for when in ("before", "after"))
    assert after[0] <= before[0] + 4 and after[1] <= before[1] + 4  # connections that are open just now
    assert found["left_at_the_end"] == {"processes": 0, "directories": 0, "cgroups": 0, "mounts": 0, "keeper": None}
