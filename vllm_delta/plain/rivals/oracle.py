"""The best that choosing pages by DELTA's scores can do: every layer by its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from vllm_delta.plain.rivals.policy import Policy, best_pages
from vllm_delta.plain.rows import RequestRows


@dataclass(frozen=True)
class Oracle(Policy):
    """DELTA's scores (`vllm_delta.method.reference`) of the very layer that attends.

    Every layer after the full ones computes its exact attention over all tokens, chooses pages by it as a
    selection layer of DELTA does, and attends to these pages alone. There is no gap between the layer that
    chooses and the layer that attends, so what it loses is what the budget costs.

    It is a bound on quality and no method: counted are the tokens that it attends to, as if it had guessed
    them, not those that it reads to know them.
    """

    def choose(self, rows: RequestRows) -> Tensor:
        """One set of pages for all heads."""
        token_scores = rows.probabilities().amax(1, keepdim=True)
        padding = -token_scores.shape[-1] % self.config.page_size
        pages = pad(token_scores, (0, padding)).reshape(len(rows), 1, -1, self.config.page_size)
        return best_pages(rows, pages.sum(-1), self.config, self.config.recent_pages)
