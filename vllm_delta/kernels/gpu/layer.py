"""What one layer's launches read, and its shape as the kernels see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from vllm_delta.kernels.gpu.logits import LOGIT_TILE
from vllm_delta.kernels.limits import GPU
from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.rows import DecodeRows, SelectionRule

if TYPE_CHECKING:
    from vllm_delta.kernels.gpu.schedule import Schedule

_COMPUTE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class KernelShape(NamedTuple):
    """Sizes that kernels are compiled for, as one constant."""

    #: query heads
    H: int
    #: KV heads
    KV_HEADS: int
    #: query heads of a KV head, padded to a power of two, at least 2: logits are read in pairs
    QUERIES: int
    #: the same, padded to what matrix units take
    COLUMNS: int
    #: head size
    D: int
    #: the same, padded to a power of two
    D_PAD: int
    #: tokens of a page
    PAGE: int
    #: tokens of a KV block
    BLOCK: int
    #: tokens of a tile of logits
    LOGIT_TILE: int
    #: whether a row's last page, which may be partial, is always kept
    KEEPS_LAST: bool


class AttentionKind(NamedTuple):
    """What kernels are compiled for beside sizes, as one constant."""

    SOFTCAP: bool
    SINKS: bool
    QUANTIZED: bool
    #: the type of the matrix products
    COMPUTE: tl.dtype


class CacheStrides(NamedTuple):
    """Of a KV cache, in elements; a token's key and value lie in one piece."""

    block: int
    head: int
    token: int


class TokenStrides(NamedTuple):
    """Of a query, an output, new keys or values, in elements; a head lies in one piece."""

    token: int
    head: int


@dataclass(frozen=True)
class LayerShape:
    """The shape of one layer's attention on this rank."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    #: whether the cache holds numbers of 8 bits
    quantized: bool = False

    @property
    def padded_head_size(self) -> int:
        """The head size as the kernels compute it, a power of two."""
        return max(16, next_power_of_2(self.head_size))

    @property
    def padded_queries(self) -> int:
        """Query heads of a KV head, padded to a power of two, at least 2."""
        return max(2, next_power_of_2(self.num_heads // self.num_kv_heads))

    @property
    def padded_heads(self) -> int:
        """Query heads, with those of each KV head padded to a power of two."""
        return self.num_kv_heads * self.padded_queries

    def for_kernels(self, rule: SelectionRule, block_size: int) -> KernelShape:
        """As one constant."""
        return KernelShape(
            H=self.num_heads,
            KV_HEADS=self.num_kv_heads,
            QUERIES=self.padded_queries,
            COLUMNS=max(8, self.padded_queries),
            D=self.head_size,
            D_PAD=self.padded_head_size,
            PAGE=rule.page_size,
            BLOCK=block_size,
            LOGIT_TILE=LOGIT_TILE,
            KEEPS_LAST=rule.recent_pages > 0,
        )


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
    #: their sequences' last, to the cache. None: they are there
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
        return self.shape.for_kernels(self.rule, self.kv_cache.shape[2])

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

    def check(self, max_rows: int, output: Tensor) -> None:
        """Raise `ValueError` for what does not fit together; `max_rows` is the workspace's."""
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
        if len(self.rows) > max_rows:
            raise ValueError(f"{len(self.rows)} rows are more than the workspace's {max_rows}")


def next_power_of_2(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


def tensor_bytes(owner: object) -> int:
    """Bytes of the tensors that an object has."""
    return sum(value.nbytes for value in vars(owner).values() if isinstance(value, Tensor))
