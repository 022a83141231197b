"""Where tokens lie in the paged KV cache, and loading their keys and values."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_entries(
    token,  # int32 [TILE]: which of the row's tokens or, if `selected`, of its kept tokens
    end,  # tokens from it on stand for the one before it
    table_row_ptr,  # the row's selection table
    block_row_ptr,  # the row's block table
    selected,  # whether the tokens are those of the selection table; read where SPARSE
    SPARSE: tl.constexpr,
    FRAMES: tl.constexpr,  # the selection table holds page frames, not pages
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tokens' blocks or, if `selected`, their page frames: int32 ``[TILE]``."""
    token = tl.minimum(token, end - 1)
    if SPARSE:
        entries_ptr = tl.where(selected, table_row_ptr, block_row_ptr)
        entry = tl.load(entries_ptr + tl.where(selected, token // PAGE, token // BLOCK))
        if not FRAMES:
            pages_per_block: tl.constexpr = BLOCK // PAGE
            page = tl.where(selected, entry, 0)
            block = tl.load(block_row_ptr + page // pages_per_block)
            entry = tl.where(selected, block * pages_per_block + page % pages_per_block, entry)
    else:
        entry = tl.load(block_row_ptr + token // BLOCK)
    return entry


@triton.jit
def entry_offsets(
    entry,  # of `load_entries`, as are the arguments below
    token,
    end,
    selected,
    cache_strides,  # `CacheStrides`
    SPARSE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where tokens lie in one head of the cache, in elements: int64 ``[TILE]``."""
    token = tl.minimum(token, end - 1)
    block = entry
    if SPARSE:
        pages_per_block: tl.constexpr = BLOCK // PAGE
        block = tl.where(selected, entry // pages_per_block, entry)
        token = tl.where(selected, entry % pages_per_block * PAGE + token % PAGE, token)
    return block.to(tl.int64) * cache_strides.block + (token % BLOCK) * cache_strides.token


@triton.jit
def kept_tokens(pages_row_ptr, kept_pages, length, PAGE: tl.constexpr):
    """Tokens of a row's kept pages, where the row's last page, which may be partial, need not be kept."""
    last = tl.load(pages_row_ptr + kept_pages - 1)
    return (kept_pages - 1) * PAGE + tl.minimum(length - last * PAGE, PAGE)


@triton.jit
def load_vectors(ptrs, mask, ALL: tl.constexpr):
    """Keys or values; zero where `mask` is not set, unless ALL."""
    if ALL:
        vectors = tl.load(ptrs, eviction_policy="evict_first")
    else:
        vectors = tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
    return vectors
