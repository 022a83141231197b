"""Rows and layers of random numbers in plain PyTorch, and what NumPy makes of them."""

import numpy as np
import torch
from rival_masks import Budget, MaskRow

from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.config import DeltaConfig
from vllm_delta.plain.rows import Layer, RequestRows, RowIndex

#: of rows whose budget is the settings'
KEPT_PAGES = 3

BUDGETS = [
    Budget(budget=64, recent=32, sink=16, page=16),
    Budget(budget=64, recent=0, sink=0, page=16),
    Budget(budget=32, recent=16, sink=16, page=16),
    Budget(budget=48, recent=8, sink=16, page=8),
    Budget(budget=21, recent=5, sink=7, page=1),
]
#: query heads, KV heads, head size, soft cap, sinks
SHAPES = [(6, 2, 16, 0.0, False), (4, 4, 8, 0.0, False), (5, 1, 16, 3.0, True), (4, 2, 8, 0.0, True)]
LENGTHS = [65, 128, 203]


def settings(budget, policy, **others):
    return DeltaConfig(
        policy=policy,
        budget_tokens=budget.budget,
        recent_tokens=budget.recent,
        sink_tokens=budget.sink,
        page_size=budget.page,
        **others,
    )


def random_rows(lengths, heads, kv_heads, size, softcap, sinks):
    """Rows of one request that see so many tokens."""
    shapes = (len(lengths), heads, size), *[(max(lengths), kv_heads, size)] * 2
    queries, keys, values = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    sinks = 2 * torch.randn(heads).double() if sinks else None
    parameters = AttentionParameters(size**-0.5, softcap, sinks)
    return RequestRows(2 * queries, keys, values, torch.tensor(lengths), parameters)


def mask_row(rows, number=0):
    """One of them for the masks, with probabilities of its own."""
    length, heads_per_kv_head = int(rows.lengths[number]), rows.queries.shape[1] // rows.num_kv_heads
    keys = rows.keys[:length].transpose(0, 1).repeat_interleave(heads_per_kv_head, 0).numpy()
    query = rows.queries[number].numpy()
    logits = np.stack([key @ one for key, one in zip(keys, query, strict=True)]) * rows.parameters.scale
    if softcap := rows.parameters.softcap:
        logits = softcap * np.tanh(logits / softcap)
    weights = np.exp(logits)
    sinks = rows.parameters.sinks
    rest = 0 if sinks is None else np.exp(sinks.numpy())
    probabilities = weights / (weights.sum(axis=1) + rest)[:, None]
    return MaskRow(query, keys, logits, probabilities, heads_per_kv_head)


def as_mask(rows, tokens, number=0):
    """A row's tokens as a mask ``[heads, tokens]`` of those that it sees; it attends to no other."""
    length, heads_per_kv_head = int(rows.lengths[number]), rows.queries.shape[1] // rows.num_kv_heads
    mask = tokens[number].expand(rows.num_kv_heads, -1).repeat_interleave(heads_per_kv_head, 0)
    assert not mask[:, length:].any()
    return mask[:, :length].numpy()


def masked_attention(rows, mask, number=0):
    """Attention of a row in NumPy, ``[heads, head size]``."""
    row = mask_row(rows, number)
    weights = row.probabilities * mask  # of the whole softmax: what is left out is taken out below
    sink = 0 if rows.parameters.sinks is None else 1 - row.probabilities.sum(axis=1)
    weights /= (weights.sum(axis=1) + sink)[:, None]
    values = (
        rows.values[: weights.shape[1]].transpose(0, 1).repeat_interleave(row.heads_per_kv_head, 0).numpy()
    )
    return np.stack([weight @ value for weight, value in zip(weights, values, strict=True)])


def paged_layer(lengths, heads=4, kv_heads=2, size=16, block_size=16, **options):
    """A layer of random sequences, one a request, in blocks in any order, and their rows."""
    width = -(-max(lengths) // block_size)
    blocks = torch.randperm(len(lengths) * width).view(len(lengths), width)
    layer = Layer(
        query=2 * torch.randn(len(lengths), heads, size),
        kv_cache=torch.randn(len(lengths) * width, kv_heads, block_size, 2 * size),
        block_table=blocks.int(),
        parameters=AttentionParameters(size**-0.5, **options),
    )
    order = torch.randperm(len(lengths)).tolist()
    return layer, [RowIndex(request, request, lengths[request], KEPT_PAGES) for request in order]


def double_row(layer, index):
    rows = layer.rows([index])
    parts = (part.double() for part in (rows.queries, rows.keys, rows.values))
    return RequestRows(*parts, rows.lengths, rows.parameters)
