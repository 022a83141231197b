"""What changes between the passes that draft tokens, for all rows at once: one graph holds all passes.

A row's budget grows with it, as `vllm_delta.method.reference` says of rows whose pages were chosen before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_delta.method.rows import ALL_PAGES

#: Rows that a program takes.
ROWS = 128

_ALL_PAGES = tl.constexpr(ALL_PAGES)


@dataclass(frozen=True)
class DraftBuffers:
    """One row for each request, at addresses that captured graphs keep."""

    #: int32 ``[rows]``
    input_ids: Tensor
    #: int64 ``[rows]``
    positions: Tensor
    #: int32 ``[rows]``: tokens that the row sees, itself included; 0 for padding
    lengths: Tensor
    #: int64 ``[rows]``: the request's slot in the worker's states; -1 for padding
    slots: Tensor
    #: int32 ``[rows]``: the row's budget
    kept_pages: Tensor
    #: int32 ``[rows]``: its length when its pages were chosen; 0: none were
    chosen_lengths: Tensor
    #: int64 ``[rows, draft tokens]``
    tokens: Tensor

    @classmethod
    def allocate(cls, rows: int, draft_tokens: int, device: torch.device | str) -> DraftBuffers:
        """Buffers of padding."""

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        return cls(
            input_ids=zeros(rows),
            positions=zeros(rows, dtype=torch.int64),
            lengths=zeros(rows),
            slots=zeros(rows, dtype=torch.int64) - 1,
            kept_pages=zeros(rows),
            chosen_lengths=zeros(rows),
            tokens=zeros(rows, draft_tokens, dtype=torch.int64),
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take."""
        return sum(part.nbytes for part in vars(self).values())


@triton.jit
def grown_budget(kept_pages, chosen_length, length, page_size, FROZEN: tl.constexpr):
    """The budget of a row that has grown since its pages were chosen, unless they are chosen anew."""
    begun = tl.cdiv(length, page_size) - tl.cdiv(chosen_length, page_size)
    if not FROZEN:
        begun = 0
        chosen_length = tl.full(length.shape, 1, tl.int32)
    return tl.where(chosen_length > 0, kept_pages + begun, _ALL_PAGES)


@triton.jit
def store_rows(
    row, mask, input_ids_ptr, positions_ptr, lengths_ptr, kept_pages_ptr, token, position, length, kept_pages
):
    """What a pass reads of its rows."""
    tl.store(input_ids_ptr + row, token, mask=mask)
    tl.store(positions_ptr + row, position, mask=mask)
    tl.store(lengths_ptr + row, length, mask=mask)
    tl.store(kept_pages_ptr + row, kept_pages, mask=mask)


