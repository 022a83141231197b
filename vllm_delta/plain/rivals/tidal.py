"""TidalDecode: tokens by the attention of two layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vllm_delta.plain.rivals.policy import Policy, best
from vllm_delta.plain.rows import RequestRows, mask_of


@dataclass(frozen=True)
class Tidal(Policy):
    """TidalDecode (https://arxiv.org/abs/2410.05076): position persistent sparse attention.

    After the full layers comes a token selection layer, and another one in the middle (`selection_layers`
    where given). It attends to everything and keeps, for each head, the `budget_tokens` tokens of the largest
    q . k; the layers up to the next selection layer attend to these. Nothing is reserved for recent or first
    tokens: `recent_tokens`, `sink_tokens` and `page_size` are not used.

    Adapted: where several query heads share a KV head, a token counts with the largest of their attention
    probabilities, and all of them attend to the same tokens, so that the budget is what is read. With a KV
    head for every query head these are the paper's tokens, since the softmax keeps a head's order. (The
    authors' evaluation code repeats the keys for each query head, which may read as many times the budget as
    query heads share a KV head.) The paper's occasional correction of the cache, which its evaluation does
    without, is left out.
    """

    def choose(self, rows: RequestRows) -> Tensor:
        """A set of tokens for each KV head."""
        scores = rows.by_kv_head(rows.log_probabilities()).amax(2)
        return mask_of(best(scores, self.config.budget_tokens), scores.shape[-1])
