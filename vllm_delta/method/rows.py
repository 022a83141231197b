"""The decode rows of a step, as tensors, and the rule by which their pages are kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

#: `DecodeRows.kept_pages` of a row that attends to everything: the largest int32.
ALL_PAGES = 2**31 - 1


@dataclass(frozen=True)
class DecodeRows:
    """Decode rows of one step, all int32 ``[rows]``, on the device of the kernels.

    A row is one query token of one sequence. Rows may stand in any order and name any tokens of the batch.
    """

    #: index of the row's token in the query and the output
    tokens: Tensor
    #: index of the row's request in the block table
    requests: Tensor
    #: tokens that the row sees: its position in the sequence plus one; 0 for padding
    lengths: Tensor
    #: the row's budget: pages that sparse layers keep of it, recent and sink pages included. A row of as many
    #: pages or fewer attends to everything, and so does one with `ALL_PAGES`
    kept_pages: Tensor

    def __len__(self) -> int:
        return self.lengths.shape[0]

    def slice(self, begin: int, end: int) -> DecodeRows:
        """Rows `begin` to `end`, as views."""
        return DecodeRows(
            self.tokens[begin:end],
            self.requests[begin:end],
            self.lengths[begin:end],
            self.kept_pages[begin:end],
        )

    def num_within_budget(self, page_size: int) -> int:
        """Rows that attend to everything, as their sequences fit their budgets; waits for the device."""
        return int((self.lengths <= self.kept_pages.long() * page_size).sum())


@dataclass(frozen=True)
class SelectionRule:
    """What is the same for all rows about the pages that selection layers keep."""

    #: tokens of a page
    page_size: int
    #: pages kept at the end of a row
    recent_pages: int
    #: pages kept at its start
    sink_pages: int
