"""What a layer's attention is made of, apart from its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: How a block of one KV head lies in memory, by name: vLLM's GPU cache ("plain"), where a token's key stands
#: before its value, and vLLM's names of its CPU kernels' layouts. "vec" and "vec16" are K
#: ``[head_size][block_size]``, then V ``[block_size][head_size]``; "amx" is K
#: ``[block_size / 16][head_size / 2][16][2]``, then V ``[head_size / 16][block_size / 2][16][2]``, the last
#: index running over dimensions of a key and over tokens of a value.
LAYOUTS = ("plain", "vec", "vec16", "amx")


@dataclass(frozen=True)
class AttentionParameters:
    """A layer's attention: ``softmax(softcap(scale * q . k)) . v``."""

    #: factor of the logits
    scale: float
    #: c in ``c * tanh(x / c)``; 0 for none
    softcap: float = 0.0
    #: ``[num_heads]``: a logit per head that takes part in the softmax and has no value; None for none
    sinks: Tensor | None = None
    #: of the cache, one of `LAYOUTS`
    layout: str = "plain"
    #: the model's type, in which matrix products are computed; None: the query's
    dtype: torch.dtype | None = None
    #: factors of a quantised query, key and value, float32, one element each; None: not quantised
    scales: tuple[Tensor, Tensor, Tensor] | None = None
