"""A layer's decode rows under a policy, one after another; the same code on CPUs and GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vllm_delta.counters import Counters
from vllm_delta.plan import SELF_SELECTING, Role
from vllm_delta.policies.base import Policy
from vllm_delta.policies.row import Layer, Row, RowIndex
from vllm_delta.recall import kept_mass


@dataclass
class Chosen:
    """What the nearest earlier selection layer of a step chose, by row; None: everything."""

    tokens: list[Tensor | None] = field(default_factory=list)
    #: the rows that it chose for
    rows: Sequence[RowIndex] = ()


def decode_rows(
    policy: Policy,
    role: Role,
    layer: Layer,
    rows: Sequence[RowIndex],
    chosen: Chosen,
    counters: Counters,
    output: Tensor,
    recall_layer: int | None = None,
) -> None:
    """Attention of decode rows at a selection layer or a sparse one.

    Args:
        policy: what chooses.
        role: selection layers attend to everything and choose for the sparse layers after them. Where every
            layer chooses for itself (`vllm_delta.plan.SELF_SELECTING`), all are sparse.
        layer: what the rows are read from.
        rows: of the step, in an order that is the same at every layer.
        chosen: written by selection layers, read by sparse ones.
        counters: to which rows, attended and context tokens, and dense rows of sparse layers are added.
        output: ``[tokens, H, D]``; the rows' tokens are written.
        recall_layer: index of a layer whose recall is measured, or None.

    Raises:
        RuntimeError: no selection layer has chosen for these rows.
    """
    config = policy.config
    rows = [index for index in rows if index.length]
    selects, self_selecting = role is Role.SELECTION, config.policy in SELF_SELECTING
    if selects:
        chosen.tokens, chosen.rows = [], rows
    elif not self_selecting and chosen.rows != rows:
        raise RuntimeError("a sparse layer ran before any selection layer of the same step")
    attended = 0
    for number, index in enumerate(rows):
        row, tokens = layer.row(index), None
        if not index.dense and index.length > config.budget_tokens:
            tokens = policy.choose(row) if selects or self_selecting else chosen.tokens[number]
        if selects:
            chosen.tokens.append(tokens)
            tokens = None
        output[index.token] = row.attend(tokens).to(output.dtype)
        if tokens is not None:
            attended += tokens.shape[1] + policy.tokens_read_to_choose(index.length)
        else:
            attended += index.length
        if not selects:
            _count_sparse_row(counters, recall_layer, index, row, tokens)
    counters.add_rows(role, len(rows), attended, sum(index.length for index in rows))


def _count_sparse_row(
    counters: Counters, recall_layer: int | None, index: RowIndex, row: Row, tokens: Tensor | None
) -> None:
    if tokens is None:
        counters.add_dense_rows("prefill" if index.dense else "within_budget", 1)
    if recall_layer is not None and not index.dense:
        counters.add_recall(recall_layer, 1, 1.0 if tokens is None else kept_mass(row, tokens))
