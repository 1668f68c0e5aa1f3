"""What the network did with a prompt, as data: indexer picks, experts, stream mixing, drafts. One pass of the modules.

The record is plain JSON. Compressed entries are named by their number; entry i of a CSA layer stands for tokens 4i to 4i + 3.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from nautile.model import Transformer
from nautile.model.transformer import Trace
from nautile.protocol import Tokenizer

__all__ = ["page", "record"]

_KINDS = {0: "window", 4: "csa", 128: "hca"}


@torch.inference_mode()
def record(
    model: Transformer, ids: Sequence[int], prompt_length: int, trace: Trace, tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    """Run ``ids`` (a prompt and what came after it) once; gives what each layer decided for each token.

    ``layers[i]``: kind; ``picked``: for each token ranges [first, last] of entries its query attended to; ``experts`` and
    ``weights`` [T][k]; ``mixing``: for each site pre [T][n], post [T][n] and matrix [T][n][n]. ``drafts``: for each
    position what the MTP block would have guessed for it and whether that is the token there.
    """
    device = model.embed.weight.device
    row = torch.tensor([list(ids)], device=device)
    chunk = model.new_chunk(row)
    streams = model.streams(row, chunk, trace=trace)
    logits = model.logits(model.hidden(streams))[0]
    chances = logits.log_softmax(-1)
    return {
        "format": "nautile trace 1",
        "prompt_length": prompt_length,
        "tokens": [
            {
                "id": token,
                "text": tokenizer.decode([token]) if tokenizer is not None else str(token),
                "logprob": round(float(chances[index - 1, token]), 4) if index else None,
            }
            for index, token in enumerate(ids)
        ],
        "window": model.config.sliding_window,
        "experts_of_a_layer": model.config.n_routed_experts,
        "layers": [
            _layer(number, model.config.layer_ratios[number], layer, len(ids)) for number, layer in enumerate(trace.layers)
        ],
        "drafts": _drafts(model, streams, row),
    }


def page(record_: dict[str, Any]) -> str:
    """One HTML page that shows a record and needs nothing else: script, style and data are inside."""
    template = resources.files("nautile.engine").joinpath("trace.html").read_text(encoding="utf-8")
    data = base64.b64encode(json.dumps(record_).encode()).decode()  # no text of a prompt can end the script element
    return template.replace("@DATA@", data)


def _layer(number: int, ratio: int, layer: Any, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {"layer": number, "kind": _KINDS.get(ratio, str(ratio)), "ratio": ratio}
    if layer.attention.selected is not None:
        selected = layer.attention.selected[0].expand(count, -1)
        found["picked"] = [_ranges(row) for row in selected]
    if layer.routing is not None:
        found["experts"] = layer.routing.experts.reshape(count, -1).tolist()
        found["weights"] = _rounded(layer.routing.weights.reshape(count, -1))
    if layer.mixing is not None:
        found["mixing"] = [
            {name: _rounded(part[0]) for name, part in zip(("pre", "post", "matrix"), site, strict=True)}
            for site in layer.mixing
        ]
    return found


def _ranges(row: Tensor) -> list[list[int]]:
    """True positions of a bool row as [first, last] of each run."""
    indices = row.nonzero().flatten().tolist()
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return runs


def _rounded(x: Tensor) -> list[Any]:
    values: list[Any] = torch.round(x.float(), decimals=4).tolist()
    return json.loads(json.dumps(values), parse_float=lambda text: round(float(text), 4))  # type: ignore[no-any-return]


def _drafts(model: Transformer, streams: Tensor, row: Tensor) -> list[dict[str, Any]]:
    """The guess for position t + 2 comes from the streams at t and the token at t + 1."""
    if not len(model.mtp) or row.shape[1] < 3:
        return []
    logits, _ = model.forward_mtp(streams[:, :-2], row[:, 1:-1])
    guesses, actual = logits[0].argmax(-1).tolist(), row[0, 2:].tolist()
    return [
        {"position": index + 2, "draft": guess, "right": guess == token}
        for index, (guess, token) in enumerate(zip(guesses, actual, strict=True))
    ]
