"""What a policy is, a rule that says which tokens are attended to, and what policies are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_delta.method.config import DeltaConfig
from vllm_delta.plain.rows import RequestRows, mask_of


@dataclass(frozen=True)
class Policy(ABC):
    """Which tokens a row attends to; which layers choose them is `vllm_delta.method.plan`'s to say."""

    config: DeltaConfig

    @abstractmethod
    def choose(self, rows: RequestRows) -> Tensor:
        """The tokens to attend to, for rows of more than `budget_tokens` tokens each.

        Returns:
            bool ``[R, KV, n]``, each KV head's own, or ``[R, 1, n]``, one set for all; as many of every row
            and head, but for a partial last page.
        """

    def tokens_read_to_choose(self, length: int) -> int:
        """What a sparse layer reads of the cache to choose, beside what it attends to, in tokens."""
        del length
        return 0


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of the last dimension, best first; ties to the lower index."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]


def best_pages(rows: RequestRows, scores: Tensor, config: DeltaConfig, recent_pages: int) -> Tensor:
    """The tokens of the pages that `vllm_delta.method.reference.select_pages` keeps by these scores.

    Args:
        rows: with more pages than the budget.
        scores: ``[R, sets, pages]``, of all pages of the n tokens; those that a row does not see count for
            nothing.
        config: page size, budget, and sink tokens.
        recent_pages: pages kept at each row's end.

    Returns:
        bool ``[R, sets, n]``.
    """
    page = torch.arange(scores.shape[-1], device=scores.device)
    num_pages = (-(-rows.lengths // config.page_size))[:, None, None]
    fixed = (page < config.sink_pages) | (page >= num_pages - recent_pages)
    scores = scores.masked_fill(fixed, torch.inf).masked_fill(page >= num_pages, -torch.inf)
    pages = mask_of(best(scores, config.budget_pages), scores.shape[-1])
    tokens = pages.repeat_interleave(config.page_size, -1)[..., : rows.keys.shape[0]]
    return tokens & rows.visible
