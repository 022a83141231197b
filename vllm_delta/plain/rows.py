"""Decode rows of one request at one layer in plain PyTorch, and what they may attend to.

They read the same keys and values, each up to its own place, and are computed together. Sets of tokens are
masks: bool ``[R, KV, n]``, each KV head's own, or ``[R, 1, n]``, one set for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.rows import DecodeRows
from vllm_delta.plain.cache import read_sequence

#: numbers that the largest tensor of rows computed together has, about
TOGETHER = 1 << 25


class RowIndex(NamedTuple):
    """Where a decode row is."""

    #: index of its token in the query and the output
    token: int
    #: index of its request in the block table
    request: int
    #: tokens that it sees, itself included; 0 for padding
    length: int
    #: its budget, as in `DecodeRows`
    kept_pages: int


def row_indices(rows: DecodeRows) -> list[RowIndex]:
    """The rows where Python can read them, which waits for the device."""
    columns = torch.stack([rows.tokens, rows.requests, rows.lengths, rows.kept_pages]).tolist()
    return [RowIndex(*row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class RequestRows:
    """R query tokens of one request, of which the last sees n tokens, itself included.

    Query head h reads KV head h // (H / KV), with H query heads and KV KV heads of size D.
    """

    #: ``[R, H, D]``
    queries: Tensor
    #: ``[n, KV, D]``
    keys: Tensor
    #: ``[n, KV, D]``
    values: Tensor
    #: int64 ``[R]``: tokens that each row sees, at most n
    lengths: Tensor
    #: scale, soft cap and sinks
    parameters: AttentionParameters

    def __len__(self) -> int:
        return self.queries.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """KV, the number of KV heads."""
        return self.keys.shape[1]

    @cached_property
    def positions(self) -> Tensor:
        """int64 ``[n]``: 0, 1, 2, ..."""
        return torch.arange(self.keys.shape[0], device=self.keys.device)

    @cached_property
    def visible(self) -> Tensor:
        """The tokens that each row sees, bool ``[R, 1, n]``."""
        return (self.positions < self.lengths[:, None])[:, None]

    @cached_property
    def logits(self) -> Tensor:
        """``softcap(q . k * scale)``, ``[R, H, n]``; -inf where a row does not see."""
        logits = torch.einsum("rkgd,nkd->rkgn", self.by_kv_head(self.queries), self.keys)
        logits = logits.flatten(1, 2) * self.parameters.scale
        if softcap := self.parameters.softcap:
            logits = softcap * torch.tanh(logits / softcap)
        return logits.masked_fill(~self.visible, -torch.inf)

    def probabilities(self, tokens: Tensor | None = None) -> Tensor:
        """The softmax over these tokens (None: all) and the sink, ``[R, H, n]``."""
        logits = self.logits
        if tokens is not None:
            keep = tokens.expand(-1, self.num_kv_heads, -1)
            heads_per_kv_head = logits.shape[1] // self.num_kv_heads
            logits = logits.masked_fill(~keep.repeat_interleave(heads_per_kv_head, 1), -torch.inf)
        return self._with_sink(logits).softmax(-1)[..., : logits.shape[2]]

    def log_probabilities(self) -> Tensor:
        """Their logarithms over all tokens, in which the smallest stay apart, ``[R, H, n]``."""
        return self._with_sink(self.logits).log_softmax(-1)[..., : self.logits.shape[2]]

    def attend(self, tokens: Tensor | None = None) -> Tensor:
        """Attention over these tokens (None: all), ``[R, H, D]``."""
        probabilities = self.by_kv_head(self.probabilities(tokens))
        return torch.einsum("rkgn,nkd->rkgd", probabilities, self.values).flatten(1, 2)

    def by_kv_head(self, part: Tensor) -> Tensor:
        """``[R, H, ...]`` to ``[R, KV, H / KV, ...]``."""
        return part.reshape(len(part), self.num_kv_heads, -1, *part.shape[2:])

    def take(self, which: Tensor) -> RequestRows:
        """Some of the rows, by a bool ``[R]``."""
        return RequestRows(self.queries[which], self.keys, self.values, self.lengths[which], self.parameters)

    def _with_sink(self, logits: Tensor) -> Tensor:
        if self.parameters.sinks is None:
            return logits
        sinks = self.parameters.sinks.to(logits)[None, :, None].expand(len(logits), -1, 1)
        return torch.cat([logits, sinks], -1)


@dataclass(frozen=True)
class Layer:
    """What one layer's rows are read from."""

    #: ``[tokens, H, D]``
    query: Tensor
    #: ``[num_blocks, KV, block_size, 2 * D]``
    kv_cache: Tensor
    #: int ``[requests, blocks]``
    block_table: Tensor
    parameters: AttentionParameters

    def rows(self, indices: Sequence[RowIndex]) -> RequestRows:
        """Rows of one request, in float32."""
        device, parameters = self.query.device, self.parameters
        queries = self.query[torch.tensor([index.token for index in indices], device=device)].float()
        lengths = torch.tensor([index.length for index in indices], device=device)
        block_row = self.block_table[indices[0].request]
        longest = max(index.length for index in indices)
        keys, values = read_sequence(self.kv_cache, block_row, longest, parameters.layout)
        if parameters.scales is not None:
            queries, keys, values = (
                part * scale for part, scale in zip((queries, keys, values), parameters.scales, strict=True)
            )
        return RequestRows(queries, keys, values, lengths, parameters)


def mask_of(indices: Tensor, size: int) -> Tensor:
    """Indices in the last dimension, ``[..., count]``, to bool ``[..., size]``."""
    mask = torch.zeros(*indices.shape[:-1], size, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, indices, True)


def together(indices: Sequence[RowIndex], num_heads: int) -> Iterator[list[RowIndex]]:
    """Rows in parts that are computed together: neighbours of one request, few enough for the memory."""
    for _, neighbours in groupby(indices, key=lambda index: index.request):
        part: list[RowIndex] = []
        longest = 0
        for index in neighbours:
            longest = max(longest, index.length)
            if part and (len(part) + 1) * num_heads * longest > TOGETHER:
                yield part
                part, longest = [], index.length
            part.append(index)
        yield part
