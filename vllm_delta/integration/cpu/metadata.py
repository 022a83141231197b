"""What a step's layers get on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from vllm_delta.method.plan import Plan
from vllm_delta.method.rows import DecodeRows
from vllm_delta.method.step import PrefillBatch
from vllm_delta.plain.rows import RowIndex


@dataclass(frozen=True)
class LayerGroup:
    """The layers of a KV cache group that may be sparse; they have one block table."""

    #: by the model's index, ascending
    layers: tuple[int, ...]


@dataclass
class DeltaCPUMetadata(CPUAttentionMetadata):  # type: ignore[misc]
    """CPU_ATTN's metadata of the whole batch, and how DELTA splits it."""

    group: LayerGroup = LayerGroup(())
    #: what each layer does; None in a group of which no layer may be sparse
    plan: Plan | None = None
    #: number of the step, the same in all groups
    step: int = 0
    #: decode rows; None where the whole batch is prefill
    rows: DecodeRows | None = None
    #: the same rows, where something in Python reads them
    row_indices: list[RowIndex] = field(default_factory=list)
    #: of a mixed batch, the prefill tokens and CPU_ATTN's metadata for them alone
    prefill: tuple[PrefillBatch, CPUAttentionMetadata] | None = None
    num_prefill_tokens: int = 0
    #: decode rows whose sequence fits their budget
    num_rows_within_budget: int = 0
