"""pass@1 of an agent on tool tasks that no training run has seen, with Wilson's interval.

Every task is a directory made from a held-out seed; the agent works on it through the same loop and sandbox as a user's, and
the task's own grader looks at the answer and the directory.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import platform
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

from nautile.agent.client import ChatClient
from nautile.agent.loop import Agent, Budget
from nautile.agent.tools import TOOLS
from nautile.agent.workbench import InProcess
from nautile.sandbox import ToolSandbox, open_sandbox
from nautile.train.renaming import HELD_OUT_RENAMING
from nautile.train.tasks import DEMO_KINDS, HELD_OUT_START, KINDS

__all__ = ["BAR", "DEMO_BAR", "EvalConfig", "KindScore", "Outcome", "Report", "evaluate", "evaluate_in_processes", "wilson"]

BAR = 0.60  # of all tasks
DEMO_BAR = 0.98  # of each kind of the demo, judged in a full run
_FAILURES_KEPT = 60


@dataclass(frozen=True)
class EvalConfig:
    """What to measure. ``seeds`` tasks a kind; in a full run the kinds of the demo get ``demo_seeds``."""

    kinds: tuple[str, ...] = tuple(KINDS)
    seeds: int = 20
    demo_seeds: int | None = None
    first_seed: int = HELD_OUT_START
    held_out_wording: bool = False
    renamed_tools: bool = False  # tools and parameters under names that no training run has seen
    confined: bool = True
    budget: Budget = field(default_factory=lambda: Budget(steps=12, tokens=8192, reply_tokens=512, tool_seconds=20.0))

    @classmethod
    def full(cls, kinds: Sequence[str] = tuple(KINDS)) -> EvalConfig:
        """Every seed of the bar: 50 a kind, 300 for each kind of the demo."""
        return cls(kinds=tuple(kinds), seeds=50, demo_seeds=300)

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ValueError(f"unknown kind {', '.join(unknown) or '(none given)'}; choose from {', '.join(KINDS)}")
        if self.seeds < 1:
            raise ValueError("at least one seed a kind is needed")
        if self.first_seed < HELD_OUT_START:
            raise ValueError(f"seeds below {HELD_OUT_START} are for training; begin at {HELD_OUT_START} or above")

    def cases(self) -> list[tuple[str, int]]:
        """(kind, seed) of every task. Kinds take turns, so that a run that is cut short has seen them all."""
        counts = {kind: self.demo_seeds if self.demo_seeds and kind in DEMO_KINDS else self.seeds for kind in self.kinds}
        rounds = range(max(counts.values()))
        return [(kind, self.first_seed + turn) for turn in rounds for kind in self.kinds if turn < counts[kind]]


@dataclass(frozen=True)
class Outcome:
    """One task."""

    kind: str
    seed: int
    passed: bool
    status: str
    prompt: str
    answer: str
    expected: str | None
    tokens: int


@dataclass(frozen=True)
class KindScore:
    """Tasks passed of a kind; ``low`` and ``high`` bound the true share with 95 % confidence."""

    passed: int
    total: int
    low: float
    high: float


@dataclass(frozen=True)
class Report:
    """All outcomes of a run and how it was made."""

    outcomes: tuple[Outcome, ...]
    config: EvalConfig
    model: str
    seconds: float
    commit: str = "unknown"  # of the code when the run began
    processes: int = 1
    together: int = 1  # tasks at a time in one process, batched by the engine
    known: int = 0  # outcomes that an earlier part of the run, cut short, had measured

    def score(self, kind: str | None = None) -> KindScore:
        """The score of one kind, or of everything."""
        chosen = [outcome.passed for outcome in self.outcomes if kind in (None, outcome.kind)]
        return KindScore(sum(chosen), len(chosen), *wilson(sum(chosen), len(chosen)))

    @property
    def met(self) -> bool:
        """Whether the bar is met: overall, and in a full run on every kind of the demo as well."""
        judged = [kind for kind in self.config.kinds if kind in DEMO_KINDS] if self.config.demo_seeds else []
        return _share(self.score()) >= BAR and all(_share(self.score(kind)) >= DEMO_BAR for kind in judged)

    def to_json(self) -> dict[str, Any]:
        """For machines; ``pass@1`` comes first, then ``kinds``."""
        total, config = self.score(), self.config
        failures = [outcome for outcome in self.outcomes if not outcome.passed]
        return {
            "pass@1": round(_share(total), 4),
            "kinds": {kind: _rounded(self.score(kind)) for kind in config.kinds},
            "total": _rounded(total),
            "bar": {"pass@1": BAR, **({"demo_kinds": DEMO_BAR} if config.demo_seeds else {}), "met": self.met},
            "model": self.model,
            "sandbox": "bubblewrap" if config.confined else "in-process",
            "held_out_wording": config.held_out_wording,
            "renamed_tools": config.renamed_tools,
            "first_seed": config.first_seed,
            "device": device_name(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": self.commit,
            "seconds": round(self.seconds, 1),
            "processes": self.processes,
            "together": self.together,
            **({"measured_before": self.known} if self.known else {}),
            "failures": [vars(outcome) for outcome in failures[:_FAILURES_KEPT]],
        }


def evaluate(
    client: ChatClient,
    config: EvalConfig,
    report_progress: Callable[[Outcome], None],
    known: Sequence[Outcome] = (),
    together: int = 1,
) -> Report:
    """Run every task once, but those whose outcome is ``known`` from a run that was cut short.

    ``together`` tasks run at a time, each in a thread of its own; the client must bear that (an engine batches what they ask
    and answers each as if it were alone). ``report_progress`` sees each new outcome, in this thread. Raises SandboxError when
    tools cannot be confined.
    """
    began, version = time.monotonic(), commit()
    outcomes = {(outcome.kind, outcome.seed): outcome for outcome in known}
    cases = config.cases()
    todo = [case for case in cases if case not in outcomes]
    for outcome in _outcomes(client, config, todo) if together == 1 else _outcomes_together(client, config, todo, together):
        outcomes[outcome.kind, outcome.seed] = outcome
        report_progress(outcome)
    ordered = tuple(outcomes[case] for case in cases)
    return Report(ordered, config, client.name, time.monotonic() - began, version, 1, together, len(known))


def evaluate_in_processes(
    open_client: Callable[[], ChatClient],
    config: EvalConfig,
    processes: int,
    report_progress: Callable[[Outcome], None],
    known: Sequence[Outcome] = (),
) -> Report:
    """``evaluate`` by several processes with a client and one thread each; outcomes in the order of the cases.

    ``open_client`` must survive pickling. Raises RuntimeError with the traceback of a process that fails.
    """
    outcomes = {(outcome.kind, outcome.seed): outcome for outcome in known}
    cases = config.cases()
    todo = [case for case in cases if case not in outcomes]
    if not todo:  # nothing is left to do
        return evaluate(open_client(), config, report_progress, known)
    began, version = time.monotonic(), commit()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [
        context.Process(target=_work, args=(open_client, config, todo[index::processes], queue), daemon=True)
        for index in range(min(processes, len(todo)))
    ]
    for worker in workers:
        worker.start()
    names: set[str] = set()
    try:
        while len(outcomes) < len(cases):
            item = _next_item(queue, workers)
            if isinstance(item, str):
                raise RuntimeError(f"a process of the evaluation failed:\n{item}")
            name, outcome = item
            names.add(name)
            outcomes[outcome.kind, outcome.seed] = outcome
            report_progress(outcome)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
    ordered = tuple(outcomes[case] for case in cases)
    return Report(ordered, config, names.pop(), time.monotonic() - began, version, len(workers), 1, len(known))


def _next_item(queue: Any, workers: Sequence[Any]) -> Any:
    """What the next process has to say; a traceback (str) when one of them died without a word."""
    while True:
        try:
            return queue.get(timeout=2.0)
        except Empty:
            dead = [worker.exitcode for worker in workers if worker.exitcode]
            if dead:
                return f"it ended with exit status {dead[0]}"


def _work(open_client: Callable[[], ChatClient], config: EvalConfig, cases: Sequence[tuple[str, int]], queue: Any) -> None:
    """The tasks of one process; each outcome goes into the queue, and so does the traceback of a failure."""
    parent = os.getppid()
    try:
        import torch  # noqa: PLC0415  # only here: a scripted client needs none

        torch.set_num_threads(1)
        client = open_client()
        for outcome in _outcomes(client, config, cases):
            queue.put((client.name, outcome))
            if os.getppid() != parent:
                return  # the measurement was killed: nobody wants the rest
    except Exception:
        queue.put(traceback.format_exc())


def _outcomes(client: ChatClient, config: EvalConfig, cases: Sequence[tuple[str, int]]) -> Iterator[Outcome]:
    for kind, seed in cases:
        yield _outcome(client, config, kind, seed)


def _outcomes_together(
    client: ChatClient, config: EvalConfig, cases: Sequence[tuple[str, int]], together: int
) -> Iterator[Outcome]:
    """Outcomes as they come; a new task begins when one ends, so that the batch stays full. An exception ends the rest."""
    queue = iter(cases)
    with ThreadPoolExecutor(together, thread_name_prefix="nautile-eval") as pool:
        running: set[Future[Outcome]] = set()
        try:
            while True:
                for kind, seed in itertools.islice(queue, together - len(running)):
                    running.add(pool.submit(_outcome, client, config, kind, seed))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in running:
                future.cancel()


def _outcome(client: ChatClient, config: EvalConfig, kind: str, seed: int) -> Outcome:
    """One task, run and graded."""
    task = KINDS[kind].from_seed(seed, held_out_wording=config.held_out_wording)
    with tempfile.TemporaryDirectory(prefix="nautile-eval-") as scratch:
        root, state = Path(scratch, "work"), Path(scratch, "state")
        root.mkdir()
        task.write(root)
        sandbox: ToolSandbox = open_sandbox(root) if config.confined else InProcess(root)
        tools: Sequence[Mapping[str, Any]] = TOOLS
        if config.renamed_tools:
            sandbox, tools = _RenamedSandbox(sandbox), HELD_OUT_RENAMING.specifications(TOOLS)
        ran = Agent(client, tools, sandbox, budget=config.budget, state=state).run(task.prompt)
        if ran.status == "interrupted":
            raise KeyboardInterrupt
        passed = ran.status == "answered" and task.grade(root, ran.answer)
        return Outcome(kind, seed, passed, ran.status, task.prompt, ran.answer, task.answer, ran.tokens)


class _RenamedSandbox:
    """A sandbox whose tools have other names: calls in those words reach the tools as they are."""

    def __init__(self, sandbox: ToolSandbox) -> None:
        self.sandbox, self.root, self.confinement = sandbox, sandbox.root, sandbox.confinement

    def call(self, program: Path, request: Mapping[str, Any], *, time_limit: float) -> dict[str, Any]:
        """See ``ToolSandbox``."""
        if "tool" in request and isinstance(request["arguments"], Mapping):
            name, arguments = HELD_OUT_RENAMING.original(request["tool"], request["arguments"])
            request = {**request, "tool": name, "arguments": arguments}
        return self.sandbox.call(program, request, time_limit=time_limit)


def wilson(passed: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share: (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n); (0, 1) for no trials."""
    if total == 0:
        return 0.0, 1.0
    share = passed / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _share(score: KindScore) -> float:
    return score.passed / score.total if score.total else 0.0


def _rounded(score: KindScore) -> dict[str, float]:
    return {"passed": score.passed, "total": score.total, "low": round(score.low, 4), "high": round(score.high, 4)}


def device_name() -> str:
    """The processor, as the kernel names it, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the machine's own word stands
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """The commit of the checkout this package lies in; the version when it is installed from a wheel."""
    file = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        from nautile import __version__  # noqa: PLC0415  # only without git

        return f"v{__version__}"


def measured_kinds(model: Path) -> dict[str, KindScore]:
    """Scores that lie beside a model's weights in ``evals.json`` (the output of ``nautile eval tools --out``)."""
    try:
        content: Mapping[str, Any] = json.loads((model / "evals.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {kind: KindScore(**score) for kind, score in content["kinds"].items() if kind in KINDS}
