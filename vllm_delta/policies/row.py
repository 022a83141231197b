"""One decode row at one layer in plain PyTorch: its query, and the keys and values that it may attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_delta.paged import read_sequence


class RowIndex(NamedTuple):
    """Where a decode row is."""

    #: index of its token in the query and the output
    token: int
    #: index of its request in the block table
    request: int
    #: tokens that it sees, itself included; 0 for padding
    length: int
    #: attends to everything because it belongs to a prompt
    dense: bool = False


@dataclass(frozen=True)
class Row:
    """A query token that sees n tokens, itself included.

    Query head h reads KV head h // (H / KV), with H query heads and KV KV heads of size D. Sets of tokens are
    int64 ``[KV, tokens]``, one for each KV head, or ``[1, tokens]``, one for all; None is every token.
    """

    #: ``[H, D]``
    query: Tensor
    #: ``[n, KV, D]``
    keys: Tensor
    #: ``[n, KV, D]``
    values: Tensor
    #: factor of the logits
    scale: float
    #: c in ``c * tanh(x / c)``; 0 for none
    softcap: float = 0.0
    #: ``[H]``: a logit per head that takes part in the softmax and has no value; None for none
    sinks: Tensor | None = None

    @property
    def length(self) -> int:
        """n, the tokens that the row sees."""
        return self.keys.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """KV, the number of KV heads."""
        return self.keys.shape[1]

    def logits(self, tokens: Tensor | None = None) -> Tensor:
        """``softcap(q . k * scale)`` over these tokens, ``[H, tokens]``."""
        keys = self._take(self.keys, tokens)
        logits = torch.einsum("kgd,nkd->kgn", self.by_kv_head(self.query), keys).flatten(0, 1) * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def probabilities(self, tokens: Tensor | None = None) -> Tensor:
        """The softmax over these tokens and the sink, ``[H, tokens]``."""
        logits = self.logits(tokens)
        return self._with_sink(logits).softmax(-1)[:, : logits.shape[1]]

    def log_probabilities(self) -> Tensor:
        """Their logarithms over all tokens, in which the smallest stay apart, ``[H, n]``."""
        return self._with_sink(self.logits()).log_softmax(-1)[:, : self.length]

    def attend(self, tokens: Tensor | None = None) -> Tensor:
        """Attention over these tokens, ``[H, D]``."""
        probabilities = self.by_kv_head(self.probabilities(tokens))
        values = self._take(self.values, tokens)
        return torch.einsum("kgn,nkd->kgd", probabilities, values).flatten(0, 1)

    def by_kv_head(self, part: Tensor) -> Tensor:
        """``[H, ...]`` to ``[KV, H / KV, ...]``."""
        return part.reshape(self.num_kv_heads, -1, *part.shape[1:])

    def _with_sink(self, logits: Tensor) -> Tensor:
        return logits if self.sinks is None else torch.cat([logits, self.sinks.to(logits)[:, None]], -1)

    def _take(self, part: Tensor, tokens: Tensor | None) -> Tensor:
        """Keys or values of these tokens, ``[tokens, KV, D]``."""
        if tokens is None:
            return part
        if tokens.shape[0] == 1:
            return part[tokens[0]]
        return part.gather(0, tokens.t()[:, :, None].expand(-1, -1, part.shape[2]))


@dataclass(frozen=True)
class Layer:
    """What one layer's rows are read from."""

    #: ``[tokens, H, D]``
    query: Tensor
    #: ``[num_blocks, KV, block_size, 2 * D]``
    kv_cache: Tensor
    #: int ``[requests, blocks]``
    block_table: Tensor
    #: as in `Row`
    scale: float
    softcap: float
    sinks: Tensor | None
    #: of the cache, one of `vllm_delta.paged.LAYOUTS`
    layout: str = "plain"
    #: factors of a quantised query, key and value; None: not quantised
    scales: tuple[Tensor, Tensor, Tensor] | None = None

    def row(self, index: RowIndex) -> Row:
        """One row, in float32."""
        query = self.query[index.token].float()
        keys, values = read_sequence(
            self.kv_cache, self.block_table[index.request], index.length, self.layout
        )
        if self.scales is not None:
            query, keys, values = (
                part * scale for part, scale in zip((query, keys, values), self.scales, strict=True)
            )
        return Row(query, keys, values, self.scale, self.softcap, self.sinks)
