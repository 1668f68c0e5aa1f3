"""On-policy distillation: an exact divergence, rebuilt logits that are the teacher's, several teachers approached at once."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nautile.checkpoint import load_model, save_model
from nautile.protocol import Tokenizer
from nautile.train.distill import Distill, DistillConfig, Teacher, _cache_hidden, reverse_kl
from nautile.train.policy import hidden_rows, sampled_places
from nautile.train.rollout import Planned
from nautile.train.run_state import RunError
from oracles.random_models import tiny_network
from train.test_grpo import prompts_of, samples_of

NANO = Path(__file__).parents[2] / "src" / "nautile" / "weights" / "nano"
SCHEDULE = (0, 4, 128)
KINDS = ("edit_value", "count_lines")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(NANO)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two specialists of other widths than the student, as directories."""
    made = []
    for index, kind in enumerate(KINDS):
        path = tmp_path_factory.mktemp("teacher") / kind
        model = tiny_network(SCHEDULE, seed=10 + index, hidden_size=128, moe_intermediate_size=32)
        save_model(model, path, tokenizer_dir=NANO)
        made.append(Teacher(kind, path, (kind,)))
    return tuple(made)


class Toy(Distill):
    """Conversations are single turns over random prompts; they alternate between the kinds."""

    def _roll_out(self, place, stored, recorder, finished):
        place.mkdir(parents=True, exist_ok=True)
        samples = samples_of(self.model, recorder, False, prompts_of(self.model, (20, 30)), samples=3, seed=self.step)
        kinds = [KINDS[sample.planned.group] for sample in samples]
        for sample, kind in zip(samples, kinds, strict=True):
            object.__setattr__(sample, "planned", Planned(sample.planned.number, sample.planned.group, kind, 0))
        return samples


def toy(directory, teachers, tokenizer, **changes):
    config = DistillConfig(teachers, **{"steps": 2, "lr": 5e-3, **changes})
    return Toy(tiny_network(SCHEDULE, seed=3), tokenizer, config, directory)


def test_the_divergence_is_kls_definition():
    student, teacher = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = torch.distributions.Categorical(logits=student)
    exact = torch.distributions.kl_divergence(ours, torch.distributions.Categorical(logits=teacher))
    assert torch.allclose(reverse_kl(student, teacher).double(), exact, atol=1e-6)
    assert reverse_kl(student, student).abs().max() < 1e-6


def test_rebuilt_logits_are_the_teachers(tmp_path, teachers):
    """From the cached hidden states and the cached head alone, what the whole teacher computes."""
    student = tiny_network(SCHEDULE, seed=3)
    samples = samples_of(student, None, False, prompts_of(student, (25, 40)), samples=1)
    _cache_hidden(teachers[0], samples, tmp_path / "cache", 1, torch.device("cpu"))
    cached = load_file(tmp_path / "cache")
    whole = load_model(teachers[0].path)
    for sample in samples:
        with torch.no_grad():
            logits = whole(torch.tensor([sample.ids[:-1]]))[0, sampled_places(sample) - 1]
        rebuilt = torch.nn.functional.linear(cached[str(sample.planned.number)], cached["head"])
        assert (rebuilt - logits).abs().max() < 1e-5


def test_chunked_gradients_are_the_whole_ones(tmp_path, teachers, tokenizer):
    """Logits of three tokens at a time, or of all at once through plain autograd: the same gradients."""
    run = toy(tmp_path, teachers, tokenizer, chunk=3)
    samples = samples_of(run.model, None, False, prompts_of(run.model, (20, 28)), samples=1)
    teacher = load_model(teachers[0].path)
    with torch.no_grad():
        theirs = torch.cat(hidden_rows(teacher, samples, None)[0])
    hidden = torch.cat(hidden_rows(run.model, samples, None)[0])
    total = run._backward(hidden, theirs, teacher.head.weight, 0.5)
    chunked = {name: parameter.grad.clone() for name, parameter in run.model.named_parameters() if parameter.grad is not None}
    run.model.zero_grad()
    hidden = torch.cat(hidden_rows(run.model, samples, None)[0])
    whole = reverse_kl(run.model.logits(hidden), teacher.logits(theirs)).sum()
    (0.5 * whole).backward()
    assert abs(total - whole.item()) < 1e-3
    for name, parameter in run.model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, chunked[name], rtol=1e-3, atol=1e-5), name


def test_both_teachers_are_approached(tmp_path, teachers, tokenizer):
    reports = []
    toy(tmp_path, teachers, tokenizer, steps=8).run(reports.append)
    for kind in KINDS:
        first, last = reports[0].divergence[kind], reports[-1].divergence[kind]
        assert last < 0.8 * first, (kind, first, last)
    assert set(json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["divergence"]) == set(KINDS)
    assert f"KL {KINDS[0]}" in reports[0].line()


def test_a_resumed_run_is_the_run(tmp_path, teachers, tokenizer):
    whole = toy(tmp_path / "whole", teachers, tokenizer, steps=2)
    whole.run(lambda report: None)
    toy(tmp_path / "half", teachers, tokenizer, steps=1).run(lambda report: None)
    resumed = toy(tmp_path / "half", teachers, tokenizer, steps=2)
    resumed.run(lambda report: None)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    with pytest.raises(RunError, match="another lr"):
        toy(tmp_path / "half", teachers, tokenizer, lr=1.0).run(lambda report: None)


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path, teachers, tokenizer):
    other = copy.copy(teachers[0])
    path = tmp_path / "other"
    save_model(load_model(other.path), path, tokenizer_dir=NANO)
    data = json.loads((path / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    one, two = "Ġthe", "Ġof"
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(RunError, match="another tokenizer"):
        toy(tmp_path / "run", (Teacher("other", path, KINDS),), tokenizer)


def test_teachers_without_kinds_or_names_are_refused(teachers):
    with pytest.raises(RunError, match="no kind"):
        Teacher("a", teachers[0].path, ())
    with pytest.raises(RunError, match="names of their own"):
        DistillConfig((teachers[0], teachers[0]))
    with pytest.raises(RunError, match="needs a teacher"):
        DistillConfig(())
