"""Which heads look things up: attention over random tokens that repeat. Plain PyTorch, without vLLM.

A sequence of random tokens comes twice. Nothing but its first half foretells its second, so a head that looks
tokens up attends, from a token of the second half, to the same token of the first, or to the one behind it.
Such heads are known as echo heads and induction heads; RazorAttention (arXiv 2407.15891) finds them so, and
those that copy from a text are among them.

A head *hits* at a token of the second half if, of all tokens but the first `SINKS` and the last `RECENT`,
which many heads attend to whatever they say, it attends most to one of these two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_delta.method.attention import AttentionParameters

#: sequences, and tokens of each half
SEQUENCES, PERIOD = 4, 256
SINKS, RECENT = 16, 64


def probe_tokens(vocabulary: int) -> Tensor:
    """The sequences, int64 ``[SEQUENCES, 2 * PERIOD]``; the same for every vocabulary of that size.

    The first and the last tenth of a vocabulary are left out: special tokens are mostly there.
    """
    generator = torch.Generator().manual_seed(0)
    low, high = vocabulary // 10, max(vocabulary // 10 + 1, vocabulary * 9 // 10)
    half = torch.randint(low, high, (SEQUENCES, PERIOD), generator=generator)
    return half.repeat(1, 2)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, parameters: AttentionParameters, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence of `probe_tokens` to itself, a KV head at a time.

    Args:
        query: ``[n, H, D]``, n being ``2 * PERIOD``.
        key: ``[n, KV, D]``.
        value: ``[n, KV, Dv]``.
        parameters: scale, soft cap and sinks.
        window: tokens that a token sees, itself included; None: all before it.

    Returns:
        float32 ``[n, H, Dv]``, and float32 ``[H]``: the share of the second half at which each head hits.
    """
    count, per_kv_head = len(query), query.shape[1] // key.shape[1]
    place = torch.arange(count, device=query.device)
    distance = place[:, None] - place
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    outputs, hits = [], []
    for kv_head in range(key.shape[1]):
        heads = slice(kv_head * per_kv_head, (kv_head + 1) * per_kv_head)
        logits = torch.einsum("qhd,kd->hqk", query[:, heads].float(), key[:, kv_head].float())
        logits *= parameters.scale
        if softcap := parameters.softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logits.masked_fill_(hidden, -torch.inf)
        hits.append(_hits(logits, distance))
        if parameters.sinks is not None:
            sinks = parameters.sinks[heads].to(logits)[:, None, None].expand(-1, count, 1)
            probabilities = torch.cat([logits, sinks], -1).softmax(-1)[..., :count]
        else:
            probabilities = logits.softmax(-1)
        outputs.append(torch.einsum("hqk,kd->qhd", probabilities, value[:, kv_head].float()))
    return torch.cat(outputs, 1), torch.cat(hits)


def _hits(logits: Tensor, distance: Tensor) -> Tensor:
    """The share of the second half's tokens, but for the last one, at which each head hits: ``[H]``."""
    rows = slice(PERIOD, 2 * PERIOD - 1)
    counted = logits[:, rows].masked_fill(distance[rows] < RECENT, -torch.inf)
    counted[..., :SINKS] = -torch.inf
    best = counted.argmax(-1)
    same = torch.arange(PERIOD - 1, device=best.device)
    return ((best == same) | (best == same + 1)).float().mean(-1)
