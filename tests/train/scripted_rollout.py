"""A policy that plays a script token by token, slowly, so that a process can be killed anywhere in it; and that process.

``python scripted_rollout.py DIRECTORY SUBSTRATE KILLS SEED``: starts to roll out what ``PLAN`` says in a child, kills it with
SIGKILL after a random number of tokens, again and again, lets the last child finish, and prints every sample as JSON.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from nautile.agent.tools import TOOLS
from nautile.config import ModelConfig
from nautile.engine.request import Finished, TokenSampled, Usage
from nautile.engine.sampling import uniform
from nautile.protocol import Tokenizer, encode, texts
from nautile.train.rollout import Planned, RolloutConfig, roll_out

NANO = Path(__file__).parents[2] / "src" / "nautile" / "weights" / "nano"
PLAN = [Planned(number, number // 3, "count_lines", 7) for number in range(6)]
CONFIG = RolloutConfig(turns=6, reply_tokens=400, tokens=4000, at_once=3)
COUNTED = "runs.txt"  # every run of a tool adds a line


def turns_of(seed):
    """Three calls that each leave a line, with thoughts of random length, then an answer."""
    lengths = [1 + int(60 * uniform(seed, turn)) for turn in range(4)]
    for turn in range(3):
        command = f"echo {turn} >> {COUNTED}; sleep 0.05"
        call = {"id": "c", "type": "function", "function": {"name": "run", "arguments": json.dumps({"command": command})}}
        yield {"role": "assistant", "content": "", "reasoning_content": "so " * lengths[turn], "tool_calls": [call]}
    yield {"role": "assistant", "content": "17", "reasoning_content": "so " * lengths[3]}


@dataclass
class Scripted:
    """What ``roll_out`` needs of an engine. Which turn and token comes next is read off the prompt."""

    tokenizer: Tokenizer
    delay: float
    config: ModelConfig

    @classmethod
    def load(cls, delay=0.0):
        """With nano's tokenizer."""
        return cls(Tokenizer.load(NANO), delay, ModelConfig.preset("nano"))

    def reply(self, seed, turn):
        """Ids of a turn, its end of sentence included."""
        opening = [{"role": "system", "content": "", "tools": list(TOOLS)}, {"role": "user", "content": "x"}]
        message = list(turns_of(seed))[turn]
        before = encode(opening, tokenizer=self.tokenizer, dialect="0731")
        after = encode([*opening, message], tokenizer=self.tokenizer, dialect="0731")
        ids = list(after.ids[len(before.ids) :])
        return ids if ids[-1] == self.tokenizer.special(texts.EOS) else [*ids, self.tokenizer.special(texts.EOS)]

    def submit_sync(self, request):
        """See ``Engine.submit_sync``."""
        prompt, mark = list(request.prompt_ids), self.tokenizer.special(texts.ASSISTANT)
        turn = prompt.count(mark) - 1
        done = len(prompt) - 1 - prompt[::-1].index(mark) - 0
        known = len(prompt) - done - 2  # after the mark comes <think>
        return _Stream(self, self.reply(request.sampling.seed, turn)[known:][: request.sampling.max_tokens], len(prompt))


class _Stream:
    def __init__(self, policy, ids, position):
        self.policy, self.events = policy, itertools.chain(
            (TokenSampled(token, 0, -uniform(token, position + index)) for index, token in enumerate(ids)),
            [Finished("stop", Usage(position, 0, len(ids)))],
        )  # fmt: skip

    def __iter__(self):
        for event in self.events:
            time.sleep(self.policy.delay)
            yield event

    def close(self):
        pass


def main(directory, substrate):
    """Roll out and print."""
    engine = Scripted.load(0.001)
    config = replace(CONFIG, substrate=substrate)
    for sample in roll_out(engine, PLAN, directory, config, {"weights": "scripted"}):
        ids = [[list(segment.prompt), list(segment.ids), list(segment.logprobs)] for segment in sample.segments]
        print(json.dumps({**sample.record(), "ids": ids}), flush=True)


def _wait(child, log, more):
    """Until the log has grown by ``more`` bytes, whatever the machine's speed, or the child has ended by itself."""
    size, deadline = log.stat().st_size if log.exists() else 0, time.monotonic() + 60
    while (log.stat().st_size if log.exists() else 0) < size + more and time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.005)


def killed(directory, substrate, kills, seed):
    """``kills`` children that do not finish (those that do come to an end early), then one that does."""
    rng = random.Random(seed)
    for _ in range(kills):
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            main(directory, substrate)
            os._exit(0)
        _wait(child, directory / "tokens.wal", rng.randrange(300, 6000))
        time.sleep(rng.choice((0, 0, 0.03)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    main(directory, substrate)


if __name__ == "__main__":
    killed(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
