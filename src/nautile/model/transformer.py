"""The network: embedding -> residual streams -> blocks -> collapse -> norm -> head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nautile.config import ConfigError, ModelConfig
from nautile.model.attention import AttentionTrace
from nautile.model.block import Block, BlockTrace
from nautile.model.chunk import Chunk
from nautile.model.layers import Linear, RMSNorm
from nautile.model.mhc import head_collapse
from nautile.model.mtp import MTPBlock
from nautile.model.rope import inverse_frequencies, rotation
from nautile.state import State
from nautile.state.interface import BatchState

__all__ = ["Trace", "Transformer"]


@dataclass
class Trace:
    """What every layer decided in one pass, in layer order; a flag for each kind that is kept. Written by the transformer.

    indexer: compressed entries that each query of a CSA layer attended to; experts: routing; mhc: how streams were read,
    written and mixed at both sites. Tracing changes no number.
    """

    indexer: bool = True
    experts: bool = True
    mhc: bool = False
    layers: list[BlockTrace] = field(default_factory=list)

    def keep(self, layer: BlockTrace) -> None:
        """Take in what a layer decided, without what nobody asked for."""
        if not self.indexer:
            layer.attention.selected = None
        if not self.experts:
            layer.routing = None
        self.layers.append(layer)


class Transformer(nn.Module):
    """DeepSeek-V4. Parameter names are those of the official checkpoint, with the routed experts of a layer stacked."""

    window_frequencies: Tensor
    compressed_frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n, d = config.hc_mult, config.hidden_size
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, d)
        self.layers = nn.ModuleList(
            Block(config, ratio, hashed=index < config.num_hash_layers) for index, ratio in enumerate(config.layer_ratios)
        )
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.head = None if config.tie_word_embeddings else Linear(d, config.vocab_size)
        self.hc_head_fn = nn.Parameter(torch.empty(n, n * d))
        self.hc_head_base = nn.Parameter(torch.zeros(n))
        self.hc_head_scale = nn.Parameter(torch.ones(1))
        self.mtp = nn.ModuleList(MTPBlock(config) for _ in range(config.num_nextn_predict_layers))
        self.register_buffer("window_frequencies", inverse_frequencies(config, compressed=False), persistent=False)
        self.register_buffer("compressed_frequencies", inverse_frequencies(config, compressed=True), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        *,
        state: BatchState | None = None,
        lengths: Tensor | None = None,
        logits: Literal["all", "last", "none"] = "all",
        trace: Trace | None = None,
        documents: Tensor | None = None,
    ) -> Tensor | None:
        """Run T tokens of B sequences.

        Args:
            input_ids: [B, T] int64. lengths: [B], how many of the T are real (the rest is right padding).
            state: continue these sequences and append the tokens to it (inference only: it is updated in place).
            documents: [B, T] int64, for packed rows: where each token's document starts, multiples of 128.
        Returns float32 logits: [B, T, V], [B, V] (of the last real token) or None.
        Raises ValueError for empty input, ids outside the vocabulary, or positions past ``max_position_embeddings``.
        """
        if logits not in ("all", "last", "none"):
            raise ValueError(f'logits is "all", "last" or "none", got {logits!r}')
        chunk = self.new_chunk(input_ids, state, lengths, documents)
        streams = self.streams(input_ids, chunk, state, trace)
        if state is not None:
            state.lengths = state.lengths + torch.tensor(chunk.lengths)
        if logits == "none":
            return None
        if logits == "last":
            last = torch.tensor(chunk.lengths, device=streams.device) - 1
            streams = streams[torch.arange(len(last), device=streams.device), last]
        return self.logits(self.hidden(streams))

    def new_state(self, batch_size: int, dtype: torch.dtype = torch.float32) -> State:
        """An empty state for ``batch_size`` sequences on the model's device; ``dtype`` of its rows: float32 or bfloat16."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"a state holds float32 or bfloat16 rows, got {dtype}")
        return State(self.config, batch_size, dtype, self.embed.weight.device)

    def new_chunk(
        self,
        input_ids: Tensor,
        state: BatchState | None = None,
        lengths: Tensor | None = None,
        documents: Tensor | None = None,
        indexer_loss: bool = False,
    ) -> Chunk:
        """Check the input and gather what the mechanisms need to know about it."""
        starts, real = _check(input_ids, state, lengths, self.config)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        if len(set(starts)) == 1:
            positions = positions + starts[0]
        else:
            positions = positions + torch.tensor(starts, device=input_ids.device).unsqueeze(1)
        if documents is not None and not torch.compiler.is_compiling():
            _check_documents(documents, positions)
        if state is not None:
            if documents is not None:
                raise ValueError("documents are for packed rows without a state")
            state.begin(real, input_ids.shape[1])
        frequencies = (self.window_frequencies, self.compressed_frequencies)
        turns = (rotation(positions, frequencies[0]), rotation(positions, frequencies[1]))
        return Chunk(starts, real, positions, documents, frequencies, turns, state is not None, input_ids, indexer_loss)

    def streams(self, input_ids: Tensor, chunk: Chunk, state: BatchState | None = None, trace: Trace | None = None) -> Tensor:
        """The residual streams after the last layer, before the final collapse: [B, T, n, d]."""
        embedded = self.embed(input_ids)
        if torch.is_autocast_enabled(embedded.device.type):
            embedded = embedded.to(torch.get_autocast_dtype(embedded.device.type))
        streams: Tensor = embedded.unsqueeze(-2).expand(-1, -1, self.config.hc_mult, -1)
        for index, layer in enumerate(self.layers):
            block_trace = BlockTrace(AttentionTrace(), mixing=[] if trace.mhc else None) if trace is not None else None
            streams = layer(streams, chunk, state.layers[index] if state else None, block_trace)
            if trace is not None and block_trace is not None:
                trace.keep(block_trace)
        return streams

    def hidden(self, streams: Tensor) -> Tensor:
        """Final collapse and norm: [..., n, d] -> [..., d]."""
        out: Tensor = self.norm(head_collapse(streams, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.config))
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., V], at least float32."""
        out: Tensor = F.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)
        return out if out.dtype == torch.float64 else out.float()

    def forward_mtp(self, streams: Tensor, next_ids: Tensor, *, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draft one step further: streams [B, T, n, d] at t and ids [B, T] of t + 1 -> (logits for t + 2, next streams).

        Raises ConfigError when the checkpoint has no MTP block.
        """
        if not len(self.mtp):
            raise ConfigError("this checkpoint has no MTP block (num_nextn_predict_layers is 0)")
        chunk = self.new_chunk(next_ids, documents=documents)
        streams, hidden = self.mtp[0].draft(streams, self.embed(next_ids), chunk)  # type: ignore[operator]
        return self.logits(hidden), streams


