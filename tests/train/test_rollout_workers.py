"""Rollouts in processes: every sample once and in order, also when a worker is killed; errors come with their traceback."""

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from nautile.train.distill import DistillConfig, Teacher
from nautile.train.grpo import GRPOConfig
from nautile.train.rollout import Planned, RolloutConfig, RolloutError, Sample
from nautile.train.rollout_workers import RolloutWorkers, WorkerConfig
from nautile.train.run_state import RunError

PLAN = [Planned(number, number // 2, "edit_value", number) for number in range(10)]


def scripted(job, config):
    """Samples without a model. The first worker that is given group 3 kills itself, once; group 99 is an error."""
    job.directory.mkdir(parents=True, exist_ok=True)
    groups = {one.group for one in job.plan}
    if 99 in groups:
        raise ValueError("no such group")
    mark = job.directory / "killed"
    if 3 in groups and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [Sample(one, (), "answered", str(os.getpid()), 1.0, "", "", ()) for one in job.plan]


def test_a_killed_worker_goes_on_and_nothing_is_lost(tmp_path):
    with RolloutWorkers(WorkerConfig(Path(), 2), scripted, "fork") as workers:
        samples = workers.roll_out(Path(), PLAN, tmp_path, RolloutConfig(), {})
        assert [sample.planned for sample in samples] == PLAN
        assert (tmp_path / "worker-01" / "killed").exists()
        assert len({sample.answer for sample in samples}) == 2
        assert {len({one.answer for one in samples if one.planned.group == group}) for group in range(5)} == {1}
        with pytest.raises(RolloutError, match="no such group"):
            workers.roll_out(Path(), [Planned(0, 99, "edit_value", 0)], tmp_path, RolloutConfig(), {})


def half_an_answer(job, config):
    """``scripted``, but the second worker is killed in the middle of handing over, once."""
    samples, mark = scripted(job, config), job.directory / "half"
    if job.directory.name == "worker-01" and not mark.exists():
        mark.touch()

        def dying(self, data, *more):
            os.write(self._handle, bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        Connection._send = dying  # in this process only
    return samples


def test_a_worker_that_is_killed_in_the_middle_of_its_answer_holds_nobody_up(tmp_path):
    plan = [one for one in PLAN if one.group != 3]
    with RolloutWorkers(WorkerConfig(Path(), 2, seconds=60), half_an_answer, "fork") as workers:
        for step in range(2):
            samples = workers.roll_out(Path(), plan, tmp_path / str(step), RolloutConfig(), {})
            assert [sample.planned for sample in samples] == plan
            assert (tmp_path / str(step) / "worker-01" / "half").exists()


def test_workers_and_notes_do_not_go_together():
    for changes in ({"qat": False, "replay": False}, {"qat": True, "replay": True}):
        with pytest.raises(RunError, match="use qat, and neither replay"):
            GRPOConfig(("edit_value",), workers=WorkerConfig(Path(), 1), **changes)
        with pytest.raises(RunError, match="use qat, and no replay"):
            DistillConfig((Teacher("a", Path(), ("edit_value",)),), workers=WorkerConfig(Path(), 1), **changes)
