"""DELTA as a mask over dense attention, in Hugging Face transformers: an independent second opinion.

Shares no code with vllm_delta. One teacher-forced pass over prompt and answer; behind the prompt, sparse
layers see a row's mask and the other layers everything.
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
    model: Path, prompt: list[int], answer: list[int], selection_layers, full_layers, budget
) -> torch.Tensor:
    """Log-probabilities ``[len(answer), vocabulary]`` of each answer token's step, in float64.

    `budget`: page_size, budget_pages, recent_pages, sink_pages.
    """
    tokens = prompt + answer[:-1]
    length, prompt_len = len(tokens), len(prompt)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    chosen = {}

    def attention(module, query, key, value, _mask, scaling, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * scaling
        layer = module.layer_idx
        sparse = layer >= full_layers and layer not in selection_layers
        mask = chosen["mask"] if sparse else causal
        probabilities = scores.masked_fill(~mask, -math.inf).softmax(-1)
        if layer in selection_layers:
            mask = causal.clone()
            for row in range(prompt_len, length):
                token_scores = probabilities[0, :, row, : row + 1].amax(0).numpy()
                mask[row, : row + 1] = torch.from_numpy(choose_pages(token_scores, *budget))
            chosen["mask"] = mask
        return (probabilities @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("delta_dense_mask", attention)
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, attn_implementation="delta_dense_mask"
    )
    with torch.no_grad():
        logits = network(torch.tensor([tokens])).logits[0, prompt_len - 1 :]
    return logits.log_softmax(-1)
