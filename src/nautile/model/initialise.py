"""Starting weights for training: small normal matrices, and streams that begin as an ordinary pre-norm residual network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nautile.config import ModelConfig
from nautile.model.block import Block
from nautile.model.transformer import Transformer

__all__ = ["initialise"]

_GATE = 0.1  # dynamic part of a stream mapping at the start, relative to its static part


def initialise(model: Transformer, seed: int = 0) -> Transformer:
    """Fill every parameter in place and return the model. The same seed gives the same weights on every device.

    Matrices are normal with ``initializer_range``; norms are one, sinks and compressor biases zero. Site l reads mostly
    stream l mod n, writes to all with weight one, and mixes streams by a matrix close to the identity.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                values = torch.randn(parameter.shape, generator=generator) * config.initializer_range
                parameter.copy_(values)
        for module in model.modules():
            if hasattr(module, "ape") and isinstance(module.ape, nn.Parameter):
                module.ape.zero_()
        blocks: list[Block] = [*model.layers, *model.mtp]
        for index, block in enumerate(blocks):
            _initialise_block(block, index, config, generator)
        for head in (model, *model.mtp):
            head.hc_head_base.fill_(-1.0986)  # sigmoid = 1/4
            head.hc_head_scale.fill_(_GATE)
    return model


def _initialise_block(block: Block, index: int, config: ModelConfig, generator: torch.Generator) -> None:
    n = config.hc_mult
    for site, name in enumerate(("attn", "ffn")):
        base: Tensor = getattr(block, f"hc_{name}_base")
        base[:n] = -2.4  # sigmoid 0.083
        base[(2 * index + site) % n] = 1.1  # sigmoid 0.75
        base[n : 2 * n] = 0.0  # 2 sigmoid(0) = 1
        base[2 * n :] = (torch.eye(n) * 5.0).flatten()
        getattr(block, f"hc_{name}_scale").fill_(_GATE)
    table = block.ffn.gate.tid2eid
    if table is not None:
        order = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator).argsort(-1)
        table.copy_(order[:, : config.num_experts_per_tok])
