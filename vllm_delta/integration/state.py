"""What the layers of one worker share: the plan, the current selection table, scratch memory, counters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_delta.config import DeltaConfig
from vllm_delta.counters import Counters
from vllm_delta.ops import Rows, SelectionTable
from vllm_delta.plan import Plan
from vllm_delta.policies.rows import Layer, RowIndex
from vllm_delta.policies.run import Chosen
from vllm_delta.recall import RecallSampler


@dataclass
class DeltaState:
    """One per worker. Layers run one after another, so one table and one workspace serve them all."""

    config: DeltaConfig
    plan: Plan
    table: SelectionTable
    #: scratch memory of the kernels, see `vllm_delta.ops.allocate_workspace`
    workspace: Tensor
    counters: Counters = field(default_factory=Counters)
    #: tokens of each prompt in the current batch, int ``[requests]``; set by DELTA's worker
    prompt_lens: Callable[[int], Tensor] | None = None
    #: what selection layers chose, under policies other than DELTA
    chosen: Chosen = field(default_factory=Chosen)
    recall: RecallSampler = field(default_factory=RecallSampler)
    #: is shown what layers attend to that attend to everything; set by a calibration
    observer: Callable[[int, Layer, Sequence[RowIndex]], None] | None = None
    #: the rows of the current step; KV cache groups of one step share them
    _rows: Rows | None = None
    #: the rows that `table` was written for
    _table_rows: Rows | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that DELTA holds."""
        return self.table.nbytes + self.workspace.nbytes

    def share_rows(self, rows: Rows) -> Rows:
        """The same object for every KV cache group of a step, recognised by its content.

        Other rows than the last ones begin a step.
        """
        known = self._rows
        if (
            known is None
            or not torch.equal(known.lengths, rows.lengths)
            or not torch.equal(known.tokens, rows.tokens)
            or not torch.equal(known.requests, rows.requests)
        ):
            self._rows = known = rows
            self.recall.next_step(self.config.recall_sample_steps)
        return known

    def table_for_writing(self, rows: Rows) -> SelectionTable:
        """The table, which from now on belongs to these rows."""
        self._table_rows = rows
        return self.table

    def table_for_reading(self, rows: Rows) -> SelectionTable:
        """The table that the nearest earlier selection layer wrote.

        Raises:
            RuntimeError: no selection layer has run for these rows.
        """
        if self._table_rows is not rows:
            raise RuntimeError("a sparse layer ran before any selection layer of the same step")
        return self.table
