"""The method in plain PyTorch: the specification that every kernel is tested against.

DELTA (arXiv 2510.09883) for one decode row, a query token that sees the n tokens of its sequence, itself
included. At a selection layer:

1. ``p[h, t]`` is the attention probability of token t for query head h, over all n tokens;
2. the token score is ``s[t] = max over h of p[h, t]``, over all query heads: one set of pages for all heads;
3. the score of a page is the sum of its tokens' scores; the last page may be partial;
4. kept are the last ``recent_pages`` pages, the first ``sink_pages``, and the best of the others, up to
   ``budget_pages`` in total, ties to the lower index, in ascending order;
5. where the sequence has at most ``budget_pages`` pages, all are kept.

A sparse layer computes attention over the tokens of the kept pages alone. A selection layer's own output is
exact attention over all tokens.

Everything is computed in the dtype of the inputs (float32 or float64), row by row, with no thought of speed.
The KV cache here is in plain order, ``[num_blocks, num_kv_heads, block_size, 2 * head_size]`` with a token's
key before its value; how a platform lays it out in memory is the kernels' business.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_sequence(kv_cache: Tensor, block_row: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Read one sequence out of the paged cache.

    Args:
        kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.
        block_row: ``[blocks]`` int, the physical block of each logical block.
        length: tokens to read.

    Returns:
        Keys and values, each ``[length, num_kv_heads, head_size]``.
    """
    block_size = kv_cache.shape[2]
    blocks = block_row[: -(-length // block_size)].long()
    tokens = kv_cache[blocks].transpose(1, 2).flatten(0, 1)[:length]
    keys, values = tokens.chunk(2, dim=-1)
    return keys, values


def attention_probabilities(
    query: Tensor, keys: Tensor, scale: float, softcap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """``softmax(softcap(q . k * scale))`` over the tokens, for each query head.

    Args:
        query: ``[num_heads, head_size]``.
        keys: ``[tokens, num_kv_heads, head_size]``; query head h reads KV head h // (heads per KV head).
        scale: factor of the logits.
        softcap: c in ``c * tanh(x / c)``; 0 for none.
        sinks: ``[num_heads]``, a logit per head that takes part in the softmax and has no value, or None.

    Returns:
        ``[num_heads, tokens]``; a row sums to 1, or to less with sinks.
    """
    groups = query.shape[0] // keys.shape[1]
    logits = torch.einsum("hd,thd->ht", query, keys.repeat_interleave(groups, dim=1)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if sinks is None:
        return torch.softmax(logits, dim=-1)
    with_sink = torch.cat([logits, sinks.to(logits)[:, None]], dim=-1)
    return torch.softmax(with_sink, dim=-1)[:, :-1]


def page_scores(probabilities: Tensor, page_size: int) -> Tensor:
    """Max over the heads, then sum over each page: ``[num_heads, tokens]`` to ``[pages]``."""
    token_scores = probabilities.amax(dim=0)
    padding = -token_scores.shape[0] % page_size
    return torch.nn.functional.pad(token_scores, (0, padding)).view(-1, page_size).sum(dim=-1)


def select_pages(scores: Tensor, budget_pages: int, recent_pages: int, sink_pages: int) -> Tensor:
    """The pages to keep, ascending: ``[pages]`` scores to ``[min(pages, budget_pages)]`` int64 indices."""
    num_pages = scores.shape[0]
    if num_pages <= budget_pages:
        return torch.arange(num_pages)
    recent = range(num_pages - recent_pages, num_pages)
    others = range(sink_pages, num_pages - recent_pages)
    best = sorted(others, key=lambda page: (-scores[page].item(), page))
    kept = [*range(sink_pages), *best[: budget_pages - recent_pages - sink_pages], *recent]
    return torch.tensor(sorted(kept))


def kept_tokens(pages: Tensor, page_size: int, length: int) -> Tensor:
    """The tokens of the kept pages, ascending: ``[pages]`` to ``[tokens]``; the last page may be partial."""
    tokens = (pages[:, None] * page_size + torch.arange(page_size, device=pages.device)).flatten()
    return tokens[tokens < length]


def selection_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: list[int],
    *,
    scale: float,
    page_size: int,
    budget_pages: int,
    recent_pages: int,
    sink_pages: int,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A selection layer for a batch of decode rows.

    Args:
        query: ``[rows, num_heads, head_size]``.
        kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.
        block_table: ``[rows, blocks]`` int.
        seq_lens: tokens that each row sees.
        scale: factor of the logits.
        page_size: tokens of a page.
        budget_pages: pages to keep.
        recent_pages: pages kept at the end.
        sink_pages: pages kept at the start.
        softcap: as in `attention_probabilities`.
        sinks: as in `attention_probabilities`.

    Returns:
        The output ``[rows, num_heads, head_size]``, the page scores of each row, and the selection table:
        the kept pages of each row.
    """
    outputs, scores, table = [], [], []
    for row, length in enumerate(seq_lens):
        keys, values = gather_sequence(kv_cache, block_table[row], length)
        probabilities = attention_probabilities(query[row], keys, scale, softcap, sinks)
        outputs.append(_weighted_sum(probabilities, values))
        scores.append(page_scores(probabilities, page_size))
        table.append(select_pages(scores[-1], budget_pages, recent_pages, sink_pages))
    return torch.stack(outputs), scores, table


def sparse_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: list[int],
    table: list[Tensor],
    *,
    scale: float,
    page_size: int,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """A sparse layer: attention over the pages of the selection table; arguments as above."""
    outputs = []
    for row, length in enumerate(seq_lens):
        keys, values = gather_sequence(kv_cache, block_table[row], length)
        tokens = kept_tokens(table[row].to(keys.device), page_size, length)
        probabilities = attention_probabilities(query[row], keys[tokens], scale, softcap, sinks)
        outputs.append(_weighted_sum(probabilities, values[tokens]))
    return torch.stack(outputs)


def _weighted_sum(probabilities: Tensor, values: Tensor) -> Tensor:
    groups = probabilities.shape[0] // values.shape[1]
    return torch.einsum("ht,thd->hd", probabilities, values.repeat_interleave(groups, dim=1))
