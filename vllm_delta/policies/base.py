"""What a policy is, and what policies are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_delta.config import DeltaConfig
from vllm_delta.policies.row import Row


@dataclass(frozen=True)
class Policy(ABC):
    """Which tokens a row attends to; which layers choose them is `vllm_delta.plan`'s to say."""

    config: DeltaConfig

    @abstractmethod
    def choose(self, row: Row) -> Tensor:
        """The tokens to attend to, for a row of more than `budget_tokens` tokens.

        Returns:
            int64 ``[KV, tokens]``, each KV head's own, or ``[1, tokens]``, one set for all; ascending.
        """

    def tokens_read_to_choose(self, length: int) -> int:
        """What a sparse layer reads of the cache to choose, beside what it attends to, in tokens."""
        del length
        return 0


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of the last dimension, best first; ties to the lower index."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]


def best_pages(scores: Tensor, budget_pages: int, recent_pages: int, sink_pages: int) -> Tensor:
    """`vllm_delta.reference.select_pages` for several rows of scores, with more pages than the budget.

    Args:
        scores: ``[sets, pages]``; sets of one row, over the same pages.
        budget_pages: pages to keep.
        recent_pages: pages kept at the end.
        sink_pages: pages kept at the start.

    Returns:
        int64 ``[sets, budget_pages]``, ascending.
    """
    scores = scores.clone()
    scores[:, :sink_pages] = torch.inf
    scores[:, scores.shape[1] - recent_pages :] = torch.inf
    return best(scores, budget_pages).sort(-1).values


def page_tokens(pages: Tensor, page_size: int, length: int) -> Tensor:
    """Tokens of pages, int64 ``[sets, pages]`` to ``[sets, tokens]``.

    The last page may be partial; all sets have it, or none.
    """
    offsets = torch.arange(page_size, device=pages.device)
    tokens = (pages[..., None] * page_size + offsets).flatten(-2)
    return tokens[:, : int((tokens[0] < length).sum())]
