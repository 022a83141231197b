"""What a step's layers get on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

from vllm_delta.kernels.gpu.schedule import Schedule
from vllm_delta.kernels.gpu.shape import LayerShape
from vllm_delta.method.plan import Plan, Role
from vllm_delta.method.rows import DecodeRows
from vllm_delta.plain.rows import RowIndex


@dataclass(frozen=True)
class LayerGroup:
    """The layers of a KV cache group that may be sparse; they have one block table and one shape."""

    #: by the model's index, ascending
    layers: tuple[int, ...]
    #: None where there are none
    shape: LayerShape | None = None


@dataclass(frozen=True)
class Launch:
    """Rows that one launch takes, and their schedule, which the group's first layer makes."""

    rows: DecodeRows
    schedule: Schedule


@dataclass(frozen=True)
class PrefillPart:
    """The prefill tokens of a mixed step and FlashAttention's metadata for them alone."""

    #: which tokens of the step: a slice where they are neighbours, as they usually are, else int64 indices
    tokens: slice | Tensor
    metadata: FlashAttentionMetadata


@dataclass
class DeltaCUDAMetadata(FlashAttentionMetadata):  # type: ignore[misc]
    """FlashAttention's metadata of the whole batch, and how DELTA splits it."""

    group: LayerGroup = LayerGroup(())
    #: what each layer does; None in a group of which no layer may be sparse
    plan: Plan | None = None
    #: number of the step, the same in all groups
    step: int = 0
    #: the decode rows; none where all is prefill
    launches: list[Launch] = field(default_factory=list)
    #: the same rows on the host, where something in Python reads them
    row_indices: list[RowIndex] = field(default_factory=list)
    #: of a mixed step
    prefill: PrefillPart | None = None
    #: whether all rows are their sequences' last tokens, and nothing but DELTA's kernels reads the cache, so
    #: that these may write the rows' keys and values themselves
    appends: bool = False
    #: whether DELTA's kernels run full layers, too, because they are faster there
    runs_full_layers: bool = False

    def role_of(self, layer_index: int | None) -> Role | None:
        """What a layer does with decode rows by DELTA's kernels; None: vLLM runs them, or there are none."""
        if layer_index is None or self.plan is None or not self.launches:
            return None
        role = self.plan.roles[layer_index]
        return None if role is Role.FULL and not self.runs_full_layers else role

    def schedules_before(self, layer_index: int | None) -> bool:
        """Whether this layer, the group's first, makes the schedules."""
        return bool(self.launches) and layer_index == self.group.layers[0]
