"""What one rank of a parallel test does; a module of its own because ranks are processes of their own."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from nautile.model.parallel import ContextState, shard_experts, shard_heads
from oracles.random_models import random_ids, tiny_network

TOKENS, PROMPT = 6, 540
SHAPE = {"o_groups": 4, "n_routed_experts": 10, "num_experts_per_tok": 3}


def new_model():
    return tiny_network((0, 4, 128, 4), seed=4, **SHAPE)


@torch.inference_mode()
def greedy(model, state, token, count):
    """Tokens and logits of ``count`` steps from a state whose last token's successor is ``token``."""
    found = []
    for _ in range(count):
        logits = model(torch.tensor([[token]]), state=state, logits="last")[0]
        token = int(logits.argmax())
        found.append((token, logits))
    return [token for token, _ in found], torch.stack([logits for _, logits in found])


@torch.inference_mode()
def alone(prompt):
    """The prompt's logits at every position, then tokens and logits of a greedy continuation, by one process."""
    model = new_model()
    state = model.new_state(1)
    logits = model(prompt, state=state)
    return logits, *greedy(model, state, int(logits[0, -1].argmax()), TOKENS)


@torch.inference_mode()
def divided(prompt, change):
    """The same with a model that ``change`` cuts."""
    model = change(new_model())
    state = model.new_state(1)
    logits = torch.cat([model(part, state=state) for part in prompt.split(300, dim=1)], dim=1)
    return logits, *greedy(model, state, int(logits[0, -1].argmax()), TOKENS)


@torch.inference_mode()
def in_slices(prompt, group, model):
    """The prompt over the ranks; the last one continues it. Logits of this rank's own tokens."""
    context = ContextState(model.config, prompt.shape[1], group)
    logits = model(prompt[:, context.own.start : context.own.stop], state=context)
    tokens, more = [], None
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        tokens, more = greedy(model, context.state, int(logits[0, -1].argmax()), TOKENS)
    return context.own, logits, tokens, more


def check(found, expected):
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-4)
        else:
            assert one == other


def check_slices(found, expected):
    own, logits, tokens, more = found
    check((logits,), (expected[0][:, own.start : own.stop],))
    if more is not None:
        check((tokens, more), expected[1:])


def rank_main(rank, ranks, directory):
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(ranks)})
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=ranks, timeout=timedelta(minutes=10)
    )
    everybody = dist.group.WORLD
    prompt = random_ids(new_model().config, PROMPT, seed=2)[None]
    expected = alone(prompt)
    if ranks == 2:
        check(divided(prompt, lambda model: shard_heads(model, everybody)), expected)
        check(divided(prompt, lambda model: shard_experts(model, everybody)), expected)
    check(divided(prompt, lambda model: shard_experts(shard_heads(model, everybody), everybody)), expected)
    check_slices(in_slices(prompt, everybody, new_model()), expected)
    if ranks == 4:  # two by two: heads and experts over pairs, the prompt over the two pairs
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        lines = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        pair, line = pairs[rank // 2], lines[rank % 2]
        model = shard_experts(shard_heads(new_model(), pair), pair)
        check_slices(in_slices(prompt, line, model), expected)
    dist.barrier()
    dist.destroy_process_group()
    (Path(directory) / f"done{rank}").touch()
