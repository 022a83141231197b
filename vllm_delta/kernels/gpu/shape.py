"""The shape of a layer, as the kernels see it: constants that they are compiled for, and strides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from vllm_delta.kernels.gpu.logits import LOGIT_TILE
from vllm_delta.method.rows import SelectionRule

#: Queries, of all tokens and heads, that a program with several query tokens attends for: what a warp group's
#: matrix products take, so fewer are padded.
BAND_QUERIES = 64


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
    #: query tokens of a row, at most
    TOKENS: int
    #: those of them that a program attends for
    BAND: int
    #: queries of such a program, one for each of its tokens and heads, padded to a power of two
    BAND_QUERIES: int


class AttentionKind(NamedTuple):
    """What kernels are compiled for beside sizes, as one constant."""

    SOFTCAP: bool
    SINKS: bool
    QUANTIZED: bool
    #: the type of the matrix products
    COMPUTE: tl.dtype


class CacheStrides(NamedTuple):
    """Of a KV cache, in elements; a token's key and value are contiguous."""

    block: int
    head: int
    token: int

    @classmethod
    def of(cls, cache: Tensor) -> CacheStrides:
        """Of ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``."""
        return cls(cache.stride(0), cache.stride(1), cache.stride(2))


class TokenStrides(NamedTuple):
    """Of a query, an output, new keys or values, in elements; a head is contiguous."""

    token: int
    head: int

    @classmethod
    def of(cls, part: Tensor) -> TokenStrides:
        """Of ``[tokens, heads, head_size]``."""
        return cls(part.stride(0), part.stride(1))


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

    @property
    def band_queries(self) -> int:
        """Queries of a program that attends for several query tokens of a row, padding with them."""
        return max(BAND_QUERIES, self.padded_queries)

    def bands(self, query_len: int) -> int:
        """Programs that share the up to `query_len` query tokens of a row, as evenly as they can.

        The fewest with `band_queries` or fewer. Each of them reads the keys and values.
        """
        return -(-query_len // max(1, self.band_queries * self.num_kv_heads // self.num_heads))

    def programs_per_split(self, query_len: int) -> int:
        """Programs that attend to a split of rows of up to `query_len` query tokens."""
        return self.num_kv_heads * self.bands(query_len)

    def for_kernels(self, rule: SelectionRule, block_size: int, query_len: int = 1) -> KernelShape:
        """As one constant, for rows of up to `query_len` query tokens."""
        band = -(-query_len // self.bands(query_len))
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
            TOKENS=query_len,
            BAND=band,
            BAND_QUERIES=self.band_queries,
        )


def next_power_of_2(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


def tensor_bytes(owner: object) -> int:
    """Bytes of the tensors that an object has."""
    return sum(value.nbytes for value in vars(owner).values() if isinstance(value, Tensor))
