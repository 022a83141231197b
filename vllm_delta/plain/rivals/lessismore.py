"""LessIsMore: one set of tokens for all heads, ranked across them, and a share for the recent ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_delta.plain.rivals.policy import Policy, best
from vllm_delta.plain.rows import RequestRows, mask_of


@dataclass(frozen=True)
class LessIsMore(Policy):
    """LessIsMore (https://arxiv.org/abs/2508.07101): unified selection and a stable recency window.

    Of the budget K = `budget_tokens`, ``K * recent_share`` tokens are reserved, k = K less these are chosen.
    At a selection layer, which attends to everything, of the tokens that are not reserved:

    1. each query head ranks its k tokens of the largest q . k, from 0 on;
    2. the union over the heads is sorted by the tokens' ranks, where a token has the best of its ranks;
    3. the first k of them are kept, and the reserved ones: the same set for all heads, until the next
       selection layer.

    Reserved are the last tokens and, out of the same share, the first `sink_tokens` (4 in the paper's
    experiments), if they fit in. The paper leaves open which of two heads' tokens of one rank goes first; as
    in the authors' code, that of the lower head does.

    Like TidalDecode, whose layers the paper takes over, it has two selection layers, the first layer after
    the full ones and one in the middle, where `selection_layers` are not given. `recent_tokens` and
    `page_size` are not used.
    """

    #: the paper's r
    recent_share: float = 0.25

    def choose(self, rows: RequestRows) -> Tensor:
        """One set of tokens for all heads."""
        budget, position = self.config.budget_tokens, rows.positions
        chosen = int(budget * (1 - self.recent_share))
        reserved = budget - chosen
        sinks = self.config.sink_tokens if self.config.sink_tokens <= reserved else 0
        recent = rows.lengths[:, None, None] - (reserved - sinks)
        is_reserved = ((position < sinks) | (position >= recent)) & rows.visible
        ranked = best(rows.logits.masked_fill(is_reserved, -torch.inf), chosen)  # [R, H, k]
        # A token's key orders by rank, then by head; keys differ, unless a token is nobody's choice.
        num_heads = ranked.shape[1]
        keys = torch.arange(num_heads * chosen, device=ranked.device).view(chosen, num_heads).mT
        first = torch.full((len(rows), position.shape[0]), keys.numel(), device=ranked.device)
        first.scatter_reduce_(1, ranked.flatten(1), keys.flatten().expand(len(rows), -1), "amin")
        first = first.masked_fill(is_reserved[:, 0], -1)
        return mask_of(first.argsort(stable=True)[:, None, :budget], position.shape[0])
