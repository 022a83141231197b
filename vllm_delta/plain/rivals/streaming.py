"""StreamingLLM: the first tokens and the last ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vllm_delta.plain.rivals.policy import Policy
from vllm_delta.plain.rows import RequestRows


@dataclass(frozen=True)
class Streaming(Policy):
    """StreamingLLM (https://arxiv.org/abs/2309.17453): attention sinks and a sliding window.

    A row of n tokens attends to the tokens ``0 .. sink_tokens - 1`` and ``n - (budget_tokens - sink_tokens)
    .. n - 1``; the paper's sinks are 4 tokens. `recent_tokens` and `page_size` are not used.

    Adapted: tokens keep their positions in the text. The paper numbers them by their place in the window,
    which matters beyond the lengths that a model was trained for. The paper's prompts and first layers have
    the window, too; here prompts and the full layers are dense, as in every policy.
    """

    def choose(self, rows: RequestRows) -> Tensor:
        """One set for all heads, the same whatever a row holds."""
        sinks, position = self.config.sink_tokens, rows.positions
        last = rows.lengths[:, None, None] - (self.config.budget_tokens - sinks)
        return ((position < sinks) | (position >= last)) & rows.visible
