"""Small models whose layers are not all of one kind, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

#: Nemotron-NAS's configuration is code that comes with the model.
NAS_CONFIGURATION = """
from transformers import PretrainedConfig


class Box:
    def __init__(self, values):
        self.__dict__.update(values)


class Block:
    def __init__(self, attention, ffn):
        self.attention, self.ffn = Box(attention), Box(ffn)


class DeciLMConfig(PretrainedConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        blocks = block_configs or []
        self.block_configs = [Block(**block) if isinstance(block, dict) else block for block in blocks]
        self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__init__(**kwargs)

    def to_dict(self):
        blocks = [{"attention": vars(of.attention), "ffn": vars(of.ffn)} for of in self.block_configs]
        return {**super().to_dict(), "block_configs": blocks}
"""


def build_nemotron_nas(folder: Path, without_attention: tuple[int, ...], num_layers: int = 8) -> Path:
    """A Nemotron-NAS model, some of whose layers have no attention; it needs `trust_remote_code`."""
    heads, kv_heads, size, vocabulary, inner = 4, 2, 32, 512, 256
    hidden = heads * size
    blocks = [
        {
            "attention": {"no_op": layer in without_attention, "n_heads_in_group": heads // kv_heads},
            "ffn": {"no_op": False, "ffn_mult": 1.5},
        }
        for layer in range(num_layers)
    ]
    config = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
        "block_configs": blocks,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_decilm.py").write_text(NAS_CONFIGURATION)
    generator = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    weights = {
        "model.embed_tokens.weight": weight(vocabulary, hidden),
        "lm_head.weight": weight(vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(num_layers):
        name = f"model.layers.{layer}."
        if layer not in without_attention:
            weights[f"{name}input_layernorm.weight"] = torch.ones(hidden)
            for part, rows in (("q", hidden), ("k", kv_heads * size), ("v", kv_heads * size), ("o", hidden)):
                weights[f"{name}self_attn.{part}_proj.weight"] = weight(rows, hidden)
        weights[f"{name}post_attention_layernorm.weight"] = torch.ones(hidden)
        for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            weights[f"{name}mlp.{part}_proj.weight"] = weight(*shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def build_from_transformers(folder: Path, config) -> Path:
    """A model of transformers by its configuration; activations keep about unit variance."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 if "embed" in name else parameter.shape[-1] ** -0.5)
            elif name.endswith("sinks"):
                parameter.normal_()
    model.to(config.dtype).save_pretrained(folder)
    return folder


SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def build_llama4(folder: Path) -> Path:
    """Llama 4's text model: of every four layers the first three attend within chunks of 64 tokens."""
    from transformers import Llama4TextConfig

    config = Llama4TextConfig(
        **SIZES,
        num_attention_heads=4,
        head_dim=32,
        intermediate_size=128,
        intermediate_size_mlp=128,
        num_local_experts=2,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=4,
        attention_chunk_size=64,
        max_position_embeddings=2048,
        dtype=torch.float32,
    )
    return build_from_transformers(folder, config)


def build_of_few_tokens(folder: Path) -> Path:
    """A Llama with a vocabulary of 32 tokens, of which several are about as likely."""
    from transformers import LlamaConfig

    sizes = SIZES | {"vocab_size": 32, "num_hidden_layers": 4, "tie_word_embeddings": False}
    config = LlamaConfig(
        **sizes,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=1024,
        dtype=torch.float32,
    )
    return build_from_transformers(folder, config)


def build_gemma3(folder: Path) -> Path:
    """Gemma 3's text model: every second layer has a window, the first one, too."""
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        **SIZES,
        num_attention_heads=4,
        head_dim=32,
        intermediate_size=256,
        sliding_window=64,
        query_pre_attn_scalar=32,
        tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention"] * 4,
        max_position_embeddings=4096,
        dtype=torch.float32,
    )
    return build_from_transformers(folder, config)


def build_gpt_oss(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """gpt-oss: attention sinks, and a window in every second layer."""
    from transformers import GptOssConfig

    rope = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
    config = GptOssConfig(
        **SIZES,
        num_attention_heads=8,
        head_dim=64,
        intermediate_size=128,
        sliding_window=128,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"] * 4,
        max_position_embeddings=4096,
        rope_parameters={**rope, "original_max_position_embeddings": 1024, "truncate": False},
        dtype=dtype,
    )
    return build_from_transformers(folder, config)
