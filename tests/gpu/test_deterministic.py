"""What a sequence gets does not depend on which others run beside it, bit for bit: random batch mates, every kernel.

On a GPU the shapes are Flash's and there are more rounds: pytest tests/gpu/test_deterministic.py is the check of the
deterministic mode there.
"""

import pytest
import torch

from engine.flash_models import flash_config, packed
from nautile.engine.decode_step import StepOptions
from nautile.engine.expert_dispatch import Dispatch, Speeds
from nautile.engine.gpu_runner import GPURunner
from nautile.engine.plan import Piece, Plan
from nautile.kernels.fp4_experts import ExpertTiles, FewTiles, ManyTiles, fp4_experts
from nautile.kernels.index_select import index_select
from nautile.kernels.sparse_attention import sparse_attention
from nautile.state import PoolOptions, StatePool

from .test_fp4_experts import new_experts, routed
from .test_index_select import new_case
from .test_sparse_attention import new_pool


def some_of(tokens):
    """A random subset in random order."""
    return torch.randperm(tokens)[: int(torch.randint(1, tokens + 1, ()))]


@pytest.fixture
def rounds(device):
    return 20 if device.type == "cuda" else 1


@pytest.mark.parametrize("tiles_per_split", [0, 2])
def test_attention(tiles_per_split, rounds, device, dtype):
    heads, c, tokens = (64, 512, 40) if device.type == "cuda" else (16, 128, 4)
    near, far = (new_pool(rows, c, 64, True, device, dtype) for rows in (500, 3000))
    q, sink = torch.randn(tokens, heads, c, device=device).to(dtype), torch.randn(heads, device=device)
    near_ids = torch.randint(-1, 500, (tokens, 128), dtype=torch.int32, device=device)
    far_ids = torch.randint(-1, 3000, (tokens, 512 if device.type == "cuda" else 70), dtype=torch.int32, device=device)
    together = sparse_attention(q, near, near_ids, far, far_ids, sink, tiles_per_split=tiles_per_split)
    for _ in range(rounds):
        some = some_of(tokens).to(device)
        few = sparse_attention(q[some], near, near_ids[some], far, far_ids[some], sink, tiles_per_split=tiles_per_split)
        assert torch.equal(few, together[some])


@pytest.mark.parametrize("tiles", [ExpertTiles(16, 32, 64, 64, 4, 4), FewTiles(), ManyTiles()], ids=str)
def test_experts(tiles, rounds, device, dtype, request):
    if not isinstance(tiles, ExpertTiles):
        request.getfixturevalue("hopper")
    tokens, experts, inner, hidden = (40, 32, 2048, 4096) if device.type == "cuda" else (6, 4, 128, 256)
    weights = new_experts(experts, inner, hidden, device)
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    chosen, shares = routed(tokens, experts, 3, device)
    together = fp4_experts(x, chosen, shares, weights, tiles=tiles)
    for _ in range(rounds):
        some = some_of(tokens).to(device)
        assert torch.equal(fp4_experts(x[some], chosen[some], shares[some], weights, tiles=tiles), together[some])


def test_indexer(rounds, device, dtype):
    tokens, count = (16, 30000) if device.type == "cuda" else (3, 300)
    q, weights, keys, visible = new_case(tokens, 64, 128, count, device, dtype)
    _, together = index_select(q, weights, keys, visible, 100)
    for _ in range(rounds):
        some = some_of(tokens).to(device)
        _, few = index_select(q[some], weights[some], keys, visible[some], 100)
        assert torch.equal(few, together[some])


FLASH = {
    "vocab_size": 1024, "hidden_size": 4096, "num_attention_heads": 64, "head_dim": 512, "q_lora_rank": 1024, "o_groups": 8,
    "o_lora_rank": 1024, "sliding_window": 128, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512,
    "n_routed_experts": 32, "num_experts_per_tok": 6, "moe_intermediate_size": 2048,
}  # fmt: skip


@pytest.mark.parametrize("on_card", [1000, 40], ids=["all on the card", "some streamed"])
def test_a_step_of_the_network(on_card, device):
    """One sequence's logits, alone and among random others of any length, in any place of the batch: on a card bit for bit."""
    config = flash_config((0, 4, 128, 4), **(FLASH if device.type == "cuda" else {}))
    weights = packed(config, on_card, device=device)
    pool = StatePool(config, PoolOptions(blocks=130, slots=34, rows="packed", prefix_cache=False), device)
    dispatch = None if weights.store.all_on_card else Dispatch(weights.store, None, Speeds(1.0, 1.0))
    runner = GPURunner(weights, pool, dispatch, options=StepOptions(deterministic=True))
    generator = torch.Generator().manual_seed(4)

    def opened(length):
        sequence, ids = pool.open([0]), torch.randint(config.vocab_size, (length,), generator=generator).tolist()
        pool.ensure(sequence, length + 1)
        runner.step(Plan((Piece(sequence, tuple(ids), "none"),)))
        pool.append(sequence, ids)
        return sequence

    lengths = torch.randint(2, 700, (31,)).tolist() if device.type == "cuda" else [2, 9]
    own, mates = opened(300 if device.type == "cuda" else 40), [opened(length) for length in lengths]
    alone = runner.step(Plan((Piece(own, (7,)),)))[0]
    for count in (1, 7, 16, 31) if device.type == "cuda" else (2,):
        place = int(torch.randint(count + 1, ()))
        others = [Piece(mate, (int(torch.randint(config.vocab_size, ())),)) for mate in mates[:count]]
        plan = Plan((*others[:place], Piece(own, (7,)), *others[place:]))
        together = runner.step(plan)[place]
        exact = {"rtol": 0, "atol": 0} if device.type == "cuda" else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(together, alone, **exact)
