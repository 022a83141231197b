"""vLLM's schedulers, which ask for drafts in steps where they save time.

vLLM lets a scheduler choose how many tokens are drafted by the number of requests in a step, from a list. In
its place stands an object that looks at the requests' lengths, and says all or none.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_delta.integration.lossless import payoff_of


class _Drafts:
    """What to draft, by the number of requests, of which vLLM knows no more."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def __getitem__(self, num_requests: int) -> int:
        running = self._scheduler.running
        lengths = [request.num_tokens for request in running if not request.is_prefill_chunk]
        return self._scheduler.num_spec_tokens if self._scheduler.payoff.pays(lengths) else 0


class _DraftsWherePaid:
    """To be mixed into a scheduler of vLLM's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.payoff = payoff_of(self.vllm_config)  # type: ignore[attr-defined]
        self.dynamic_sd_lookup = _Drafts(self)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As vLLM's; what was accepted counts for whether drafts pay."""
        if num_draft_tokens == self.payoff.draft_tokens:
            self.payoff.observe(num_accepted_tokens)
        return super().make_spec_decoding_stats(  # type: ignore[misc]
            spec_decoding_stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs
        )


class DeltaAsyncScheduler(_DraftsWherePaid, AsyncScheduler):  # type: ignore[misc]
    """For steps that are scheduled before the last one is done."""


class DeltaScheduler(_DraftsWherePaid, Scheduler):  # type: ignore[misc]
    """For steps one after another."""
