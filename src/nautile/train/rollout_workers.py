"""Rollouts in plain processes of one machine: each has the serving engine with its native kernels and a share of the samples.

The processes stay; for every step they read the model that the trainer has written, so they sample from exactly the values of
the file. A worker that dies is started again and goes on from its own write-ahead log. The native kernels note no decisions:
training routes by itself, and the difference of the log-probabilities is what shows whether the two agree.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import queue
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nautile.train.rollout import Planned, RolloutConfig, RolloutError, Sample, roll_out

__all__ = ["Job", "RolloutWorkers", "WorkerConfig"]

_RESTARTS = 3  # of one worker in one step


@dataclass(frozen=True)
class WorkerConfig:
    """``count`` processes of ``threads`` threads each, with the tokenizer of a directory; a step that takes longer than
    ``seconds`` is given up."""

    tokenizer: Path
    count: int
    threads: int = 2
    seconds: float = 600.0
    pool_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if min(self.count, self.threads) < 1:
            raise RolloutError("rollout workers: count and threads must be at least 1")


@dataclass(frozen=True)
class Job:
    """One worker's share of a step. ``number`` tells answers to an older job apart."""

    number: int
    model: Path
    plan: tuple[Planned, ...]
    directory: Path
    config: RolloutConfig
    head: Mapping[str, Any]


class RolloutWorkers:
    """Start with ``with``; ``roll_out`` as often as wanted. ``work`` makes the samples of one job in a worker."""

    def __init__(
        self,
        config: WorkerConfig,
        work: Callable[[Job, WorkerConfig], list[Sample]] | None = None,
        start_method: Literal["spawn", "fork"] = "spawn",  # a trainer holds threads and a device, which must not be forked
    ) -> None:
        self.config, self._work = config, work or _rolled
        self._context: Any = multiprocessing.get_context(start_method)
        self._processes: list[Any] = []
        self._jobs: list[Any] = []
        self._answers: list[Any] = []  # a pipe each: one that is killed in the middle of an answer holds nobody up
        self._number = 0

    def __enter__(self) -> RolloutWorkers:
        for index in range(self.config.count):
            self._jobs.append(self._context.Queue())
            self._processes.append(None)
            self._answers.append(None)
            self._start(index)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process, answers in zip(self._processes, self._answers, strict=True):
            process.join()
            answers.close()

    def roll_out(
        self,
        model: Path,
        plan: Sequence[Planned],
        directory: Path,
        config: RolloutConfig,
        head: Mapping[str, Any],
        progress: Callable[[Sample], None] = lambda sample: None,
    ) -> list[Sample]:
        """``rollout.roll_out`` on the model directory ``model``; samples are dealt to the workers in whole groups, which share
        their prompts. Logs lie in ``directory/worker-N``. Raises RolloutError."""
        count = self.config.count
        parts = [tuple(one for one in plan if one.group % count == index) for index in range(count)]
        self._number += 1
        jobs = {
            index: Job(self._number, model, part, directory / f"worker-{index:02d}", config, dict(head))
            for index, part in enumerate(parts)
            if part
        }
        for index, job in jobs.items():
            self._jobs[index].put(job)
        samples = [sample for part in self._collected(jobs) for sample in part]
        for sample in samples:
            progress(sample)
        order = {one.number: place for place, one in enumerate(plan)}
        return sorted(samples, key=lambda sample: order[sample.planned.number])

    def _collected(self, jobs: Mapping[int, Job]) -> list[list[Sample]]:
        """The answers of every worker that has a job; dead ones are started again with theirs."""
        found: dict[int, list[Sample]] = {}
        deadline, restarts = time.monotonic() + self.config.seconds, dict.fromkeys(jobs, 0)
        while len(found) < len(jobs):
            missing = sorted(set(jobs) - set(found))
            ready = multiprocessing.connection.wait([self._answers[index] for index in missing], 0.2)
            for index in missing:
                answer = self._received(index) if self._answers[index] in ready else None
                if isinstance(answer, str):
                    raise RolloutError(f"rollout worker {index} failed:\n{answer}")
                if answer is not None:
                    found[index] = answer
                elif not self._processes[index].is_alive():
                    restarts[index] += 1
                    self._revive(index, jobs[index], restarts[index])
            if time.monotonic() > deadline and len(found) < len(jobs):
                late = sorted(set(jobs) - set(found))
                raise RolloutError(f"rollout workers {late} did not finish within {self.config.seconds:.0f} s")
        return list(found.values())

    def _received(self, index: int) -> list[Sample] | str | None:
        """What a worker has to say of the job under way; None for an older job's answer, and for a worker that has ended."""
        try:
            number, answer = self._answers[index].recv()
        except (EOFError, OSError):  # also in the middle of an answer
            self._processes[index].join(10)
            return None
        return answer if number == self._number else None

    def _revive(self, index: int, job: Job, restarts: int) -> None:
        code = self._processes[index].exitcode
        if restarts > _RESTARTS:
            raise RolloutError(f"rollout worker {index} died {restarts} times in one step, last with exit status {code}")
        self._jobs[index] = self._context.Queue()  # the old one may still hold a job, or be locked by the dead process
        self._answers[index].close()
        self._start(index)
        self._jobs[index].put(job)

    def _start(self, index: int) -> None:
        self._answers[index], answers = self._context.Pipe(duplex=False)
        arguments = (self._jobs[index], answers, self.config, self._work, os.getpid())
        self._processes[index] = self._context.Process(target=_serve, args=arguments, daemon=True, name=f"rollout-{index}")
        self._processes[index].start()
        answers.close()  # the worker has the only end that writes: when it ends, the reader knows


def _serve(
    jobs: Any, answers: Any, config: WorkerConfig, work: Callable[[Job, WorkerConfig], list[Sample]], parent: int
) -> None:
    """A worker: job after job until the trainer ends. An error's traceback is its answer."""
    while True:
        try:
            job: Job = jobs.get(timeout=1.0)
        except queue.Empty:
            if os.getppid() != parent:
                return  # the trainer was killed
            continue
        try:
            answer: list[Sample] | str = work(job, config)
        except Exception:
            answer = traceback.format_exc()
        answers.send((job.number, answer))


def _rolled(job: Job, config: WorkerConfig) -> list[Sample]:
    """The job's samples by an engine of its own: weights change with every step."""
    from nautile.engine import Engine, EngineConfig  # noqa: PLC0415  # in the worker only

    options = EngineConfig(threads=config.threads, max_running=job.config.at_once, pool_bytes=config.pool_bytes)
    engine = Engine(job.model, options)
    try:
        return roll_out(engine, job.plan, job.directory, job.config, job.head)
    finally:
        engine.close()
