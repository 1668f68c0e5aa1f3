"""Why interrupted rollouts must go on instead of starting again: restarting favours short episodes, a replayed log does not.

    python bench/sandbox/bias.py [--episodes 4000] [--out bench/results/sandbox_bias.json]

The toy environment ends an episode after each step with probability 1/10: lengths are geometric with mean 10. Before each step
the client is preempted with probability 1/20. A restarted episode begins anew, with new draws, until one gets through. A
replayed one opens its trajectory log again, is given what is recorded, and goes on; the log is the real one, on the disk.
By theory restarting gives lengths of mean 1 / (1 - 0.9 x 0.95) = 6.90, replaying leaves 10.
"""

import argparse
import json
import math
import os
import platform
import random
import subprocess
import tempfile
import time
from pathlib import Path

from nautile.sandbox.log import TrajectoryLog

END, PREEMPTED, LONG = 0.1, 0.05, 20
HEAD = {"sandbox": "c-toy", "kind": "toy", "image": {"layers": [], "host_usr": True}, "limits": {}}


class PreemptedError(Exception):
    """The client was killed before a step."""


def uninterrupted(chance, _):
    """The truth."""
    length = 1
    while chance.random() >= END:
        length += 1
    return length, 0


def restarted(chance, _):
    """Thrown away and begun anew whenever it is preempted."""
    attempts = 0
    while True:
        length = 0
        while chance.random() >= PREEMPTED:
            length += 1
            if chance.random() < END:
                return length, attempts
        attempts += 1


def replayed(chance, place):
    """Gone on with from its log whenever it is preempted."""
    attempts = 0
    while True:
        log = TrajectoryLog.open(place, HEAD)
        try:
            return _steps(chance, log), attempts
        except PreemptedError:
            attempts += 1
        finally:
            log.close()


def _steps(chance, log):
    for length in range(1, 10_000):
        if not log.replaying and chance.random() < PREEMPTED:
            raise PreemptedError
        step = log.perform("step", {"n": length}, lambda _: {"done": chance.random() < END}, lambda _: "never")
        if step["done"]:
            return length
    raise AssertionError("an episode without end")


def mean(lengths):
    """(mean, half of its 95 % interval)."""
    middle = sum(lengths) / len(lengths)
    variance = sum((one - middle) ** 2 for one in lengths) / (len(lengths) - 1)
    return middle, 1.96 * math.sqrt(variance / len(lengths))


def wilson(count, total, z=1.96):
    """The 95 % interval of a share."""
    share = count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return middle - half, middle + half


def summary(lengths, attempts):
    middle, half = mean(lengths)
    long = sum(one >= LONG for one in lengths)
    return {
        "episodes": len(lengths),
        "preemptions": attempts,
        "mean_length": round(middle, 3),
        "mean_length_interval": [round(middle - half, 3), round(middle + half, 3)],
        f"share_of_{LONG}_steps_or_more": round(long / len(lengths), 4),
        f"share_of_{LONG}_steps_or_more_interval": [round(one, 4) for one in wilson(long, len(lengths))],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = {}
    for name, episode in (("uninterrupted", uninterrupted), ("restarted", restarted), ("replayed", replayed)):
        chance = random.Random(f"{arguments.seed} {name}")
        with tempfile.TemporaryDirectory() as place:
            done = [episode(chance, Path(place, str(number))) for number in range(arguments.episodes)]
        found[name] = summary([length for length, _ in done], sum(attempts for _, attempts in done))
    true = 1 / END
    low, high = found["restarted"]["mean_length_interval"]
    assert high < true, "restarting should have favoured short episodes"
    low, high = found["replayed"]["mean_length_interval"]
    assert low <= true <= high, "replaying should have left the lengths as they are (one run in twenty misses by chance)"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    head = {"device": f"{platform.machine()}, {os.cpu_count()} processors", "date": time.strftime("%Y-%m-%d"), "commit": commit}
    theory = {"uninterrupted": true, "restarted": round(1 / (1 - (1 - END) * (1 - PREEMPTED)), 3), "replayed": true}
    text = json.dumps({**head, "seed": arguments.seed, "mean_length_by_theory": theory, **found}, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
