"""Scratch memory of the kernels, allocated once, at addresses that captured graphs keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_delta.kernels.gpu.device import multiprocessors
from vllm_delta.kernels.gpu.logits import LOGIT_TILE
from vllm_delta.kernels.gpu.shape import LayerShape, tensor_bytes
from vllm_delta.kernels.gpu.tuning import MIN_TILE, all_tunings

#: Bytes of a logit, with its share of the tiles' maxima.
LOGIT_BYTES = 2 + 4 / MIN_TILE

#: Pages of a row that its selection takes at a time.
SELECTION_WIDTH = 2048

#: Rows that one launch takes at most, and those that it takes where a step may have as many.
MAX_LAUNCH_ROWS, LEAST_LAUNCH_ROWS = 1024, 512

#: Bytes that the page scores of one launch take at most, where that leaves room for a row.
MAX_SCORES_BYTES = 128 << 20


@dataclass(frozen=True)
class Workspace:
    """Buffers of one launch; layers run one after another and share them."""

    #: rows of a launch, at most
    max_rows: int
    #: tokens of a sequence, at most
    max_length: int
    #: query tokens of a row, at most
    max_query_len: int
    #: int16: the logits of selection layers, in tiles of ``padded_heads * LOGIT_TILE``
    logits: Tensor
    #: float32: the largest logit of each tile of the attention kernel and head
    logit_maxima: Tensor
    #: float32 ``[max_rows, pages]``
    scores: Tensor
    #: int32 ``[max_rows, SELECTION_WIDTH]``: pages of long rows that may be kept
    listed: Tensor
    #: float32: the splits' outputs
    partial: Tensor
    #: float32: the splits' logarithms of sums
    partial_lse: Tensor
    #: float32: the rows' logarithms of sums
    lse: Tensor
    #: int32: splits of each row and KV head that are done; zeros between launches
    arrived: Tensor

    @classmethod
    def allocate(
        cls,
        shapes: set[LayerShape],
        *,
        max_rows: int,
        max_length: int,
        page_size: int,
        logit_tokens: int,
        device: torch.device | str,
        max_query_len: int = 1,
    ) -> Workspace:
        """Allocate for layers of the given shapes.

        Bytes, with r = `max_rows` (as `launch_rows` gives it), H query heads (H' with each KV head's padded
        to a power of two, at least 2), D the head size, T the least tile of the attention kernel,
        q = `max_query_len` and P = programs * waves * multiprocessors / KV heads: logits
        ``(2 + 4 / T) H' logit_tokens``, page scores ``4 r max_length / page_size`` and ``8192 r``, splits
        ``4 q H (D + 1) (r + P)``, and ``4 r (H + K)`` with K KV heads.
        """
        heads = max(shape.num_heads for shape in shapes)
        kv_heads = max(shape.num_kv_heads for shape in shapes)
        padded_heads = max(shape.padded_heads for shape in shapes)
        tiles = -(-logit_tokens // LOGIT_TILE)
        partial = max_query_len * max(
            (max_rows + most_programs(shape.num_kv_heads, device)) * shape.num_heads * shape.head_size
            for shape in shapes
        )
        min_head_size = min(shape.head_size for shape in shapes)

        def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*size, dtype=dtype, device=device)

        return cls(
            max_rows=max_rows,
            max_length=max_length,
            max_query_len=max_query_len,
            logits=empty(tiles * LOGIT_TILE * padded_heads, dtype=torch.int16),
            logit_maxima=empty(tiles * LOGIT_TILE // MIN_TILE * padded_heads),
            scores=empty(max_rows, -(-max_length // page_size)),
            listed=empty(max_rows, SELECTION_WIDTH, dtype=torch.int32),
            partial=empty(partial),
            partial_lse=empty(partial // min_head_size),
            lse=empty(max_rows * heads),
            arrived=torch.zeros(max_rows * kv_heads, dtype=torch.int32, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the workspace takes."""
        return tensor_bytes(self)

    @property
    def partials(self) -> tuple[Tensor, Tensor]:
        """What splits leave to be combined."""
        return self.partial, self.partial_lse

    def logit_capacity(self, shape: LayerShape) -> int:
        """Tiles of logits that fit, for layers of that shape."""
        return self.logits.numel() // (LOGIT_TILE * shape.padded_heads)


def launch_rows(single_token_rows: int, step_rows: int, max_length: int, page_size: int) -> int:
    """Rows of a launch: few enough for the page scores' memory.

    Args:
        single_token_rows: of steps with one row for each sequence, at most.
        step_rows: of any step, at most; more than `single_token_rows` where a sequence has several, as when a
            preempted one is computed again. A launch for each would take longer than what it computes.
        max_length: tokens of a sequence, at most.
        page_size: tokens.
    """
    row_bytes = 4 * -(-max_length // page_size)
    wanted = max(single_token_rows, min(step_rows, LEAST_LAUNCH_ROWS))
    return max(1, min(wanted, MAX_LAUNCH_ROWS, MAX_SCORES_BYTES // row_bytes))


def most_programs(num_kv_heads: int, device: torch.device | str) -> int:
    """The most programs per KV head that a schedule aims at, with any rows and settings."""
    count = multiprocessors(torch.device(device))
    return max(tuning.most_programs_per_head(num_kv_heads, count) for tuning in all_tunings())
