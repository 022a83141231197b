"""Splitting a step's batch into decode rows and prefill tokens. Tensors only, without vLLM.

A *decode row* is one query token at a position behind its request's prompt: a token that the model has
generated. It runs DELTA wherever it is computed, which makes the result independent of scheduling:

- in a decode step, a request has one such token;
- a request that was preempted computes its generated tokens again, many in one step, behind the rest of its
  prompt. Each becomes a row that sees the tokens up to itself, as it did the first time.
- speculative decoding verifies several tokens in one step: the last one that was sampled, and drafts. They
  are one row together, whose first token chooses its pages: for that token the result is what it would be
  alone, and drafts behind it read pages that are some tokens older. In lossless speculation, which full
  attention verifies, requests have one row each in any step (`split_verification`).

Everything else is prefill and runs full attention: also a single token, where it is the last one of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_delta.method.rows import DecodeRows

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PrefillBatch:
    """The prefill tokens of a mixed step, as a batch of its own."""

    #: int64 ``[tokens]``: indices in the step's query
    tokens: Tensor
    #: int64 ``[requests]``: indices in the step's batch
    requests: Tensor
    #: int32 ``[requests + 1]``: where each request's tokens start in `tokens`
    query_start_loc: Tensor
    #: int32 ``[requests]``: tokens of the sequence that the last of them sees
    seq_lens: Tensor
    max_query_len: int
    max_seq_len: int


@dataclass(frozen=True)
class Step:
    """One step's work. Without `rows` all is prefill; without `prefill` all are decode rows."""

    rows: DecodeRows | None
    prefill: PrefillBatch | None
    #: prefill tokens, also where `prefill` is None because the whole batch is
    num_prefill_tokens: int


def split_step(
    query_start_loc: Tensor, seq_lens: Tensor, prompt_lens: Tensor, kept_pages: Tensor, most: int = 1
) -> Step:
    """Split a batch of requests, into rows of one token each, or of a token and the drafts behind it.

    Args:
        query_start_loc: int32 ``[requests + 1]``, on the CPU as all others: where each request's tokens start
            in the query.
        seq_lens: int32 ``[requests]``: tokens of each sequence, this step's included.
        prompt_lens: integer ``[requests]``: tokens of each prompt.
        kept_pages: int32 ``[requests]``: the budget of each request's rows, see `DecodeRows`.
        most: query tokens of a row. A request that has more behind its prompt, or has some of its prompt in
            the step, computes tokens again: each is a row.
    """
    batch = _Batch.of(query_start_loc, seq_lens)
    prefill_lens = np.clip(prompt_lens.numpy() - batch.first_positions, 0, batch.query_lens)
    generated = batch.query_lens - prefill_lens
    row_lens = np.where((prefill_lens == 0) & (generated <= most), np.maximum(generated, 1), 1)
    request, ordinal = _ragged_range(generated // row_lens)
    offset, row_lens = prefill_lens[request] + ordinal, row_lens[request]
    rows = DecodeRows(
        tokens=_int32(batch.starts[request] + offset),
        requests=_int32(request),
        lengths=_int32(batch.first_positions[request] + offset + row_lens),
        kept_pages=torch.from_numpy(kept_pages.numpy()[request]),
        query_lens=_int32(row_lens) if most > 1 else None,
        max_query_len=most,
    )
    return batch.split(rows, prefill_lens)


def split_verification(
    query_start_loc: Tensor, seq_lens: Tensor, prompt_lens: Tensor, kept_pages: Tensor, most: int
) -> Step:
    """Split a batch in which drafts are verified, into one row for each request that generates.

    A row is the token that was sampled last, and the drafts behind it. Where a request has more tokens than
    that, as at the end of its prompt, its row is the last one. A request that stays in its prompt has none.

    Args:
        query_start_loc: and the next three as above.
        most: query tokens of a row, at most.
    """
    batch = _Batch.of(query_start_loc, seq_lens)
    prompts = prompt_lens.numpy()
    verifies = (batch.first_positions >= prompts) & (batch.query_lens <= most)
    generates = (batch.first_positions + batch.query_lens >= prompts) & (batch.query_lens > 0)
    row_lens = np.where(verifies, batch.query_lens, generates)
    prefill_lens = batch.query_lens - row_lens
    (request,) = row_lens.nonzero()
    rows = DecodeRows(
        tokens=_int32(batch.starts[request] + prefill_lens[request]),
        requests=_int32(request),
        lengths=_int32(batch.first_positions[request] + batch.query_lens[request]),
        kept_pages=torch.from_numpy(kept_pages.numpy()[request]),
        query_lens=_int32(row_lens[request]),
        max_query_len=most,
    )
    return batch.split(rows, prefill_lens)


@dataclass(frozen=True)
class _Batch:
    """The requests of a step, int64 ``[requests]`` each."""

    starts: IntArray
    query_lens: IntArray
    #: positions of each request's first token
    first_positions: IntArray

    @classmethod
    def of(cls, query_start_loc: Tensor, seq_lens: Tensor) -> _Batch:
        starts = query_start_loc.numpy().astype(np.int64)
        query_lens = np.diff(starts)
        return cls(starts[:-1], query_lens, seq_lens.numpy().astype(np.int64) - query_lens)

    def split(self, rows: DecodeRows, prefill_lens: IntArray) -> Step:
        """The step of these rows, whose prefill is the first tokens of each request."""
        num_prefill_tokens = int(prefill_lens.sum())
        if not len(rows) or not num_prefill_tokens:
            return Step(rows if len(rows) else None, None, num_prefill_tokens)
        (requests,) = prefill_lens.nonzero()
        query_lens = prefill_lens[requests]
        seq_lens = self.first_positions[requests] + query_lens
        ordinal, offset = _ragged_range(query_lens)
        prefill = PrefillBatch(
            tokens=torch.from_numpy(self.starts[requests][ordinal] + offset),
            requests=torch.from_numpy(requests),
            query_start_loc=_int32(np.concatenate([[0], np.cumsum(query_lens)])),
            seq_lens=_int32(seq_lens),
            max_query_len=int(query_lens.max()),
            max_seq_len=int(seq_lens.max()),
        )
        return Step(rows, prefill, num_prefill_tokens)


def _ragged_range(counts: IntArray) -> tuple[IntArray, IntArray]:
    """``[2, 0, 3]`` to owners ``[0, 0, 2, 2, 2]`` and offsets ``[0, 1, 0, 1, 2]``."""
    owner = np.repeat(np.arange(len(counts)), counts)
    offset = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owner, offset


def _int32(values: IntArray) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))
