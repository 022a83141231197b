"""The methods that DELTA is compared with, written a second time: masks in NumPy, by loops and lists.

Shares no code with vllm_delta. A policy is a function of one row and the budget that returns what each query
head attends to.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from dense_mask import choose_pages


class MaskRow(NamedTuple):
    """One row: arrays in float64, keys repeated for each query head."""

    query: np.ndarray  # [heads, head size]
    keys: np.ndarray  # [heads, tokens, head size]
    logits: np.ndarray  # [heads, tokens]
    probabilities: np.ndarray  # [heads, tokens]
    heads_per_kv_head: int


class Budget(NamedTuple):
    """In tokens."""

    budget: int
    recent: int
    sink: int
    page: int

    def pages(self):
        return self.budget // self.page, self.recent // self.page, self.sink // self.page


def streaming(row, budget):
    mask = np.zeros(row.logits.shape, dtype=bool)
    mask[:, : budget.sink] = True
    mask[:, mask.shape[1] - budget.budget + budget.sink :] = True
    return mask


def oracle(row, budget):
    mask = choose_pages(row.probabilities.max(axis=0), budget.page, *budget.pages())
    return np.tile(mask, (len(row.logits), 1))


def quest(row, budget):
    heads, length = row.logits.shape
    budget_pages, recent_pages, sink_pages = budget.pages()
    mask = np.zeros((heads, length), dtype=bool)
    for first in range(0, heads, row.heads_per_kv_head):
        together = range(first, first + row.heads_per_kv_head)
        bounds = []
        for start in range(0, length, budget.page):
            page = row.keys[first, start : start + budget.page]
            low, high = page.min(axis=0), page.max(axis=0)
            bounds.append(max(np.maximum(row.query[h] * low, row.query[h] * high).sum() for h in together))
        pages = choose_pages(np.array(bounds), 1, budget_pages, max(1, recent_pages), sink_pages)
        mask[together] = np.repeat(pages, budget.page)[:length]
    return mask


def tidal(row, budget):
    heads, length = row.logits.shape
    mask = np.zeros((heads, length), dtype=bool)
    for first in range(0, heads, row.heads_per_kv_head):
        score = row.probabilities[first : first + row.heads_per_kv_head].max(axis=0)
        best = np.lexsort((np.arange(length), -score))
        for head in range(first, first + row.heads_per_kv_head):
            mask[head, best[: budget.budget]] = True
    return mask


def lessismore(row, budget):
    heads, length = row.logits.shape
    chosen = budget.budget * 3 // 4
    reserved = budget.budget - chosen
    sink = budget.sink if budget.sink <= reserved else 0
    end = length - (reserved - sink)
    lists = [sorted(range(sink, end), key=lambda t: (-row.logits[head, t], t)) for head in range(heads)]
    union = dict.fromkeys(ranked[rank] for rank in range(chosen) for ranked in lists)  # keeps their order
    mask = np.zeros((heads, length), dtype=bool)
    mask[:, [*range(sink), *list(union)[:chosen], *range(end, length)]] = True
    return mask


MASKS = {
    "quest": quest,
    "lessismore": lessismore,
    "streaming": streaming,
    "tidal": tidal,
    "oracle": oracle,
}
