"""A plain cache in the layouts of vLLM's CPU kernels, packed by vLLM's operator where it has them."""

from __future__ import annotations

import functools

import torch
from contract import NAN, Batch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm.platforms import current_platform

current_platform.import_kernels()


def pack_cache(batch: Batch) -> Tensor:
    """The batch's cache; blocks and tokens that are nobody's hold NaN."""
    case = batch.case
    plain = batch.kv_cache
    # Only tokens that a sequence has are written, as vLLM does it.
    slots = []
    for row in case.real_rows:
        length, request = case.lengths[row], int(batch.rows.requests[row])
        position = torch.arange(length)
        blocks = batch.block_table[request].long()[position // case.block_size]
        slots.append(blocks * case.block_size + position % case.block_size)
    slot = torch.cat(slots)
    tokens = plain.transpose(1, 2).flatten(0, 1)[slot]
    keys, values = (part.contiguous() for part in tokens.chunk(2, -1))
    return pack(keys, values, slot, len(plain), case.block_size, case.layout)


@functools.cache
def vllm_packs(layout):
    """Whether vLLM's build for this processor knows the layout; without AVX-512 it lacks "amx"."""
    token = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
    try:
        pack_by_vllm(token, token, torch.zeros(1, dtype=torch.int64), 1, 32, layout)
    except RuntimeError:
        return False
    return True


def pack(keys, values, slots, num_blocks, block_size, layout):
    """Write tokens ``[tokens, num_kv_heads, head_size]`` into an otherwise poisoned cache."""
    by_vllm = layout != "amx" or vllm_packs(layout)
    return (pack_by_vllm if by_vllm else pack_amx)(keys, values, slots, num_blocks, block_size, layout)


def pack_amx(keys, values, slots, num_blocks, block_size, layout):
    """What vLLM does for "amx": K [block / 16][size / 2][16][2], V [size / 16][block / 2][16][2]."""
    heads, size = keys.shape[1:]
    plain = torch.full((2, num_blocks * block_size, heads, size), NAN, dtype=keys.dtype)
    plain[:, slots] = torch.stack([keys, values])
    keys, values = plain.view(2, num_blocks, block_size, heads, size).transpose(2, 3)
    keys = keys.reshape(num_blocks, heads, block_size // 16, 16, size // 2, 2).transpose(3, 4)
    values = values.reshape(num_blocks, heads, block_size // 2, 2, size // 16, 16).permute(0, 1, 4, 2, 5, 3)
    packed = torch.stack([part.flatten(2) for part in (keys, values)], dim=2)
    return packed.view(num_blocks, heads, block_size, 2 * size)


def pack_by_vllm(keys, values, slots, num_blocks, block_size, layout):
    """The same by the operator of the engine."""
    num_kv_heads, head_size = keys.shape[1:]
    cache = torch.full((num_blocks, num_kv_heads, block_size, 2 * head_size), NAN, dtype=keys.dtype)
    key_cache, value_cache = cache.view(num_blocks, num_kv_heads, 2 * block_size, head_size).chunk(2, 2)
    vllm_ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, layout, 1.0, 1.0, "auto")
    return cache
