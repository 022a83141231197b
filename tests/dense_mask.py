"""DELTA as a mask over dense attention, in Hugging Face transformers: an independent second opinion.

Shares no code with vllm_delta. One teacher-forced pass over prompt and answer; behind the prompt, sparse
layers see a row's mask and the other layers everything. Other methods come with masks of their own.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from transformers import AttentionInterface, AutoModelForCausalLM


def choose_pages(token_scores, page_size, budget_pages, recent_pages, sink_pages):
    """The kept tokens of one row, as a boolean mask."""
    length = len(token_scores)
    edges = np.arange(0, length, page_size)
    scores = np.add.reduceat(token_scores, edges)
    count = len(scores)
    if count > budget_pages:
        scores[:sink_pages] = np.inf
        scores[count - recent_pages :] = np.inf
        order = np.lexsort((np.arange(count), -scores))
        keep = np.zeros(count, dtype=bool)
        keep[order[:budget_pages]] = True
    else:
        keep = np.ones(count, dtype=bool)
    return np.repeat(keep, page_size)[:length]


def logprobs_with_masks(
    model: Path, prompt: list[int], answer: list[int], selection_layers, full_layers, budget, rows=None
) -> torch.Tensor:
    """Log-probabilities ``[len(answer), vocabulary]`` of each answer token's step, in float64.

    `budget`: page_size, budget_pages, recent_pages, sink_pages. `rows`: of positions that were computed
    together with others, where these begin and end; the first of them chooses for all.
    """
    prompt_len, length = len(prompt), len(prompt) + len(answer) - 1
    chosen = {}

    def choose(layer, query, key, probabilities):
        if layer in selection_layers:
            chosen["mask"] = torch.ones(length, length, dtype=torch.bool)
            for row in range(prompt_len, length):
                first, end = (rows or {}).get(row, (row, row + 1))
                token_scores = np.zeros(end)
                token_scores[: first + 1] = probabilities[:, first, : first + 1].amax(0).numpy()
                kept = torch.from_numpy(choose_pages(token_scores, *budget))
                chosen["mask"][row, : row + 1] = kept[: row + 1]
            return None
        return chosen["mask"] if layer >= full_layers else None

    return logprobs_with_choices(model, prompt, answer, choose)


def logprobs_with_choices(model: Path, prompt: list[int], answer: list[int], choose) -> torch.Tensor:
    """Log-probabilities ``[len(answer), vocabulary]`` of each answer token's step, in float64.

    `choose` is called with a layer's index, its query ``[heads, length, head size]``, its key (a copy for
    each query head) and its probabilities ``[heads, length, length]``. It returns None for a layer that
    attends to everything, else what each row attends to, as a mask that broadcasts against the probabilities.
    """
    tokens = prompt + answer[:-1]
    length = len(tokens)
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def attention(module, query, key, value, _mask, scaling, **_):
        heads_per_kv_head = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(heads_per_kv_head, 1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        probabilities = scores.masked_fill(~causal, -math.inf).softmax(-1)
        mask = choose(module.layer_idx, query[0], key[0], probabilities[0])
        if mask is not None:
            probabilities = scores.masked_fill(~(mask & causal), -math.inf).softmax(-1)
        return (probabilities @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("delta_dense_mask", attention)
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, attn_implementation="delta_dense_mask"
    )
    with torch.no_grad():
        logits = network(torch.tensor([tokens])).logits[0, len(prompt) - 1 :]
    return logits.log_softmax(-1)
