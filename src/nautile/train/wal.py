"""The write-ahead log of one step's rollouts: every sampled token is in it before anything follows from it.

One JSON list a line, appended by one process. After a kill at any point a sample goes on from the tokens it has: they are fed
again to rebuild its state, never sampled again. Starting unfinished samples anew would favour short ones, for they are the
ones that get finished. A line that a power cut left half-written is dropped. Tokens survive a kill of the process at once, and
a power cut as of the end of their turn.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

__all__ = ["Logged", "Turn", "WalError", "WriteAheadLog"]


class WalError(RuntimeError):
    """The log is of another run, in use, or damaged; the text says what to do."""


@dataclass
class Turn:
    """One turn of one sample. ``context``: ids that stand before it and are new; ``starts``: where each request began."""

    context: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)


@dataclass
class Logged:
    """All that is known of one sample. ``end`` once it is over: status, answer, reward, reason."""

    turns: list[Turn] = field(default_factory=list)
    end: dict[str, Any] | None = None


class WriteAheadLog:
    """Appends from many threads; one process at a time."""

    def __init__(self, path: Path, descriptor: int, samples: dict[int, Logged], restarts: int) -> None:
        self.path, self.samples, self.restarts = path, samples, restarts
        self._descriptor, self._lock = descriptor, threading.Lock()

    @classmethod
    def open(cls, path: Path, head: dict[str, Any]) -> Self:
        """Begin a log, or take up the one of this run: ``head`` must be what it was begun with. Raises WalError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.ftruncate(descriptor, whole)
            lines = data[:whole].splitlines()
            samples, restarts = _read(path, lines, head)
        except BlockingIOError:
            os.close(descriptor)
            raise WalError(f"{path} is in use by another process") from None
        except BaseException:
            os.close(descriptor)
            raise
        log = cls(path, descriptor, samples, restarts)
        log._append(["restart"] if lines else ["head", head], sync=True)
        return log

    def context(self, sample: int, turn: int, ids: tuple[int, ...]) -> Turn:
        """Turn ``turn`` of a sample begins after the new ids ``ids``; gives what is known of it. Raises WalError when the log
        has other ids there: the run that wrote it was given something else."""
        turns = self.samples[sample].turns
        if turn < len(turns):
            if turns[turn].context != ids:
                raise WalError(f"{self.path}: sample {sample} was shown something else before turn {turn}: use a new directory")
            return turns[turn]
        turns.append(Turn(ids))
        self._append(["context", sample, list(ids)], sync=False)
        return turns[turn]

    def request(self, sample: int, turn: int) -> None:
        """The engine is asked to go on after the tokens that are known."""
        known = self.samples[sample].turns[turn]
        known.starts.append(len(known.tokens))
        self._append(["request", sample, turn, len(known.tokens)], sync=False)

    def token(self, sample: int, turn: int, token: int, logprob: float) -> None:
        """A token was sampled."""
        known = self.samples[sample].turns[turn]
        known.tokens.append(token)
        known.logprobs.append(logprob)
        self._append(["token", sample, turn, token, logprob], sync=False)

    def flush(self) -> None:
        """On the disk from here on, whatever happens to the machine."""
        os.fdatasync(self._descriptor)

    def end(self, sample: int, end: dict[str, Any]) -> None:
        """A sample is over."""
        self.samples[sample].end = end
        self._append(["end", sample, end], sync=True)

    def close(self) -> None:
        """Unlock and close; twice is harmless."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def _append(self, record: list[Any], sync: bool) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            if sync:
                os.fdatasync(self._descriptor)


def _read(path: Path, lines: list[bytes], head: dict[str, Any]) -> tuple[dict[int, Logged], int]:
    samples: dict[int, Logged] = defaultdict(Logged)
    restarts = 0
    for number, line in enumerate(lines):
        try:
            match json.loads(line):
                case ["head", found]:
                    if found != json.loads(json.dumps(head)):
                        raise WalError(f"{path} is the log of another run: use a new directory, or the options of that run")
                case ["restart"]:
                    restarts += 1
                case ["context", sample, ids]:
                    samples[sample].turns.append(Turn(tuple(ids)))
                case ["request", sample, turn, start]:
                    samples[sample].turns[turn].starts.append(start)
                case ["token", sample, turn, token, logprob]:
                    samples[sample].turns[turn].tokens.append(token)
                    samples[sample].turns[turn].logprobs.append(logprob)
                case ["end", sample, end]:
                    samples[sample].end = end
                case _:
                    raise ValueError("unknown record")
        except (ValueError, IndexError, TypeError) as error:
            raise WalError(
                f"{path}, line {number + 1}, is damaged ({error}): remove the step's directory to start it anew"
            ) from None
    if lines and not lines[0].startswith(b'["head"'):
        raise WalError(f"{path} does not begin like a log of rollouts: use another directory")
    return samples, restarts
