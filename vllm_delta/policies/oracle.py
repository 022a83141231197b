"""The best that choosing pages by DELTA's scores can do: every layer by its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vllm_delta import reference
from vllm_delta.policies.base import Policy, best_pages, page_tokens
from vllm_delta.policies.row import Row


@dataclass(frozen=True)
class Oracle(Policy):
    """DELTA's scores (`vllm_delta.reference`) of the very layer that attends.

    Every layer after the full ones computes its exact attention over all tokens, chooses pages by it as a
    selection layer of DELTA does, and attends to these pages alone. There is no gap between the layer that
    chooses and the layer that attends, so what it loses is what the budget costs.

    It is a bound on quality and no method: counted are the tokens that it attends to, as if it had guessed
    them, not those that it reads to know them.
    """

    def choose(self, row: Row) -> Tensor:
        """One set of pages for all heads."""
        config = self.config
        scores = reference.page_scores(row.probabilities(), config.page_size)
        pages = best_pages(scores[None], config.budget_pages, config.recent_pages, config.sink_pages)
        return page_tokens(pages, config.page_size, row.length)
