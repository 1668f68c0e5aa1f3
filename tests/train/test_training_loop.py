"""Training: a resumed run is the run, packed documents do not see each other, Muon's step is what the paper says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nautile.checkpoint import load_model
from nautile.config import ModelConfig
from nautile.model import Transformer
from nautile.model.initialise import initialise
from nautile.quant import mxfp4
from nautile.train.data import batches
from nautile.train.loop import Trainer
from nautile.train.losses import Batch, LossWeights, training_losses
from nautile.train.optimizer import Muon, OptimizerConfig, Optimizers, newton_schulz, split_parameters
from nautile.train.run_state import RunError
from nautile.train.stages import load_weights, run_stage, save_weights, stage_config
from oracles.random_models import tiny_network

LENGTH = 256


@pytest.fixture
def shards(tmp_path):
    """Three shards of 4 rows: two documents a row."""
    generator = np.random.default_rng(0)
    for shard in range(3):
        documents = np.zeros((4, LENGTH), np.uint16)
        documents[:, 128:] = 128
        ids = generator.integers(3, 60, (4, LENGTH)).astype(np.uint16)
        np.savez(tmp_path / f"shard-{shard:05d}.npz", ids=ids, documents=documents, loss=np.ones((4, LENGTH), np.uint8))
    (tmp_path / "done").touch()
    return tmp_path


def new_model():
    return initialise(Transformer(tiny_network((0, 4, 128), seed=1).config.replace(initializer_range=0.02)), seed=3)


def config(steps):
    return stage_config("pretrain", batch_rows=2, steps=steps, compile=False, warmup_steps=2, save_every=1000, qat=False)


def test_a_resumed_run_is_the_run(shards, tmp_path):
    """Four steps in one process, and two, a fresh process, two more: the same weights, bit for bit, and the same cursor."""
    schedule = config(4)
    whole = new_model()
    progress = run_stage(whole, shards, tmp_path / "whole", schedule, lambda row: None)
    trainer = Trainer(new_model(), schedule, tmp_path / "half")
    feed = batches(shards, 2, torch.device("cpu"))
    trainer.fit(feed, lambda row: None, until=2)
    resumed_model = new_model()
    resumed = run_stage(resumed_model, shards, tmp_path / "half", schedule, lambda row: None)
    assert (resumed.step, resumed.shard, resumed.row) == (progress.step, progress.shard, progress.row) == (4, 1, 4)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed_model.state_dict()[name]), name


def test_a_checkpoint_of_another_model_is_refused(shards, tmp_path):
    run_stage(new_model(), shards, tmp_path / "run", config(1), lambda row: None)
    other = initialise(Transformer(tiny_network((0, 4), seed=1).config))
    with pytest.raises(RunError, match="another configuration"):
        run_stage(other, shards, tmp_path / "run", config(2), lambda row: None)


def test_saved_weights_come_back(tmp_path):
    model = new_model()
    save_weights(model, tmp_path / "weights.safetensors")
    again = load_weights(model.config, tmp_path / "weights.safetensors", "cpu")
    for name, tensor in model.state_dict().items():
        assert torch.allclose(again.state_dict()[name].float(), tensor.float(), rtol=2**-8, atol=0), name


def test_the_shipped_directory_continues_exactly():
    """Weights read from a model directory lie on the grid of its formats: quantisation-aware training begins where it ended."""
    shipped = Path(__file__).parents[2] / "src" / "nautile" / "weights" / "nano"
    model = load_weights(ModelConfig.preset("nano"), shipped, "cpu")
    state = load_model(shipped).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    before = model.layers[3].ffn.experts.w1.clone()
    assert torch.equal(mxfp4.fake_quant(before), before)
    assert model.layers[3].ffn.experts.w1.requires_grad


def test_documents_of_a_row_do_not_meet():
    """The loss of a row of two documents is the mean of the losses of the two alone."""
    model = new_model()
    ids = torch.randint(3, 60, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    documents = torch.zeros(1, LENGTH, dtype=torch.int64)
    documents[:, 128:] = 128
    weight = torch.ones(1, LENGTH)
    alone = [
        training_losses(model, Batch(ids[:, part], torch.zeros(1, 128, dtype=torch.int64), weight[:, part]), LossWeights())
        for part in (slice(0, 128), slice(128, 256))
    ]
    packed = training_losses(model, Batch(ids, documents, weight), LossWeights())
    assert abs(packed.next_token - (alone[0].next_token + alone[1].next_token) / 2) < 1e-5
    assert abs(packed.mtp - (alone[0].mtp + alone[1].mtp) / 2) < 1e-5


def test_the_indexer_learns_from_its_divergence_only():
    model = new_model()
    ids = torch.randint(3, 60, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    batch = Batch(ids, torch.zeros(1, LENGTH, dtype=torch.int64), torch.ones(1, LENGTH))
    inside = [name for name, _ in model.named_parameters() if ".indexer." in name]
    losses = training_losses(model, batch, LossWeights(indexer=1.0))
    losses.total.backward()
    gradients = dict(model.named_parameters())
    assert losses.indexer > 0 and all(gradients[name].grad.abs().sum() > 0 for name in inside)
    model.zero_grad()
    training_losses(model, batch, LossWeights()).total.backward()
    assert all(gradients[name].grad is None for name in inside)


def test_training_the_indexer_alone_moves_nothing_else(shards, tmp_path):
    """Not even weight decay and the experts' biases: what is frozen stays to the bit, and the divergence falls."""
    model = new_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = []
    schedule = stage_config(
        "indexer", batch_rows=2, steps=12, warmup_steps=1, decay_fraction=0.1, peak_lr=2e-2, log_every=1, qat=False
    )
    run_stage(model, shards, tmp_path / "run", schedule, rows.append)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(".indexer." in name for name in moved)
    assert rows[-1]["indexer"] < rows[0]["indexer"]


def test_the_long_stage_trains_the_indexer_and_the_rest(shards, tmp_path):
    model = initialise(Transformer(tiny_network((0, 4, 128), seed=1).config.replace(index_topk=8)), seed=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run_stage(model, shards, tmp_path / "run", stage_config("long", batch_rows=1, steps=2, qat=False), lambda row: None, 1)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(".indexer." in name for name in moved)
    assert "layers.0.attn.wq_b.weight" in moved


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 16, 16)])
def test_newton_schulz_orthogonalises(shape):
    out = newton_schulz(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(out)
    assert (values - 1).abs().max() < 0.1


def test_muon_step_is_the_formula():
    config = OptimizerConfig()
    weight = torch.nn.Parameter(torch.randn(6, 10, generator=torch.Generator().manual_seed(0)))
    before, momentum = weight.detach().clone(), torch.zeros(6, 10)
    optimizer = Muon([weight], 0.01, config)
    for seed in (1, 2):
        gradient = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed))
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + gradient
        update = newton_schulz((gradient + 0.95 * momentum)[None])[0] * (10**0.5 * 0.18)
        before = before * (1 - 0.01 * 0.1) - 0.01 * update
        assert torch.allclose(weight, before, atol=1e-6)


def test_the_split_is_v4s():
    model = new_model()
    muon, adam = split_parameters(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(parameter.dim() >= 2 for parameter in muon)
    in_adam = {names[id(parameter)] for parameter in adam}
    assert "embed.weight" in in_adam and "layers.0.hc_attn_base" in in_adam and "layers.1.attn.compressor.ape" in in_adam
    assert "layers.0.hc_attn_fn" not in in_adam and len(muon) + len(adam) == len(list(model.parameters()))
    assert Optimizers(model).adam.param_groups[1]["weight_decay"] == 0
