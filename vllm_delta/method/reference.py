"""The method in plain PyTorch: the specification that every kernel is tested against.

DELTA (arXiv 2510.09883) for one decode row, a query token that sees the n tokens of its sequence, itself
included. At a selection layer:

1. ``p[h, t]`` is the attention probability of token t for query head h, over all n tokens;
2. the token score is ``s[t] = max over h of p[h, t]``, over all query heads: one set of pages for all heads;
3. the score of a page is the sum of its tokens' scores; the last page may be partial;
4. kept are the last ``recent_pages`` pages, the first ``sink_pages``, and the best of the others, up to the
   row's ``kept_pages`` in total, ties to the lower index, in ascending order;
5. where the sequence has at most ``kept_pages`` pages, all are kept.

A sparse layer computes attention over the tokens of the kept pages alone. A selection layer's own output is
exact attention over all tokens.

A row may have several query tokens, as where drafts are verified. Each sees the tokens up to itself. The
first one chooses for all of them, and pages are counted from the last one's end.

A row may grow before its pages are chosen again, as where drafts are made. Then its kept pages are those that
were chosen and all that have begun since: with n tokens when they were chosen and m now, its budget is
``kept_pages + pages(m) - pages(n)``. The table names up to ``following_pages`` of the later ones.

Everything is computed in the dtype of the inputs (float32 or float64), row by row, with no thought of speed.
The KV cache here is in plain order, ``[num_blocks, num_kv_heads, block_size, 2 * head_size]`` with a token's
key before its value; how a platform lays it out in memory is the kernels' business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.rows import DecodeRows, SelectionRule


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


def attention_probabilities(query: Tensor, keys: Tensor, parameters: AttentionParameters) -> Tensor:
    """``softmax(softcap(scale * q . k))`` over the tokens and the sink, for each query head.

    Args:
        query: ``[num_heads, head_size]``.
        keys: ``[tokens, num_kv_heads, head_size]``; query head h reads KV head h // (heads per KV head).
        parameters: scale, soft cap and sinks.

    Returns:
        ``[num_heads, tokens]``; a row sums to 1, or to less with sinks.
    """
    softcap, sinks = parameters.softcap, parameters.sinks
    logits = torch.einsum("hd,thd->ht", query, _for_query_heads(keys, query)) * parameters.scale
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


def select_pages(
    scores: Tensor, kept_pages: int, recent_pages: int, sink_pages: int, following_pages: int = 0
) -> Tensor:
    """The pages to keep, ascending.

    ``[pages]`` scores to int64 indices: ``[pages]`` of a row that keeps all, else those of the `kept_pages`
    pages and of the `following_pages` behind the last one.
    """
    num_pages = scores.shape[0]
    if num_pages <= kept_pages:
        return torch.arange(num_pages)
    recent = range(num_pages - recent_pages, num_pages + following_pages)
    others = range(sink_pages, num_pages - recent_pages)
    values = scores.tolist()
    best = sorted(others, key=lambda page: (-values[page], page))
    kept = [*range(sink_pages), *best[: kept_pages - recent_pages - sink_pages], *recent]
    return torch.tensor(sorted(kept))


def kept_tokens(pages: Tensor, page_size: int, length: int) -> Tensor:
    """The tokens of the kept pages, ascending: ``[pages]`` to ``[tokens]``; the last page may be partial."""
    tokens = (pages[:, None] * page_size + torch.arange(page_size, device=pages.device)).flatten()
    return tokens[tokens < length]


def selection_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    rows: DecodeRows,
    parameters: AttentionParameters,
    rule: SelectionRule,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A selection layer for a batch of decode rows, none of them padding.

    Args:
        query: ``[tokens, num_heads, head_size]``.
        kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.
        block_table: ``[requests, blocks]`` int.
        rows: the rows to compute.
        parameters: scale, soft cap, sinks, and the factors of a quantised cache.
        rule: how pages are kept.

    Returns:
        The output ``[tokens of the rows, num_heads, head_size]``, row by row, the page scores of each row,
        and the selection table: the kept pages of each row, all of them where it keeps everything.
    """
    outputs, scores, table = [], [], []
    for row, kept_pages in enumerate(rows.kept_pages.tolist()):
        queries, keys, values = _read_row(query, kv_cache, block_table, rows, row, parameters)
        for index, row_query in enumerate(queries):
            seen = len(keys) - len(queries) + 1 + index
            probabilities = attention_probabilities(row_query, keys[:seen], parameters)
            outputs.append(_weighted_sum(probabilities, values[:seen]))
            if index == 0:
                chosen = torch.nn.functional.pad(probabilities, (0, len(keys) - seen))
        scores.append(page_scores(chosen, rule.page_size))
        table.append(
            select_pages(scores[-1], kept_pages, rule.recent_pages, rule.sink_pages, rule.following_pages)
        )
    return torch.stack(outputs), scores, table


def sparse_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    rows: DecodeRows,
    parameters: AttentionParameters,
    rule: SelectionRule,
    table: list[Tensor],
) -> Tensor:
    """A sparse layer: attention over the pages of the selection table; arguments as above."""
    outputs = []
    for row, pages in enumerate(table):
        queries, keys, values = _read_row(query, kv_cache, block_table, rows, row, parameters)
        for index, row_query in enumerate(queries):
            seen = len(keys) - len(queries) + 1 + index
            tokens = kept_tokens(pages.to(keys.device), rule.page_size, seen)
            probabilities = attention_probabilities(row_query, keys[tokens], parameters)
            outputs.append(_weighted_sum(probabilities, values[tokens]))
    return torch.stack(outputs)


def _read_row(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    rows: DecodeRows,
    row: int,
    parameters: AttentionParameters,
) -> tuple[Tensor, Tensor, Tensor]:
    """The row's queries ``[query tokens, num_heads, head_size]``, and the keys and values that it sees."""
    request, token = int(rows.requests[row]), int(rows.tokens[row])
    queries = query[token : token + (1 if rows.query_lens is None else int(rows.query_lens[row]))]
    keys, values = gather_sequence(kv_cache, block_table[request], int(rows.lengths[row]))
    if parameters.scales is None:
        return queries, keys, values
    q_scale, k_scale, v_scale = (scale.to(keys) for scale in parameters.scales)
    return queries * q_scale, keys * k_scale, values * v_scale


def _weighted_sum(probabilities: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("ht,thd->hd", probabilities, _for_query_heads(values, probabilities))


def _for_query_heads(parts: Tensor, heads: Tensor) -> Tensor:
    """Keys or values of each KV head, repeated for the query heads that read it."""
    return parts.repeat_interleave(heads.shape[0] // parts.shape[1], dim=1)
