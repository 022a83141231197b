"""A model that looks things up, by construction: it copies what followed the last two tokens before.

Tokens have random codes. Layer 0 writes the codes of the token before and of the one before that beside a
token's own. Layer `RETRIEVES` attends to where these two, one place on, are the last two of now, and writes
the code of the token that stands there, which is the likeliest next one. All other layers add nothing, and
their attention says nothing: whoever lets one of them select for layer `RETRIEVES` finds little.
"""

from __future__ import annotations

from pathlib import Path

import torch
from demo_model import build_demo_model

#: Layers of the model, and the one that retrieves; the rule of thumb makes it sparse.
LAYERS, RETRIEVES = 8, 5
#: Numbers of a code; own, before, the one before that, and next stand one after another.
CODE = 48
HEAD = 128
#: Frequencies of the rotary embedding fall so fast that pairs from here on do not turn within the context.
STILL = HEAD // 2 - CODE
ROPE_THETA = 1e30
#: Logits that single out one position, whatever the others are.
SHARP = 60.0


def build_induction_model(path: Path, max_position_embeddings: int = 1024) -> Path:
    """Write the model to a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    build_demo_model(
        path,
        num_layers=LAYERS,
        hidden_size=4 * CODE,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=2,
        head_dim=HEAD,
        max_position_embeddings=max_position_embeddings,
        num_merges=600,
    )
    config = AutoConfig.from_pretrained(path)
    config.attention_bias = True
    config.rope_parameters = {"rope_type": "default", "rope_theta": ROPE_THETA}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    own, before, earlier, following = torch.arange(4 * CODE).view(4, CODE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        codes = torch.randn(config.vocab_size, CODE, generator=torch.Generator().manual_seed(0)).sign()
        model.get_input_embeddings().weight[:, own] = codes
        model.get_output_embeddings().weight[:, following] = codes / 2
        model.model.norm.weight.fill_(1)
        # After their norms, numbers of a code are 1 or -1 again.
        first, retrieves = (model.model.layers[index] for index in (0, RETRIEVES))
        first.input_layernorm.weight.fill_(0.5)
        retrieves.input_layernorm.weight.fill_(0.75**0.5)
        _attend_back(first.self_attn, [(1, before), (2, earlier)], own)
        _attend_to_matches(retrieves.self_attn, own, before, earlier, following)
    model.save_pretrained(path)
    return path


def _attend_back(attention, heads, own):
    """Each head attends so many tokens back, and copies what they are to its place."""
    turns = ROPE_THETA ** (-torch.arange(STILL) / (HEAD / 2))
    size = (SHARP * HEAD**0.5) ** 0.5
    for number, (distance, place) in enumerate(heads):
        start = number * HEAD
        for turn, frequency in enumerate(turns):
            for projection, angle in (
                (attention.q_proj, -frequency * distance),
                (attention.k_proj, 0 * frequency),
            ):
                projection.bias[start + turn] = size * angle.cos()
                projection.bias[start + HEAD // 2 + turn] = size * angle.sin()
        attention.v_proj.weight[start + torch.arange(CODE), own] = 1
        attention.o_proj.weight[place, start + torch.arange(CODE)] = 1


def _attend_to_matches(attention, own, before, earlier, following):
    """The first head attends to what follows the last two tokens, and copies what it is."""
    size = (SHARP / CODE * HEAD**0.5) ** 0.5
    for still, now, then in ((STILL, own, before), (STILL + HEAD // 2, before, earlier)):
        place = still + torch.arange(CODE)
        attention.q_proj.weight[place, now] = size
        attention.k_proj.weight[place, then] = size
    attention.v_proj.weight[torch.arange(CODE), own] = 1
    attention.o_proj.weight[following, torch.arange(CODE)] = 1
