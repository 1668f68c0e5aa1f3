"""GRPO on small networks: no difference to the rollout, decisions replayed, rewards rise, a run goes on where it was."""

import copy
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nautile.checkpoint import load_model
from nautile.engine import SamplingParams
from nautile.model.transformer import Trace
from nautile.protocol import Tokenizer
from nautile.train.grpo import GRPO, GRPOConfig
from nautile.train.policy import behaviour, hidden_rows, own_routing, row_logprobs, unrolled_logprobs
from nautile.train.replay import Decisions, Recorder, replayed
from nautile.train.rollout import Planned, RolloutConfig, Sample, Segment
from nautile.train.rollout_engine import RolloutEngine, engine_options
from nautile.train.rollout_workers import WorkerConfig
from nautile.train.run_state import RunError
from nautile.train.unrolled import chunks, unrolled_logits
from oracles.random_models import random_ids, tiny_network

NANO = Path(__file__).parents[2] / "src" / "nautile" / "weights" / "nano"
SCHEDULE = (0, 4, 128, 4)
TOKENS = 16


def network(seed=1):
    return tiny_network(SCHEDULE, seed=seed, initializer_range=0.02)


def samples_of(model, recorder, deterministic, prompts, reward=lambda ids: 0.0, samples=2, seed=0):
    """Conversations of one turn with random ids, sampled by the rollout engine."""
    options = engine_options(model, 8, deterministic, pool_bytes=32 << 20)
    engine = RolloutEngine(copy.deepcopy(model), None, options, recorder, deterministic)
    made = []
    try:
        for group, prompt in enumerate(prompts):
            params = SamplingParams(
                temperature=1.0, logprobs=0, max_tokens=TOKENS, ignore_eos=True, seed=1000 * seed + group, n=samples
            )
            for index, done in enumerate(engine.generate([prompt], params)):
                segment = Segment(tuple(prompt), tuple(done.ids), tuple(event.logprob for event in done.logprobs))
                planned = Planned(group * samples + index, group, "edit_value", 0)
                made.append(Sample(planned, (segment,), "answered", "", reward(done.ids), "", "", ({},)))
    finally:
        engine.close()
    return made


def prompts_of(model, lengths):
    return [random_ids(model.config, length, seed).tolist() for seed, length in enumerate(lengths)]


class Toy(GRPO):
    """GRPO whose conversations are single turns and whose reward is higher for lower ids."""

    lengths, count = (20,), 4

    def _roll_out(self, place, stored, recorder, finished):
        place.mkdir(parents=True, exist_ok=True)
        size = self.model.config.vocab_size
        noted = recorder if self.config.replay or self.config.deterministic else None
        return samples_of(
            stored or self.model, noted, self.config.deterministic, prompts_of(self.model, self.lengths),
            lambda ids: 1 - sum(ids) / len(ids) / size, samples=self.count, seed=self.step,
        )  # fmt: skip


def toy(directory, model=None, kind=Toy, **changes):
    config = GRPOConfig(kinds=("edit_value",), **{"steps": 2, "groups": 2, "samples": 4, "lr": 2e-3, **changes})
    return kind(model or network(), None, config, directory)


# The difference between training and rollout


def test_unrolled_log_probabilities_are_the_rollouts_bit_for_bit():
    """At lengths around multiples of 4, 16, 128 and 256 tokens; top-k of the indexer in force (index_topk is 8)."""
    model = network()
    samples = samples_of(model, None, True, prompts_of(model, (1, 5, 127, 129, 250, 300)), samples=1)
    model.requires_grad_(True)
    for sample in samples:
        logprobs, _ = unrolled_logprobs(model, sample)
        assert torch.equal(logprobs.detach(), behaviour(sample)), len(sample.segments[0].prompt)
        assert logprobs.requires_grad


def test_rows_differ_by_rounding_only():
    model = network()
    recorder = Recorder()
    samples = samples_of(model, recorder, False, prompts_of(model, (40, 131)))
    logprobs, found = row_logprobs(model.requires_grad_(True), samples, recorder)
    assert found.missing == 0
    for sample, current in zip(samples, logprobs, strict=True):
        difference = (current.detach() - behaviour(sample)).abs().max()
        assert 0 < difference < 1e-4


def test_unrolled_gradients_are_those_of_the_rows():
    model = network().requires_grad_(True)
    sample = samples_of(model, None, True, prompts_of(model, (37,)), samples=1)[0]
    unrolled_logprobs(model, sample)[0].sum().backward()
    one = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    row_logprobs(model, [sample], None)[0][0].sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().clamp_min(1e-3)
            assert (one[name] - parameter.grad).abs().max() < 2e-3 * scale, name


def test_chunks_are_the_engines():
    assert list(chunks(600, 603, 256)) == [(0, 256), (256, 512), (512, 600), (600, 601), (601, 602), (602, 603)]
    assert list(chunks(256, 256, 256)) == [(0, 256)]


def test_unrolling_without_gradients_is_refused():
    with torch.no_grad(), pytest.raises(ValueError, match="gradients enabled"):
        unrolled_logits(network(), [1, 2, 3], 2, 256)


