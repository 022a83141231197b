"""The reasoner's network: Qwen3's architecture, small, in plain PyTorch for training, and its export.

RMSNorm before attention and MLP, and on the heads of queries and keys; rotary positions; grouped queries;
SwiGLU; tied embeddings (Qwen3 technical report, arXiv 2505.09388). What `export` writes loads in transformers
and in vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reasoner import vocabulary

EPSILON = 1e-6
#: sequences, and tokens of each
Shape = tuple[int, int]


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
    """Causal attention with normalised queries and keys; the projections alone, see `Layer`."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.q_proj = nn.Linear(size.hidden_size, size.num_heads * size.head_size, bias=False)
        self.k_proj = nn.Linear(size.hidden_size, size.num_kv_heads * size.head_size, bias=False)
        self.v_proj = nn.Linear(size.hidden_size, size.num_kv_heads * size.head_size, bias=False)
        self.o_proj = nn.Linear(size.num_heads * size.head_size, size.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(size.head_size, EPSILON)
        self.k_norm = nn.RMSNorm(size.head_size, EPSILON)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[tokens, hidden]`` to queries, keys and values, ``[tokens, heads, head_size]``."""
        q, k, v = (
            projection(x).view(len(x), -1, self.size.head_size)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v


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
    """Attention and MLP, each added to what comes in.

    Sequences of several lengths lie one behind another, and only attention itself tells them apart: what is
    before and after it is one piece of work each, of one shape, which is what a compiler likes.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(size.hidden_size, EPSILON)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = nn.RMSNorm(size.hidden_size, EPSILON)
        self.mlp = MLP(size)


def before_attention(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a layer: ``[tokens, hidden]`` to queries, keys and values, ``[tokens, heads, head_size]``."""
    return layer.self_attn.project(layer.input_layernorm(x), cos, sin)


def attend(q: Tensor, k: Tensor, v: Tensor, shapes: Sequence[Shape]) -> Tensor:
    """Causal attention in each sequence; all ``[tokens, heads, head_size]``, queries may have more heads."""
    sizes = [count * length for count, length in shapes]
    parts = zip(shapes, *(torch.split(x, sizes) for x in (q, k, v)), strict=True)
    outputs = []
    for shape, *heads in parts:
        qs, ks, vs = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in heads)
        y = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=True)
        outputs.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def after_attention(layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
    """Of a layer: what came in, ``[tokens, hidden]``, and what attention gave, to the layer's output."""
    x = x + layer.self_attn.o_proj(attended.flatten(1))
    output: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
    return output


class Reasoner(nn.Module):
    """The network; names of parameters are those of Qwen3, less the prefix ``model.``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embed_tokens = nn.Embedding(len(vocabulary.words()), size.hidden_size)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.num_layers))
        self.norm = nn.RMSNorm(size.hidden_size, EPSILON)
        self._before: Callable[..., tuple[Tensor, Tensor, Tensor]] = before_attention
        self._after: Callable[..., Tensor] = after_attention
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_last = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * size.num_layers) ** -0.5 if is_last else 1.0
                nn.init.normal_(parameter, std=scale * size.hidden_size**-0.5)

    def compile_layers(self) -> None:
        """Compile what a layer does before and after attention, once for all layers and shapes."""
        self._before = torch.compile(before_attention, dynamic=True)
        self._after = torch.compile(after_attention, dynamic=True)

    def hidden(self, batches: Sequence[Tensor]) -> Tensor:
        """Batches of tokens, int64 ``[sequences, length]`` each, to the last hidden states of all of them.

        Returns:
            ``[tokens, hidden]``, one batch and sequence behind another.
        """
        shapes = [(len(tokens), tokens.shape[1]) for tokens in batches]
        cos, sin = rotations(max(length for _, length in shapes), self.size, batches[0].device)
        positions = torch.cat([torch.arange(n, device=cos.device).repeat(count) for count, n in shapes])
        cos, sin = cos[positions][:, None], sin[positions][:, None]
        x = self.embed_tokens(torch.cat([tokens.flatten() for tokens in batches]))
        for layer in self.layers:
            x = self._after(layer, x, attend(*self._before(layer, x, cos, sin), shapes))
        output: Tensor = self.norm(x)
        return output

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens, int64 ``[sequences, length]``, to logits, ``[sequences, length, words]``."""
        return F.linear(self.hidden([tokens]), self.embed_tokens.weight).view(*tokens.shape, -1)


def rotations(tokens: int, size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions, float32 ``[tokens, head_size]`` (RoPE, arXiv 2104.09864)."""
    exponents = torch.arange(0, size.head_size, 2, dtype=torch.float32, device=device) / size.head_size
    positions = torch.arange(tokens, dtype=torch.float32, device=device)
    angles = torch.outer(positions, size.rope_theta**-exponents).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions for ``[tokens, heads, head_size]``, pairing the two halves of a head."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def restore(model: Reasoner, folder: Path) -> int:
    """Take the weights that `export` wrote; returns how many positions they were trained for.

    Raises:
        RuntimeError: they are of a network of another size.
    """
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    positions: int = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    return positions


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
