"""Whether drafts save time, from the lengths of a batch's sequences. Plain Python, without vLLM.

Times are in tokens of the KV cache that a pass could have read meanwhile. A pass takes what its weights take,
``fixed``, and what it reads of the cache. With C tokens in all sequences, S of them within their budgets, and
a of k drafts accepted on average:

    without drafts   (1 + a) (fixed + C)                          for 1 + a tokens
    with drafts      k (fixed + S) + verify fixed + choose C      for the same
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

#: How much longer a pass over a token and 7 drafts takes than one over a token: for weights, and for the
#: cache where pages are chosen on the way. On GPUs both are read once, which is what takes time; on CPUs
#: products count, too.
ON_GPUS, ON_CPUS = (1.3, 1.2), (4.0, 6.0)

#: Share of drafts that is taken to be accepted before any were verified.
PRIOR = 0.9

#: Verified sequences that the average of accepted drafts is about; steps without drafts that it outlives.
MEMORY, FORGET = 512.0, 4096


@dataclass
class DraftPayoff:
    """One per engine."""

    draft_tokens: int
    budget_tokens: int
    #: tokens of the KV cache that a pass could read in the time that its weights take
    fixed_tokens: float
    #: one of `ON_GPUS` and `ON_CPUS`
    costs: tuple[float, float]
    #: whether drafts are made in any case
    always: bool = False
    #: drafts that are accepted of a sequence, on average
    accepted: float = field(init=False)

    def __post_init__(self) -> None:
        self.accepted = self._prior

    @property
    def _prior(self) -> float:
        return PRIOR * self.draft_tokens

    @property
    def _verify(self) -> float:
        return 1 + (self.costs[0] - 1) * self.draft_tokens / 7

    @property
    def _choose(self) -> float:
        return 1 + (self.costs[1] - 1) * self.draft_tokens / 7

    def pays(self, contexts: Sequence[int]) -> bool:
        """Whether drafts save time in a batch of sequences of so many tokens."""
        if self.always:
            return True
        context = sum(contexts)
        kept = sum(min(length, self.budget_tokens) for length in contexts)
        drafted = self.draft_tokens * (self.fixed_tokens + kept)
        drafted += self._verify * self.fixed_tokens + self._choose * context
        pays = drafted < (1 + self.accepted) * (self.fixed_tokens + context)
        if not pays:  # what was accepted long ago says less and less
            self.accepted += (self._prior - self.accepted) / FORGET
        return pays

    def observe(self, accepted: int) -> None:
        """Count a sequence whose drafts were verified."""
        self.accepted += (accepted - self.accepted) / MEMORY

    def least_context(self) -> int:
        """Tokens of a single sequence from which on drafts pay, if most are accepted; at least the budget."""
        gain = 1 + self._prior - self._choose
        spent = (self.draft_tokens + self._verify - 1 - self._prior) * self.fixed_tokens
        return max(self.budget_tokens, int((spent + self.draft_tokens * self.budget_tokens) / gain) + 1)
