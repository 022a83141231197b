"""Live recall: how much of a sparse layer's exact attention lies on the tokens that it attends to.

For a decode row at a sparse layer, with p[h, t] the softmax over **all** tokens of the row, for query head h,

    ``mass = mean over h of (sum of p[h, t] over the tokens t that head h attends to)``

A layer's attention sinks, which hold no token, are left out of the softmax, so that keeping every token is a
mass of 1. It is computed on the side, in plain PyTorch, in every `recall_sample_steps`-th engine step that
has decode rows, for all of these rows. Those that fit the budget count with a mass of 1 and are not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vllm_delta import reference
from vllm_delta.policies.row import Layer, Row, RowIndex


@dataclass
class RecallSampler:
    """Which engine steps are sampled."""

    #: steps with decode rows so far
    steps: int = 0
    #: whether the current one is sampled
    active: bool = False

    def next_step(self, sample_steps: int) -> None:
        """Begin a step with decode rows; `sample_steps` is the setting, 0 for never."""
        self.steps += 1
        self.active = sample_steps > 0 and self.steps % sample_steps == 0


def kept_mass(row: Row, tokens: Tensor) -> float:
    """The share of one row's attention that lies on these tokens, as in `Row` int64 ``[KV or 1, tokens]``."""
    probabilities = row.by_kv_head(row.logits().softmax(-1))
    kept = probabilities.gather(2, tokens[:, None].expand(*probabilities.shape[:2], -1))
    return float(kept.sum(-1).mean())


def table_mass(
    layer: Layer, rows: Sequence[RowIndex], pages: Tensor, page_size: int, budget_pages: int
) -> tuple[int, float]:
    """The mass that a sparse layer keeps of its rows, by DELTA's selection table.

    Args:
        layer: the sparse layer.
        rows: its rows; those that are dense as a whole, or padding, are left out.
        pages: int ``[>= rows, budget_pages]``: the pages of the rows, which are read where there are more
            pages than the budget.
        page_size: tokens of a page.
        budget_pages: pages that a row keeps.

    Returns:
        The number of rows, and the sum of their masses.
    """
    count, mass = 0, 0.0
    for index, kept in zip(rows, pages, strict=False):
        if index.length == 0 or index.dense:
            continue
        count += 1
        if index.length <= budget_pages * page_size:
            mass += 1.0
        else:
            tokens = reference.kept_tokens(kept[:budget_pages].long(), page_size, index.length)
            mass += kept_mass(layer.row(index), tokens[None])
    return count, mass
