"""What the functions of both platforms take beside `DecodeRows` and `AttentionParameters`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SelectionTable:
    """The pages that each row keeps, written by a selection layer and read by the sparse ones after it.

    The first `kept_pages` entries of a row count, ascending. A row that keeps everything has no entries.
    Behind them the table may name pages that the row has not begun, see `SelectionRule.following_pages`.
    """

    #: int32 ``[capacity, most kept pages]``: pages of the sequence
    pages: Tensor
    #: of the same shape: where they lie in caches that the selection layer's block table describes,
    #: ``block * pages_per_block + page of the block``; None where kernels do without
    frames: Tensor | None = None

    @classmethod
    def allocate(
        cls, capacity: int, kept_pages: int, device: torch.device | str = "cpu", *, frames: bool = False
    ) -> SelectionTable:
        """A table of zeros, for up to `capacity` rows that keep up to `kept_pages` pages."""
        parts = torch.zeros(1 + frames, capacity, kept_pages, dtype=torch.int32, device=device)
        return cls(*parts)

    @property
    def nbytes(self) -> int:
        """Bytes that the table takes."""
        return self.pages.nbytes + (0 if self.frames is None else self.frames.nbytes)

    def entries(self, *, frames: bool) -> Tensor:
        """Where the kept pages lie, or else which they are."""
        return self.frames if frames and self.frames is not None else self.pages

    def check(self, num_rows: int) -> None:
        """Raise `ValueError` if the table has no frames, or fewer rows."""
        if self.frames is None or num_rows > len(self.pages):
            raise ValueError(f"the table has no frames, or {len(self.pages)} rows for {num_rows}")

    def slice(self, begin: int, end: int) -> SelectionTable:
        """Rows `begin` to `end`, as views."""
        frames = None if self.frames is None else self.frames[begin:end]
        return SelectionTable(self.pages[begin:end], frames)