# One variant for all batches, or some would be compiled in the middle of serving.
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=[
        "last_sampled_ptr",
        "slots_ptr",
        "num_sampled_ptr",
        "num_rejected_ptr",
        "verified_lengths_ptr",
    ],
)
def begin_kernel(
    last_sampled_ptr,  # [slots]
    slots_ptr,  # [num_rows]
    num_sampled_ptr,  # [num_rows]: 0: the request stays in its prompt
    num_rejected_ptr,  # [num_rows]: drafts that were not accepted
    verified_lengths_ptr,  # [num_rows]: tokens of each sequence, those drafts included
    input_ids_ptr,  # see `DraftBuffers`, as the next five
    positions_ptr,
    lengths_ptr,
    row_slots_ptr,
    kept_pages_ptr,
    chosen_lengths_ptr,
    num_rows,
    capacity,
    most_length,
    budget_pages,
    page_size,
    FROZEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The first pass: the token that was sampled last, behind all that were verified."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_request = row < num_rows
    slot = tl.load(slots_ptr + row, mask=is_request, other=0).to(tl.int64)
    drafts = is_request & (tl.load(num_sampled_ptr + row, mask=is_request, other=0) > 0)
    token = tl.load(last_sampled_ptr + slot, mask=drafts, other=0).to(tl.int32)
    verified = tl.load(verified_lengths_ptr + row, mask=drafts, other=0)
    rejected = tl.load(num_rejected_ptr + row, mask=drafts, other=0)
    position = tl.where(drafts, tl.minimum(verified - rejected, most_length - 1), 0)
    length = tl.where(drafts, position + 1, 0)
    chosen = tl.load(chosen_lengths_ptr + row, mask=drafts, other=0)
    kept_pages = grown_budget(budget_pages, chosen, length, page_size, FROZEN)
    mask = row < capacity
    store_rows(
        row,
        mask,
        input_ids_ptr,
        positions_ptr,
        lengths_ptr,
        kept_pages_ptr,
        token,
        position.to(tl.int64),
        length,
        kept_pages,
    )
    tl.store(row_slots_ptr + row, tl.where(drafts, slot, -1), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def advance_kernel(
    sampled_ptr,  # [rows]
    input_ids_ptr,  # see `DraftBuffers`, as the next five
    positions_ptr,
    lengths_ptr,
    kept_pages_ptr,
    chosen_lengths_ptr,
    tokens_ptr,
    tokens_stride,
    num_rows,
    most_length,
    budget_pages,
    page_size,
    STEP: tl.constexpr,
    FROZEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Behind a pass: keep the drafted token, which the next pass begins with."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    token = tl.load(sampled_ptr + row, mask=mask, other=0)
    tl.store(tokens_ptr + row.to(tl.int64) * tokens_stride + STEP, token.to(tl.int64), mask=mask)
    length = tl.load(lengths_ptr + row, mask=mask, other=0)
    length = tl.where(length > 0, tl.minimum(length + 1, most_length), 0)
    chosen = tl.load(chosen_lengths_ptr + row, mask=mask, other=0)
    kept_pages = grown_budget(budget_pages, chosen, length, page_size, FROZEN)
    store_rows(
        row,
        mask,
        input_ids_ptr,
        positions_ptr,
        lengths_ptr,
        kept_pages_ptr,
        token.to(tl.int32),
        tl.maximum(length - 1, 0).to(tl.int64),
        length,
        kept_pages,
    )


def begin_drafts(
    buffers: DraftBuffers,
    last_sampled: Tensor,
    slots: Tensor,
    num_sampled: Tensor,
    num_rejected: Tensor,
    verified_lengths: Tensor,
    *,
    most_length: int,
    budget_pages: int,
    page_size: int,
    frozen: bool,
) -> None:
    """Fill the buffers for the first pass; what is behind the requests becomes padding.

    Args:
        buffers: `chosen_lengths` is read, the others are written, but for `tokens`.
        last_sampled: integer ``[slots]``: the token that each request sampled last.
        slots: integer ``[requests]``: of each request.
        num_sampled: integer ``[requests]``: tokens sampled in this step; 0: it stays in its prompt.
        num_rejected: integer ``[requests]``: drafts that were not accepted.
        verified_lengths: int32 ``[requests or more]``: tokens of each sequence, those drafts included.
        most_length: tokens of a sequence, at most.
        budget_pages: the budget by which pages were chosen.
        page_size: tokens of a page.
        frozen: whether the pages stay, so that budgets grow with rows.
    """
    capacity = len(buffers.lengths)
    begin_kernel[(triton.cdiv(capacity, ROWS),)](
        last_sampled,
        slots,
        num_sampled,
        num_rejected,
        verified_lengths,
        buffers.input_ids,
        buffers.positions,
        buffers.lengths,
        buffers.slots,
        buffers.kept_pages,
        buffers.chosen_lengths,
        len(slots),
        capacity,
        most_length,
        budget_pages,
        page_size,
        FROZEN=frozen,
        ROWS=ROWS,
        num_warps=1,
    )


def advance_drafts(
    buffers: DraftBuffers,
    sampled: Tensor,
    step: int,
    *,
    most_length: int,
    budget_pages: int,
    page_size: int,
    frozen: bool,
) -> None:
    """Go on to the next pass.

    Args:
        buffers: are written.
        sampled: integer ``[rows]``: the tokens that this pass has drafted.
        step: number of the pass, from 0.
        most_length: and the next three as in `begin_drafts`.
    """
    advance_kernel[(triton.cdiv(len(sampled), ROWS),)](
        sampled,
        buffers.input_ids,
        buffers.positions,
        buffers.lengths,
        buffers.kept_pages,
        buffers.chosen_lengths,
        buffers.tokens,
        buffers.tokens.stride(0),
        len(sampled),
        most_length,
        budget_pages,
        page_size,
        STEP=step,
        FROZEN=frozen,
        ROWS=ROWS,
        num_warps=1,
    )