# Replay


def test_decisions_are_replayed_whatever_the_router_has_become():
    """After the weights have moved, the pass with notes takes the noted experts and entries, the pass without takes others."""
    model, recorder = network(), Recorder()
    samples = samples_of(model, recorder, False, prompts_of(model, (90, 150)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.std(correction=0))
    ids = torch.tensor([sample.ids[:-1] for sample in samples if len(sample.ids) == 90 + TOKENS])
    notes = [recorder.of(row) for row in ids.tolist()]
    free, bound = Trace(), Trace()
    with torch.no_grad():
        model.streams(ids, model.new_chunk(ids), trace=free)
        with replayed(model, Decisions.of(model, notes, ids.shape[1])):
            model.streams(ids, model.new_chunk(ids), trace=bound)
    routed = [index for index, layer in enumerate(model.layers) if layer.ffn.gate.bias is not None]
    for place, index in enumerate(routed):
        noted = torch.tensor([[note.experts[place].tolist() for note in row] for row in notes]).flatten(0, 1)
        assert torch.equal(bound.layers[index].routing.experts, noted)
        assert not torch.equal(free.layers[index].routing.experts, noted)
        weights = bound.layers[index].routing.weights.sum(-1)
        assert torch.allclose(weights, torch.full_like(weights, model.config.routed_scaling_factor), atol=1e-4)
    sparse = [index for index, ratio in enumerate(SCHEDULE) if ratio == 4]
    differing = 0
    for place, index in enumerate(sparse):
        for row, noted in enumerate(notes):
            for token, note in enumerate(noted):
                if note.picks[place] is not None:
                    count = note.picks[place][0]
                    picked = Decisions.of(model, [[note]], 1).picks[place][0, 0]
                    assert torch.equal(bound.layers[index].attention.selected[row, token, :count], picked)
                    assert not bound.layers[index].attention.selected[row, token, count:].any()
                    differing += not torch.equal(free.layers[index].attention.selected[row, token, :count], picked)
    assert differing > 0
    with torch.no_grad():
        assert torch.equal(model.streams(ids, model.new_chunk(ids)), model.streams(ids, model.new_chunk(ids)))
        after = Trace()
        model.streams(ids, model.new_chunk(ids), trace=after)
    assert torch.equal(after.layers[routed[-1]].routing.experts, free.layers[routed[-1]].routing.experts)  # nothing is left


def test_notes_survive_a_kill(tmp_path):
    """What the file gives back is what was noted, and a record that a crash cut is cut off."""
    model, path = network(), tmp_path / "decisions.bin"
    recorder = Recorder.at(path, model)
    sample = samples_of(model, recorder, False, prompts_of(model, (60,)), samples=1)[0]
    recorder.close()
    again = Recorder.at(path, model)
    again.close()
    for one, other in zip(recorder.of(sample.ids[:-1]), again.of(sample.ids[:-1]), strict=True):
        assert (one.experts == other.experts).all() and one.picks == other.picks
    assert any(note.picks[0] is not None for note in again.of(sample.ids[:-1]))
    path.write_bytes(path.read_bytes()[:-3])
    cut = Recorder.at(path, model)
    assert len(cut.decisions) == len(again.decisions) - 1
    more = samples_of(model, cut, False, prompts_of(model, (60,)), samples=1)[0]
    cut.close()
    assert more == sample and Recorder.at(path, model).decisions.keys() == again.decisions.keys()


def test_own_routing_counts_what_differs():
    model, recorder = network(), Recorder()
    sample = samples_of(model, recorder, False, prompts_of(model, (60,)), samples=1)[0]
    assert own_routing(model, sample, recorder).share == 0
    with torch.no_grad():
        for block in model.layers:
            block.ffn.gate.weight.copy_(torch.randn_like(block.ffn.gate.weight))
    assert own_routing(model, sample, recorder).share > 0.2


def test_notes_survive_the_prefix_cache():
    """The second sample of a group computes its prompt from the cache: the notes of the first are its notes."""
    model, recorder = network(), Recorder()
    prompt = prompts_of(model, (300,))
    samples = samples_of(model, recorder, False, prompt * 2, samples=2)
    assert all(note is not None for sample in samples for note in recorder.of(sample.ids[:-1]))
    hidden, found = hidden_rows(model, samples, recorder)
    assert found.missing == 0 and all(torch.isfinite(states).all() for states in hidden)


# Steps


class Pair(Toy):
    count = 2


@pytest.mark.parametrize(("deterministic", "qat"), [(True, False), (True, True), (False, False)])
def test_the_printed_difference(tmp_path, deterministic, qat):
    """Exactly zero in deterministic mode, also after an update and on the exported file's values; rounding otherwise."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 128, "o_lora_rank": 128} if qat else {}
    reports = []
    model = tiny_network((0, 4, 128), seed=1, **sizes)
    toy(tmp_path, model, Pair, deterministic=deterministic, qat=qat, steps=2).run(reports.append)
    for report in reports:
        assert report.unrecorded == 0 and report.grad_norm > 0
        assert f"max {report.difference_max:.3g}" in report.line()
        if deterministic:
            assert report.difference_max == 0 and report.routing_differs == 0
        else:
            assert 0 < report.difference_max < 1e-4


class Many(Toy):
    count = 12


def test_rewards_rise(tmp_path):
    reports = []
    toy(tmp_path, kind=Many, steps=12, lr=1e-2, kl=0.0, rows=12).run(reports.append)
    first, last = (sum(report.reward for report in part) / 3 for part in (reports[:3], reports[-3:]))
    assert last > first + 0.05, [round(report.reward, 3) for report in reports]


def test_a_group_of_one_reward_teaches_nothing(tmp_path):
    class Flat(Toy):
        def _roll_out(self, *arguments):
            return [replace(sample, reward=1.0) for sample in super()._roll_out(*arguments)]

    run = toy(tmp_path, kind=Flat, steps=1)
    before = copy.deepcopy(run.model.state_dict())
    reports = []
    run.run(reports.append)
    assert reports[0].dropped_groups == 1 and reports[0].difference_max > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


def test_a_resumed_run_is_the_run(tmp_path):
    whole = toy(tmp_path / "whole", steps=3)
    whole.run(lambda report: None)
    toy(tmp_path / "half", steps=1).run(lambda report: None)
    resumed = toy(tmp_path / "half", steps=3)
    resumed.run(lambda report: None)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    rows = [json.loads(line)["step"] for line in (tmp_path / "half" / "log.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3]


def test_other_options_and_other_models_are_refused(tmp_path):
    toy(tmp_path, steps=1).run(lambda report: None)
    with pytest.raises(RunError, match="another lr"):
        toy(tmp_path, lr=1.0).run(lambda report: None)
    with pytest.raises(RunError, match="another configuration"):
        toy(tmp_path, tiny_network((0, 4))).run(lambda report: None)


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path):
    class Broken(Toy):
        def _gradients(self, *arguments, **named):
            taught = super()._gradients(*arguments, **named)
            next(self.model.parameters()).grad.fill_(float("nan"))
            return taught

    toy(tmp_path, steps=1).run(lambda report: None)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(RunError, match="not a number in step 2"):
        toy(tmp_path, kind=Broken, steps=2).run(lambda report: None)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_options_that_mean_nothing_are_refused():
    for changes, text in (
        ({"samples": 1}, "two samples"),
        ({"kinds": ("follow_chain",)}, "held out"),
        ({"steps": 0}, "at least"),
    ):
        with pytest.raises(RunError, match=text):
            GRPOConfig(**{"kinds": ("edit_value",), **changes})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="apt-get install bubblewrap")
def test_nano_in_real_sandboxes(tmp_path):
    """The shipped model does real tasks; two steps, difference exactly zero, every conversation kept."""
    rollout = RolloutConfig(reply_tokens=120, turns=4, at_once=2)
    config = GRPOConfig(("edit_value", "count_lines"), steps=1, groups=2, samples=2, deterministic=True, rollout=rollout)
    reports = []
    GRPO(load_model(NANO), Tokenizer.load(NANO), config, tmp_path).run(reports.append)
    assert [report.difference_max for report in reports] == [0.0]
    assert len((tmp_path / "trajectories.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="apt-get install bubblewrap")
def test_workers_with_native_kernels_compute_the_same_network(tmp_path):
    """Training's log-probabilities are those of the native kernels but for rounding."""
    workers, rollout = WorkerConfig(NANO, 2, 1), RolloutConfig(reply_tokens=120, turns=4, at_once=2)
    config = GRPOConfig(
        ("edit_value", "last_line"), steps=1, groups=2, samples=2, qat=True, replay=False, workers=workers, rollout=rollout
    )
    reports = []
    GRPO(load_model(NANO), Tokenizer.load(NANO), config, tmp_path).run(reports.append)
    assert reports[0].samples == 4 and reports[0].difference_max < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="apt-get install bubblewrap")
def test_a_killed_command_goes_on_in_the_middle_of_its_rollouts(tmp_path):
    """``nautile train grpo`` with the shipped model, killed three times: the conversations of the run that nobody killed."""

    def command(out):
        options = ["--kinds", "last_line", "--steps", "1", "--groups", "1", "--samples", "3", "--reply-tokens", "80"]
        return [
            sys.executable,
            "-m",
            "nautile.cli",
            "train",
            "grpo",
            "--init",
            str(NANO),
            "--out",
            str(out),
            "--kl",
            "0",
            *options,
        ]

    def conversations(out):
        rows = [json.loads(line) for line in (out / "trajectories.jsonl").read_text().splitlines()]
        return [(row["number"], row["status"], row["reward"], row["sampled"], row["turns"]) for row in rows]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True, timeout=280)
    for seconds in (6.0, 8.0, 10.0):
        with subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(seconds)
            process.kill()
    subprocess.run(command(tmp_path / "killed"), check=True, capture_output=True, timeout=280)
    assert conversations(tmp_path / "killed") == conversations(tmp_path / "whole")
