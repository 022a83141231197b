"""Live recall: how much of a sparse layer's exact attention lies on the tokens that it attends to.

For a decode row at a sparse layer, with p[h, t] the softmax over **all** tokens of the row, for query head h,

    ``mass = mean over h of (sum of p[h, t] over the tokens t that head h attends to)``

A layer's attention sinks, which hold no token, are left out of the softmax, so that keeping every token is a
mass of 1. It is computed on the side, in plain PyTorch, in every `recall_sample_steps`-th engine step that
has decode rows, for all of these rows. Those that fit their budget count with a mass of 1 and are not
computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_delta.method.rows import ALL_PAGES
from vllm_delta.plain.rows import Layer, RequestRows, RowIndex, mask_of, together


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


def kept_mass(rows: RequestRows, tokens: Tensor) -> Tensor:
    """The share of each row's attention that lies on these tokens, a mask as in `RequestRows`: ``[R]``."""
    probabilities = rows.by_kv_head(rows.logits.softmax(-1))
    return (probabilities * tokens[:, :, None]).sum(-1).mean((1, 2))


def table_mass(layer: Layer, rows: Sequence[RowIndex], pages: Tensor, page_size: int) -> tuple[int, float]:
    """The mass that a sparse layer keeps of its rows, by DELTA's selection table.

    Args:
        layer: the sparse layer.
        rows: its rows; padding, and those with `ALL_PAGES`, are left out.
        pages: int ``[>= rows, most kept pages]``: the pages of the rows, which are read where there are more
            pages than the row's budget.
        page_size: tokens of a page.

    Returns:
        The number of rows, and the sum of their masses.
    """
    numbers = {
        index: number for number, index in enumerate(rows) if index.length and index.kept_pages != ALL_PAGES
    }
    beyond = [index for index in numbers if index.length > index.kept_pages * page_size]
    mass = float(len(numbers) - len(beyond))
    for part in together(beyond, layer.query.shape[1]):
        these = layer.rows(part)
        length = these.keys.shape[0]
        num_pages = -(-length // page_size)
        kept = torch.stack(
            [mask_of(pages[numbers[index], : index.kept_pages].long(), num_pages) for index in part]
        )
        tokens = kept.to(these.keys.device).repeat_interleave(page_size, -1)[:, None, :length]
        mass += float(kept_mass(these, tokens & these.visible).sum())
    return len(numbers), mass
