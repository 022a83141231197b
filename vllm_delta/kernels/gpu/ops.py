"""The three kinds of layers on a GPU, as functions on tensors.

A step's rows come in launches of at most `Workspace.max_rows`. Each launch has a `Schedule`, made once a step
by `make_schedule` and used by every layer. All buffers are allocated once, and keep their addresses. What is
launched depends on the number of rows and on `DecodeRows.max_query_len`; the rest is read from memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_delta.kernels.gpu.attention import attend
from vllm_delta.kernels.gpu.device import SideStream, has_dependent_launch, multiprocessors
from vllm_delta.kernels.gpu.layer import LayerInputs
from vllm_delta.kernels.gpu.scores import score_keys, score_logits
from vllm_delta.kernels.gpu.select import select_pages
from vllm_delta.kernels.gpu.shape import LayerShape
from vllm_delta.kernels.gpu.tuning import most_full_units
from vllm_delta.kernels.gpu.workspace import Workspace
from vllm_delta.kernels.types import SelectionTable


def full_attention(
    inputs: LayerInputs,
    workspace: Workspace,
    counters: Tensor,
    output: Tensor,
    *,
    just_scheduled: bool = False,
) -> None:
    """A full layer: a selection layer's attention, without its logits; arguments as below."""
    attend(inputs, workspace, counters, output, dependent=not just_scheduled)


def selection_attention(
    inputs: LayerInputs,
    workspace: Workspace,
    counters: Tensor,
    output: Tensor,
    table: SelectionTable,
    *,
    just_scheduled: bool = False,
    side: SideStream | None = None,
) -> None:
    """A selection layer: full attention, and the pages for the sparse layers after it.

    Args:
        inputs: what is read.
        workspace: scratch.
        counters: int64 ``[5]``: rows, attended tokens, context tokens, rows with `ALL_PAGES`, rows within
            their budget; the last two count in sparse layers. Each query token counts as a row.
        output: ``[tokens, num_heads, head_size]``; the rows' tokens are written.
        table: with frames, of at least as many rows, with room for kept and following pages; is written.
        just_scheduled: whether `make_schedule` may have been the launch before this one, or a side stream
            was joined.
        side: where pages are chosen, if given, while the model goes on: to be joined before the next layer
            that these functions run.

    Raises:
        ValueError: shapes that do not fit together.
    """
    table.check(len(inputs.rows))
    attend(inputs, workspace, counters, output, keeps_logits=True, dependent=not just_scheduled)
    block_size = inputs.kv_cache.shape[2]
    arguments = workspace.scores, workspace.listed, inputs.rows, inputs.block_table, block_size, inputs.rule
    if side is None:
        page_scores(inputs, workspace)
        select_pages(*arguments, table)
        return
    # Scores from the keys read the query, whose memory the model may use again at once.
    score_keys(inputs, workspace)
    with side.fork():
        score_logits(inputs, workspace, dependent=False)
        select_pages(*arguments, table)


def sparse_attention(
    inputs: LayerInputs,
    workspace: Workspace,
    counters: Tensor,
    output: Tensor,
    table: SelectionTable,
    *,
    same_blocks: bool,
    just_scheduled: bool = False,
) -> None:
    """A sparse layer: attention over the pages of the selection table; arguments as above.

    `same_blocks` says that the selection layer had the same block table, so that page frames hold. Of several
    query tokens, the recent pages have to hold all.
    """
    table.check(len(inputs.rows))
    attend(inputs, workspace, counters, output, table, frames=same_blocks, dependent=not just_scheduled)


def page_scores(inputs: LayerInputs, workspace: Workspace) -> None:
    """Page scores of the rows that exceed their budget, into `workspace.scores`; after their attention."""
    score_logits(inputs, workspace)
    score_keys(inputs, workspace)


def most_full_rows(shape: LayerShape, itemsize: int, device: torch.device) -> int:
    """Rows up to which full layers should run with `full_attention`, not FlashAttention 3; 0 for none.

    For rows of one query token: with several it has not been measured.
    """
    if shape.quantized or not has_dependent_launch(device):
        return 0
    units = most_full_units(shape.padded_head_size * itemsize, multiprocessors(device))
    return units // shape.num_kv_heads
