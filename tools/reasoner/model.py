"""The reasoner's network: Qwen3's architecture, small, in plain PyTorch for training, and its export.

RMSNorm before attention and MLP, and on the heads of queries and keys; rotary positions; grouped queries;
SwiGLU; tied embeddings (Qwen3 technical report, arXiv 2505.09388). What `export` writes loads in transformers
and in vLLM.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reasoner import vocabulary

EPSILON = 1e-6


@dataclass(frozen=True)
class Size:
    """The network's sizes."""

    num_layers: int = 16
    hidden_size: int = 192
    mlp_size: int = 256
    num_heads: int = 3
    num_kv_heads: int = 1
    head_size: int = 64
    #: positions, in tokens
    max_length: int = 16384
    rope_theta: float = 1e7


class Attention(nn.Module):
    """Causal attention with normalised queries and keys."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.q_proj = nn.Linear(size.hidden_size, size.num_heads * size.head_size, bias=False)
        self.k_proj = nn.Linear(size.hidden_size, size.num_kv_heads * size.head_size, bias=False)
        self.v_proj = nn.Linear(size.hidden_size, size.num_kv_heads * size.head_size, bias=False)
        self.o_proj = nn.Linear(size.num_heads * size.head_size, size.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(size.head_size, EPSILON)
        self.k_norm = nn.RMSNorm(size.head_size, EPSILON)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[batch, tokens, hidden]`` to the same."""
        batch, tokens, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, tokens, -1, self.size.head_size).transpose(1, 2)

        q = rotate(self.q_norm(heads(self.q_proj(x))), cos, sin)
        k = rotate(self.k_norm(heads(self.k_proj(x))), cos, sin)
        y = F.scaled_dot_product_attention(q, k, heads(self.v_proj(x)), is_causal=True, enable_gqa=True)
        output: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))
        return output


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.hidden_size, size.mlp_size, bias=False)
        self.up_proj = nn.Linear(size.hidden_size, size.mlp_size, bias=False)
        self.down_proj = nn.Linear(size.mlp_size, size.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` to the same."""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class Layer(nn.Module):
    """Attention and MLP, each added to what comes in."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(size.hidden_size, EPSILON)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = nn.RMSNorm(size.hidden_size, EPSILON)
        self.mlp = MLP(size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[batch, tokens, hidden]`` to the same."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        output: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return output


class Reasoner(nn.Module):
    """The network; names of parameters are those of Qwen3, less the prefix ``model.``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embed_tokens = nn.Embedding(len(vocabulary.words()), size.hidden_size)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.num_layers))
        self.norm = nn.RMSNorm(size.hidden_size, EPSILON)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_last = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * size.num_layers) ** -0.5 if is_last else 1.0
                nn.init.normal_(parameter, std=scale * size.hidden_size**-0.5)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Tokens, int64 ``[batch, tokens]``, to the last hidden states, ``[batch, tokens, hidden]``."""
        cos, sin = rotations(tokens.shape[1], self.size, tokens.device)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        output: Tensor = self.norm(x)
        return output

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens, int64 ``[batch, tokens]``, to logits, ``[batch, tokens, words]``."""
        return F.linear(self.hidden(tokens), self.embed_tokens.weight)


def rotations(tokens: int, size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions, float32 ``[tokens, head_size]`` (RoPE, arXiv 2104.09864)."""
    exponents = torch.arange(0, size.head_size, 2, dtype=torch.float32, device=device) / size.head_size
    positions = torch.arange(tokens, dtype=torch.float32, device=device)
    angles = torch.outer(positions, size.rope_theta**-exponents).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions for ``[batch, heads, tokens, head_size]``, pairing the two halves of a head."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def export(model: Reasoner, folder: Path) -> None:
    """Write the model in bfloat16, with its configuration and tokenizer, as transformers and vLLM load it."""
    from safetensors.torch import save_file

    size, ids = model.size, vocabulary.token_ids()
    folder.mkdir(parents=True, exist_ok=True)
    special = {
        "bos_token_id": ids[vocabulary.BOS],
        "eos_token_id": ids[vocabulary.EOS],
        "pad_token_id": ids[vocabulary.PAD],
    }
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": size.num_layers,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.mlp_size,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "head_dim": size.head_size,
        "vocab_size": len(vocabulary.words()),
        "max_position_embeddings": size.max_length,
        "hidden_act": "silu",
        "rms_norm_eps": EPSILON,
        "rope_theta": size.rope_theta,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **special,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"do_sample": False, "temperature": 0.0, **special}  # vLLM reads the temperature alone
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = {
        f"model.{name}": value.detach().to("cpu", torch.bfloat16)
        for name, value in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    vocabulary.save_tokenizer(str(folder), size.max_length)
