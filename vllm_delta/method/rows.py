"""The decode rows of a step, as tensors, and the rule by which their pages are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: `DecodeRows.kept_pages` of a row that attends to everything: the largest int32.
ALL_PAGES = 2**31 - 1


@dataclass(frozen=True)
class DecodeRows:
    """Decode rows of one step, all int32 ``[rows]``, on the device of the kernels.

    A row is one query token of one sequence or, where `query_lens` says so, several neighbours. Rows may
    stand in any order and name any tokens of the batch.
    """

    #: index of the row's first token in the query and the output
    tokens: Tensor
    #: index of the row's request in the block table
    requests: Tensor
    #: tokens that the row's last token sees: its position in the sequence plus one; 0 for padding. Each token
    #: before it sees one less
    lengths: Tensor
    #: the row's budget: pages that sparse layers keep of it, recent and sink pages included. A row of as many
    #: pages or fewer attends to everything, and so does one with `ALL_PAGES`
    kept_pages: Tensor
    #: query tokens of each row, from 1 to `max_query_len`; None: one each
    query_lens: Tensor | None = None
    max_query_len: int = 1

    def __len__(self) -> int:
        return self.lengths.shape[0]

    def __getitem__(self, which: slice | Tensor) -> DecodeRows:
        """Some of the rows: a slice, as views, or those of an index tensor."""
        return DecodeRows(
            self.tokens[which],
            self.requests[which],
            self.lengths[which],
            self.kept_pages[which],
            None if self.query_lens is None else self.query_lens[which],
            self.max_query_len,
        )

    def to(self, device: torch.device | str) -> DecodeRows:
        """The same rows on another device."""
        return DecodeRows(
            self.tokens.to(device),
            self.requests.to(device),
            self.lengths.to(device),
            self.kept_pages.to(device),
            None if self.query_lens is None else self.query_lens.to(device),
            self.max_query_len,
        )

    def num_within_budget(self, page_size: int) -> int:
        """Query tokens of rows that attend to everything, as they fit their budgets; waits for the device."""
        within = self.lengths <= self.kept_pages.long() * page_size
        return int((within if self.query_lens is None else within * self.query_lens).sum())


@dataclass(frozen=True)
class SelectionRule:
    """What is the same for all rows about the pages that selection layers keep."""

    #: tokens of a page
    page_size: int
    #: pages kept at the end of a row
    recent_pages: int
    #: pages kept at its start
    sink_pages: int
    #: pages behind a row's end that the table names, too, for a row that grows before pages are chosen again
    following_pages: int = 0