def _check_documents(documents: Tensor, positions: Tensor) -> None:
    """Starts of documents: [B, T], multiples of 128 (a compressor block belongs to one document), none in the future."""
    if documents.shape[-1:] != positions.shape[-1:] or documents.dim() != 2:
        raise ValueError(f"documents must have the shape of input_ids, got {tuple(documents.shape)}")
    if bool(((documents % 128 != 0) | (documents < 0) | (documents > positions)).any()):
        raise ValueError("documents must start at multiples of 128, at or before each of their tokens")


def _check(
    input_ids: Tensor, state: BatchState | None, lengths: Tensor | None, config: ModelConfig
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise ValueError(f"input_ids must be int64 [batch, tokens], got {input_ids.dtype} {tuple(input_ids.shape)}")
    batch, width = input_ids.shape
    if width == 0 or batch == 0:
        raise ValueError("the prompt is empty: at least one token is needed")
    if state is not None and state.config is not config and state.config != config:
        raise ValueError("the state belongs to another configuration: make one with this model's new_state")
    if state is not None and state.batch_size != batch:
        raise ValueError(f"the state holds {state.batch_size} sequences, input_ids {batch}")
    if lengths is not None and (not isinstance(lengths, Tensor) or lengths.shape != (batch,) or lengths.is_floating_point()):
        raise ValueError(f"lengths must be an integer tensor [{batch}]")
    real = tuple(lengths.tolist()) if lengths is not None else (width,) * batch
    if len(real) != batch or not all(1 <= length <= width for length in real):
        raise ValueError(f"lengths must be {batch} numbers from 1 to {width}, got {list(real)}")
    starts = tuple(state.lengths.tolist()) if state is not None else (0,) * batch
    longest = max(start + length for start, length in zip(starts, real, strict=True))
    if longest > config.max_position_embeddings:
        raise ValueError(f"position {longest - 1} is past max_position_embeddings={config.max_position_embeddings}")
    if not torch.compiler.is_compiling():
        low, high = torch.stack(torch.aminmax(input_ids)).tolist()
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"token ids must lie in 0..{config.vocab_size - 1}, got {low}..{high}")
    return starts, real
