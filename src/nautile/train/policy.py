"""Log-probabilities of sampled tokens under the network that is trained, with gradients: by rows, or as the rollout ran.

By rows: whole conversations, padded into one pass, routed as the rollout was routed. As the rollout ran: chunk by chunk, for
runs in which the difference to the rollout must be zero (``nautile.train.unrolled``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nautile.model import Transformer
from nautile.model.transformer import Trace
from nautile.train.replay import Decision, Decisions, Recorder, agreement, decisions_of, replayed
from nautile.train.rollout import Sample, Segment
from nautile.train.rollout_engine import SNAPSHOT_EVERY
from nautile.train.unrolled import chunks, unrolled_logits

__all__ = ["Agreement", "behaviour", "hidden_rows", "row_logprobs", "sampled_places", "unrolled_logprobs"]


@dataclass
class Agreement:
    """How many expert picks of a rollout the training pass would have made otherwise."""

    differing: int = 0
    compared: int = 0
    missing: int = 0  # tokens that the rollout's runner has no note of

    @property
    def share(self) -> float:
        """Of all compared picks, those that differ."""
        return self.differing / max(self.compared, 1)


def behaviour(sample: Sample) -> Tensor:
    """Log-probabilities that the rollout noted, in order, [n] float64."""
    return torch.tensor([value for segment in sample.segments for value in segment.logprobs], dtype=torch.float64)


def sampled_places(sample: Sample) -> Tensor:
    """Positions of the sampled tokens in the conversation, [n] int64."""
    places = [len(part.prompt) + index for part in sample.segments for index in range(len(part.ids))]
    return torch.tensor(places, dtype=torch.int64)


def _chosen(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax at ``ids``, as the engine takes it: in float64."""
    return logits.double().log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)


def hidden_rows(model: Transformer, samples: Sequence[Sample], recorder: Recorder | None) -> tuple[list[Tensor], Agreement]:
    """Hidden states [n, d] that predict the sampled tokens of each sample: one pass over padded rows.

    With a recorder the pass routes and picks as the rollouts did.
    """
    device = model.embed.weight.device
    lengths = [len(sample.ids) - 1 for sample in samples]  # the last token is never taken in
    rows = [[*sample.ids[:-1], *[0] * (max(lengths) - length)] for sample, length in zip(samples, lengths, strict=True)]
    ids = torch.tensor(rows, dtype=torch.int64, device=device)
    found = Agreement()
    if recorder is None:
        hidden = model.hidden(model.streams(ids, model.new_chunk(ids, lengths=torch.tensor(lengths))))
    else:
        notes = [recorder.of(sample.ids[:-1]) for sample in samples]
        decisions = Decisions.of(model, notes, ids.shape[1])
        found.missing = decisions.missing
        with replayed(model, decisions):
            hidden = model.hidden(model.streams(ids, model.new_chunk(ids, lengths=torch.tensor(lengths))))
    places = [sampled_places(sample).to(device) - 1 for sample in samples]
    return [hidden[row, where] for row, where in enumerate(places)], found


def row_logprobs(model: Transformer, samples: Sequence[Sample], recorder: Recorder | None) -> tuple[list[Tensor], Agreement]:
    """For each sample [n] float64 with gradients, and how well its routing could be replayed."""
    hidden, found = hidden_rows(model, samples, recorder)
    device = model.embed.weight.device
    logprobs = []
    for sample, states in zip(samples, hidden, strict=True):
        ids = torch.tensor([token for part in sample.segments for token in part.ids], device=device)
        logprobs.append(_chosen(model.logits(states), ids))
    return logprobs, found


@torch.no_grad()
def own_routing(model: Transformer, sample: Sample, recorder: Recorder) -> Agreement:
    """What the training pass decides by itself, compared with the rollout's notes."""
    ids = torch.tensor([sample.ids[:-1]], dtype=torch.int64, device=model.embed.weight.device)
    trace = Trace()
    model.streams(ids, model.new_chunk(ids), trace=trace)
    notes = recorder.of(sample.ids[:-1])
    differing, compared = agreement(notes, decisions_of(model, trace, [ids.shape[1]], ids.shape[1])[0])
    return Agreement(differing, compared, sum(note is None for note in notes))


def unrolled_logprobs(model: Transformer, sample: Sample, recorder: Recorder | None = None) -> tuple[Tensor, Agreement]:
    """[n] float64 with gradients, computed segment by segment exactly as the deterministic rollout did."""
    parts, found = [], Agreement()
    for segment in sample.segments:
        traces: list[Trace] | None = [] if recorder is not None else None
        logits = unrolled_logits(model, (*segment.prompt, *segment.ids), len(segment.prompt), SNAPSHOT_EVERY, traces)
        parts.append(_chosen(logits, torch.tensor(segment.ids, device=logits.device)))
        if recorder is not None and traces is not None:
            notes = recorder.of((*segment.prompt, *segment.ids[:-1]))
            differing, compared = agreement(notes, _unrolled_decisions(model, segment, traces))
            found.differing += differing
            found.compared += compared
            found.missing += sum(note is None for note in notes)
    return torch.cat(parts), found


def _unrolled_decisions(model: Transformer, segment: Segment, traces: Sequence[Trace]) -> list[Decision]:
    spans = chunks(len(segment.prompt), len(segment.prompt) + len(segment.ids) - 1, SNAPSHOT_EVERY)
    decided: list[Decision] = []
    for (start, end), trace in zip(spans, traces, strict=True):
        decided += decisions_of(model, trace, [end - start], end - start)[0]
    return decided
