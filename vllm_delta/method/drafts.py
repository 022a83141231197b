"""Lossless speculation: sparse layers draft tokens, full attention verifies them. Plain, without vLLM.

A step of the engine has two parts. In the first, every layer attends to everything: it verifies the tokens
that were drafted before, and layers choose pages on the way. In the second, the model drafts the next tokens,
one after another, with sparse layers. Their pages stay those of the first part, and they attend to all that
came since, too; or selection layers choose pages at every draft, as in ordinary decoding. The keys and values
of drafts are overwritten when they are verified. So all that stays in the cache is full attention's, whatever
pages were chosen.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.plan import Plan, Role
from vllm_delta.method.rows import ALL_PAGES

#: How much longer a pass takes in which selection layers attend to everything, about.
FRESH_COST = 1.2

#: Rows after which what was accepted of their drafts counts, and those after which old ones are forgotten.
LEAST_ROWS, MOST_ROWS = 32, 512

#: Rows after which it is worth a try again what was accepted less.
RETRY_ROWS = 8192


@dataclass(frozen=True)
class DraftPlans:
    """What each layer does in the two parts of a step."""

    verify: Plan
    #: by pages that were chosen in the first part; None where there are none
    frozen: Plan | None
    #: by pages that selection layers choose at every draft; None where they do not
    fresh: Plan | None

    @classmethod
    def of(cls, config: DeltaConfig, plan: Plan) -> DraftPlans:
        """The plans of a model, of which `plan` is the one of ordinary decoding."""
        eligible = sorted(plan.roles)
        if config.draft_pages == "fresh":
            return cls(Plan(dict.fromkeys(eligible, Role.FULL), plan.source), None, plan)
        full, sparse = eligible[: config.draft_full_layers], eligible[config.draft_full_layers :]
        if config.draft_pages == "shared":
            choosing, source = plan.layers(Role.SELECTION) or eligible[:1], plan.source
            nearest = [max(0, bisect_right(choosing, layer) - 1) for layer in sparse]
            choosers = {layer: choosing[index] for layer, index in zip(sparse, nearest, strict=True)}
        else:
            choosers, source = {layer: layer for layer in sparse}, "own pages"
        verify = dict.fromkeys(eligible, Role.FULL) | dict.fromkeys(choosers.values(), Role.SELECTION)
        draft = dict.fromkeys(full, Role.FULL) | dict.fromkeys(sparse, Role.SPARSE)
        frozen = Plan(draft, source, choosers=choosers)
        own_tables = {layer: layer for layer in choosers.values()}
        return cls(
            Plan(verify, source, choosers=own_tables), frozen, plan if config.draft_pages == "auto" else None
        )

    @cached_property
    def full(self) -> Plan:
        """The plan of a verification in which no layer chooses pages, as the next drafts need none."""
        return replace(self.verify, roles=dict.fromkeys(self.verify.roles, Role.FULL))

    def draft(self, *, fresh: bool) -> Plan:
        """The plan of drafts."""
        plan = self.fresh if fresh else self.frozen
        assert plan is not None
        return plan

    def describe(self) -> str:
        """One line: how drafts are made."""
        parts = []
        if self.frozen is not None:
            own = self.frozen.source == "own pages"
            whose = "its own pages" if own else f"the pages of layers {', '.join(map(str, self.choosing))}"
            full = len(self.frozen.layers(Role.FULL))
            parts.append(f"each sparse layer reads {whose}" + (f", {full} full layers" if full else ""))
        if self.fresh is not None:
            parts.append(self.fresh.describe())
        return "drafts: " + ", or ".join(parts) + "; full attention verifies them"

    @property
    def choosing(self) -> list[int]:
        """The layers that choose pages in the first part, ascending; each has a table of its own."""
        return self.verify.layers(Role.SELECTION)


def most_choosing(config: DeltaConfig, plan: Plan) -> int:
    """Layers that may choose pages where drafts are verified, by this plan and any with as many passes."""
    if config.draft_pages == "fresh":
        return 0
    if config.draft_pages == "shared":
        return max(1, len(plan.roles) - len(plan.layers(Role.SPARSE)))
    return max(0, len(plan.roles) - config.draft_full_layers)


@dataclass
class PageChoice:
    """Which pages drafts read, where both ways are there: those that give more tokens for their time.

    Frozen pages cost less. They serve where what a model looks up stays about the same for some tokens, as it
    does in prose, and fail where every token looks up something else.
    """

    draft_tokens: int
    #: whether selection layers choose at every draft now
    fresh: bool = False
    #: by way: rows, and drafts accepted of theirs
    _seen: dict[bool, tuple[float, float]] = field(default_factory=dict)
    _since_change: int = 0

    def observe(self, *, fresh: bool, rows: int, accepted: int) -> None:
        """Count drafts that were verified, and choose anew.

        Args:
            fresh: how they were made.
            rows: sequences, each with `draft_tokens` drafts.
            accepted: drafts of all of them.
        """
        seen_rows, seen_accepted = self._seen.get(fresh, (0.0, 0.0))
        decay = min(1.0, MOST_ROWS / (seen_rows + rows)) if rows else 1.0
        self._seen[fresh] = decay * (seen_rows + rows), decay * (seen_accepted + accepted)
        if fresh != self.fresh:
            return
        self._since_change += rows
        if self._since_change < LEAST_ROWS:
            return
        if self._since_change > RETRY_ROWS:
            self._seen.pop(not fresh, None)
        if self._tokens_per_time(fresh=not fresh) > self._tokens_per_time(fresh=fresh):
            self.fresh, self._since_change = not fresh, 0
            self._seen.pop(self.fresh, None)

    def _tokens_per_time(self, *, fresh: bool) -> float:
        """Of what was not tried yet: if all drafts were accepted; short of that a change is not worth it."""
        rows, accepted = self._seen.get(fresh, (0.0, 0.0))
        mean = accepted / rows if rows else 0.9 * self.draft_tokens
        return (1 + mean) / (FRESH_COST if fresh else 1.0)


def grown_budgets(kept_pages: int, chosen_lengths: Tensor, lengths: Tensor, page_size: int) -> Tensor:
    """The budgets of rows that have grown since their pages were chosen, int32 ``[rows]``.

    See `vllm_delta.method.reference`; a row of which none were chosen attends to everything.

    Args:
        kept_pages: the budget by which pages were chosen.
        chosen_lengths: int32 ``[rows]``: tokens that the row's last token saw then; 0: none were chosen.
        lengths: int32 ``[rows]``: tokens that it sees now.
        page_size: tokens of a page.
    """
    begun = -(-lengths // page_size) + (-chosen_lengths // page_size)
    return torch.where(chosen_lengths > 0, kept_pages + begun, ALL_PAGES).int()
