"""What stands beside DELTA's kernels in a layer: rivals, live recall, a calibration that looks on.

All of it is plain PyTorch, needs the rows on the host, and is off in a server that just serves. A layer calls
`replaces` before its kernel and `after` behind it; both are the same on every platform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vllm_delta.kernels.types import SelectionTable
from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.counters import Counters
from vllm_delta.method.plan import Role
from vllm_delta.plain.recall import RecallSampler, table_mass
from vllm_delta.plain.rivals import make_policy
from vllm_delta.plain.rivals.run import Chosen, decode_rows
from vllm_delta.plain.rows import Layer, RowIndex


@dataclass(frozen=True)
class LayerCall:
    """One layer's decode rows, as plain code reads them."""

    index: int
    role: Role
    layer: Layer
    #: of the step, padding included
    rows: Sequence[RowIndex]
    #: ``[tokens, H, D]``
    output: Tensor


#: What is shown selection layers: a layer's index, the layer, and its rows.
Observer = Callable[[int, Layer, Sequence[RowIndex]], None]


@dataclass
class Aside:
    """One per worker."""

    #: set by a calibration
    observer: Observer | None = None
    #: what selection layers chose, under policies other than DELTA
    chosen: Chosen = field(default_factory=Chosen)
    recall: RecallSampler = field(default_factory=RecallSampler)

    def is_needed(self, config: DeltaConfig) -> bool:
        """Whether steps with these settings need Python in the attention call."""
        return self.observer is not None or not config.runs_kernels_alone

    def replaces(self, call: LayerCall, config: DeltaConfig, counters: Counters) -> bool:
        """Show the layer to a calibration; compute it, and return True, under a policy other than DELTA."""
        if self.observer is not None and call.role is Role.SELECTION:
            self.observer(call.index, call.layer, call.rows)
        if config.policy == "delta" or call.role is Role.FULL:
            return False
        decode_rows(
            make_policy(config),
            call.role,
            call.layer,
            call.rows,
            self.chosen,
            counters,
            call.output,
            call.index if self.recall.active else None,
        )
        return True

    def after(self, call: LayerCall, config: DeltaConfig, counters: Counters, table: SelectionTable) -> None:
        """Measure the recall of a sparse layer that has attended by this table, in steps that are sampled."""
        if self.recall.active and call.role is Role.SPARSE:
            mass = table_mass(call.layer, call.rows, table.pages, config.page_size)
            counters.add_recall(call.index, *mass)
