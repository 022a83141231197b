"""Reading sequences out of vLLM's paged KV cache, in any of its layouts, with plain tensor operations."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_delta.method.attention import LAYOUTS


def read_sequence(
    kv_cache: Tensor,
    block_row: Tensor,
    length: int,
    layout: str = "plain",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence.

    Args:
        kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``, any strides but the last.
        block_row: ``[blocks]`` int, the physical block of each logical block.
        length: tokens to read, one or more.
        layout: how a block of one head lies in memory, one of `LAYOUTS`.
        dtype: of the result.

    Returns:
        Keys and values, each ``[length, num_kv_heads, head_size]``.

    Raises:
        ValueError: a layout that is not known.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    _, heads, block_size, width = kv_cache.shape
    size = width // 2
    blocks = kv_cache[block_row[: -(-length // block_size)].long()].to(dtype)
    if layout == "plain":
        keys, values = blocks.chunk(2, dim=-1)
    else:
        keys, values = blocks.reshape(len(blocks), heads, 2, block_size * size).unbind(2)
        shape = (len(blocks), heads)
        if layout == "amx":
            keys = keys.reshape(*shape, block_size // 16, size // 2, 16, 2).transpose(-2, -3)
            values = values.reshape(*shape, size // 16, block_size // 2, 16, 2).permute(0, 1, 3, 5, 2, 4)
        else:
            keys = keys.reshape(*shape, size, block_size).transpose(-1, -2)
        keys, values = (part.reshape(*shape, block_size, size) for part in (keys, values))
    keys, values = (part.transpose(1, 2).flatten(0, 1)[:length] for part in (keys, values))
    return keys, values
