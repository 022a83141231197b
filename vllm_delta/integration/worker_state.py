"""What the layers of one worker share, whatever the platform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_delta.integration.aside import Aside
from vllm_delta.kernels.types import SelectionTable
from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.counters import Counters
from vllm_delta.method.drafts import DraftPlans, PageChoice
from vllm_delta.method.plan import Plan
from vllm_delta.method.rows import SelectionRule

Group = TypeVar("Group")

#: Tokens of each prompt of a batch, int ``[requests]`` on the CPU, or None where they are not known.
PromptLens = Callable[[CommonAttentionMetadata], Tensor | None]


@dataclass
class WrittenTable(Generic[Group]):
    """A selection table, and of what it is."""

    table: SelectionTable
    #: the step and the group of the selection layer that wrote it last
    step: int = -1
    group: Group | None = None


@dataclass
class Drafting:
    """What lossless speculation adds to a worker."""

    plans: DraftPlans
    #: one for each layer that may choose pages
    tables: list[WrittenTable[Any]]
    choice: PageChoice

    @property
    def fresh(self) -> bool:
        """Whether selection layers choose pages at every draft of the drafts that come next."""
        if self.plans.frozen is None or self.plans.fresh is None:
            return self.plans.frozen is None
        return self.choice.fresh

    @property
    def nbytes(self) -> int:
        """Bytes of its tables."""
        return sum(written.table.nbytes for written in self.tables)

    def table_of(self, layer: int) -> WrittenTable[Any]:
        """The table of a layer that chooses."""
        return self.tables[self.plans.choosing.index(layer)]


@dataclass(kw_only=True)
class WorkerState(Generic[Group]):
    """One per worker: settings, plan, counters, and the selection table of the current step.

    Layers run one after another, so one table and one workspace do for all, unless drafts are made. `Group`
    is what a platform knows of a KV cache group; groups of the same layers are equal.
    """

    config: DeltaConfig
    plan: Plan
    counters: Counters
    #: query tokens of a decode row, where drafts are verified, see `verified_tokens`
    max_query_len: int = 1
    #: of all rows of a step; None where no layer of this worker may be sparse, or each has a table of its own
    table: WrittenTable[Group] | None
    #: where drafts are made and verified
    drafting: Drafting | None = None
    #: set by DELTA's worker
    prompt_lens: PromptLens | None = None
    aside: Aside = field(default_factory=Aside)
    #: the first group that asked, whose steps count
    first_group: Group | None = None
    #: number of the current step
    step: int = 0
    rule: SelectionRule = field(init=False)

    def __post_init__(self) -> None:
        self.rule = self.config.rule

    @property
    def nbytes(self) -> int:
        """Bytes of memory that DELTA holds."""
        drafting = 0 if self.drafting is None else self.drafting.nbytes
        return drafting + (0 if self.table is None else self.table.table.nbytes)

    @property
    def row_query_len(self) -> int:
        """Query tokens of a decode row, at most, as things are: plain code has a row for each token."""
        return 1 if self.aside.is_needed(self.config) else self.max_query_len

    def use(self, config: DeltaConfig, plan: Plan) -> None:
        """Go on with other settings and another plan; not where CUDA graphs hold those of before.

        The budget is at most, the page size at least that of the start, for which buffers were allocated.
        """
        self.config, self.plan, self.rule = config, plan, config.rule
        if self.drafting is not None:
            self.drafting.plans = DraftPlans.of(config, plan)

    def renew(self, metadata: Any) -> None:
        """Make a step's metadata that of a step with the same rows now, under settings that may have changed.

        The step counts as one that `begin_step` has not seen; its groups share the number.
        """
        metadata.plan, metadata.step = self.plan, self.step

    def begin_step(self, group: Group, *, has_rows: bool) -> int:
        """The number of the step that this group's metadata is built for; every group calls it once."""
        if self.first_group is None:
            self.first_group = group
        if group == self.first_group:
            self.step += 1
            if has_rows:
                self.aside.recall.next_step(self.config.recall_sample_steps)
        return self.step

    def table_for_writing(self, step: int, group: Group, chooser: int | None) -> SelectionTable:
        """A table, which from now on is this step's and in this group's page frames; see `Plan.choosers`."""
        written = self._table_of(chooser)
        assert written is not None
        written.step, written.group = step, group
        return written.table

    def table_for_reading(self, step: int, chooser: int | None) -> WrittenTable[Group]:
        """A table that has been written, in this step if all layers share it; see `Plan.choosers`.

        What reads a layer's own table does not look at rows for which no pages were chosen.

        Raises:
            RuntimeError: no selection layer has run in this step.
        """
        written = self._table_of(chooser)
        if written is None or (chooser is None and written.step != step):
            raise RuntimeError("a sparse layer ran before any selection layer of the same step")
        return written

    def _table_of(self, chooser: int | None) -> WrittenTable[Group] | None:
        if chooser is None:
            return self.table
        assert self.drafting is not None
        return self.drafting.table_of(chooser)

    def prompt_lens_of(self, common: CommonAttentionMetadata, seq_lens: Tensor) -> Tensor:
        """Tokens of each prompt, int ``[requests]`` on the CPU, without padding; `seq_lens` as well."""
        if self.prompt_lens is not None:
            prompt_lens = self.prompt_lens(common)
            if prompt_lens is not None:
                return prompt_lens
        # Without DELTA's worker, and in runs that capture graphs, only vLLM's own distinction is known: what
        # starts in the prompt is prefill as a whole.
        if common.is_prefilling is None:
            raise RuntimeError("vLLM did not say which requests are in their prompt")
        return torch.where(common.is_prefilling, seq_lens[: len(common.is_prefilling)], 0)
