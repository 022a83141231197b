"""What one layer's launches read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from vllm_delta.kernels.gpu.schedule import Schedule, most_query_tokens, programs, tunings
from vllm_delta.kernels.gpu.shape import AttentionKind, KernelShape, LayerShape
from vllm_delta.kernels.gpu.tuning import Tuning
from vllm_delta.kernels.gpu.workspace import Workspace
from vllm_delta.kernels.limits import GPU
from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.rows import DecodeRows, SelectionRule

_COMPUTE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class LayerInputs:
    """What one layer's attention of the rows of one launch reads."""

    #: ``[tokens, num_heads, head_size]``, contiguous in the last dimension
    query: Tensor
    #: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``, contiguous in the last dimension
    kv_cache: Tensor
    #: int32 ``[requests, blocks]``
    block_table: Tensor
    #: at most `Workspace.max_rows` rows
    rows: DecodeRows
    #: made for these rows
    schedule: Schedule
    parameters: AttentionParameters
    rule: SelectionRule
    #: key and value of each token of the query, ``[tokens, num_kv_heads, head_size]`` each, contiguous in the
    #: last dimension, and each token's slot, int64 ``[tokens]``: its block times the block size, plus its
    #: place there; negative: not to be written. The layer writes those of the rows' tokens, which have to be
    #: their sequences' last, to the cache. None: they are there, as those of several query tokens have to be
    appended: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def shape(self) -> LayerShape:
        """The layer's shape."""
        quantized = self.parameters.scales is not None
        return LayerShape(self.query.shape[1], self.kv_cache.shape[1], self.query.shape[2], quantized)

    @property
    def dtype(self) -> torch.dtype:
        """In which matrix products are computed."""
        return self.parameters.dtype or self.query.dtype

    @property
    def kernel_shape(self) -> KernelShape:
        """The layer's sizes as one constant."""
        return self.shape.for_kernels(self.rule, self.kv_cache.shape[2], self.query_len)

    @property
    def query_len(self) -> int:
        """Query tokens of a row, at most."""
        return most_query_tokens(self.rows)

    @property
    def query_lens(self) -> Tensor | None:
        """Query tokens of each row, where it may have several."""
        return self.rows.query_lens if self.query_len > 1 else None

    @property
    def programs_per_split(self) -> int:
        """Programs that attend to a split."""
        return self.shape.programs_per_split(self.query_len)

    @property
    def kind(self) -> AttentionKind:
        """What else kernels are compiled for."""
        parameters = self.parameters
        return AttentionKind(
            SOFTCAP=parameters.softcap != 0,
            SINKS=parameters.sinks is not None,
            QUANTIZED=parameters.scales is not None,
            COMPUTE=_COMPUTE[self.dtype],
        )

    @property
    def scales(self) -> tuple[Tensor, Tensor, Tensor]:
        """Factors of query, key and value; of a cache that is not quantised, some tensors in their place."""
        return self.parameters.scales or (self.query, self.query, self.query)

    @property
    def new_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """`appended`, or some tensors in its place."""
        return self.appended or (self.query, self.query, self.query)

    def sinks_or(self, other: Tensor) -> Tensor:
        """The layer's sinks, or some tensor in their place."""
        return other if self.parameters.sinks is None else self.parameters.sinks

    def check(self, workspace: Workspace, output: Tensor, *, sparse: bool) -> None:
        """Raise `ValueError` for what does not fit together, or not into the workspace."""
        _, num_kv_heads, block_size, width = self.kv_cache.shape
        _, num_heads, head_size = self.query.shape
        if width != 2 * head_size or num_heads % num_kv_heads:
            raise ValueError(
                f"a query of {num_heads} heads of {head_size} does not fit a cache of {num_kv_heads} KV "
                f"heads of {width} / 2"
            )
        page_size = self.rule.page_size
        if page_size not in GPU.page_sizes or block_size % page_size:
            raise ValueError(f"blocks of {block_size} tokens cannot hold pages of {page_size}")
        new = () if self.appended is None else self.appended[:2]
        for part in (self.query, self.kv_cache, output, *new):
            if part.stride(-1) != 1:
                raise ValueError("query, cache, output, new keys and values must be contiguous in a head")
        if any(part.shape[1] != num_kv_heads for part in new):
            raise ValueError(f"new keys and values must have {num_kv_heads} heads")
        if len(self.rows) > workspace.max_rows:
            raise ValueError(f"{len(self.rows)} rows are more than the workspace's {workspace.max_rows}")
        if self.query_len > 1:
            self._check_several(workspace, sparse=sparse)

    def _check_several(self, workspace: Workspace, *, sparse: bool) -> None:
        """The same, about several query tokens."""
        most, rule = self.query_len, self.rule
        if most > workspace.max_query_len:
            raise ValueError(f"{most} query tokens are more than the workspace's {workspace.max_query_len}")
        if self.appended is not None:
            raise ValueError("keys and values of several query tokens must be in the cache")
        # Of the last page there may be a single token. Tokens are masked by their place among the kept ones.
        if sparse and (rule.recent_pages - 1) * rule.page_size + 1 < most:
            raise ValueError(
                f"{rule.recent_pages} recent pages of {rule.page_size} may not hold {most} query tokens"
            )

    def tuning(self, *, sparse: bool) -> Tuning:
        """The settings that the layer's schedule was made with."""
        rows, device = len(self.rows), self.query.device
        return tunings(self.shape, self.dtype.itemsize, rows, device, self.query_len)[sparse]

    def most_splits(self, tuning: Tuning) -> int:
        """The most splits that the rows may be cut into."""
        rows = len(self.rows)
        return rows + programs(rows, self.programs_per_split, tuning, self.query.device)
