"""Shapes of models, and the arguments of engines that load them with random weights."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.base import DELTA, Json
from benchmarks.lib.cases import Case

#: positions of every shape
POSITIONS = 131072
#: positions that an engine has beyond the longest sequence
SPARE_POSITIONS = 64

#: of vLLM's `kv_transfer_config`: prompts cost nothing, and their KV cache is noise.
NOISE_IN_CACHE = {
    "kv_connector": "DecodeBenchConnector",
    "kv_role": "kv_both",
    # Not a constant, which is the connector's default: all scores would tie.
    "kv_connector_extra_config": {"fill_mean": 0.0, "fill_std": 1.0, "startup_fill": True},
}
#: bytes of a cached number, by vLLM's name; names that are not here have one byte
CACHE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _shape(
    *, layers: int, hidden: int, mlp: int, heads: tuple[int, int, int], vocab: int, kind: str = "qwen2"
) -> Json:
    query_heads, kv_heads, head_dim = heads
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": POSITIONS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": hidden <= 2048,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


SHAPES: dict[str, Json] = {  # heads: query heads, KV heads, size of a head
    "tiny4": _shape(layers=4, hidden=512, mlp=1024, heads=(8, 2, 64), vocab=4096),
    "tiny28": _shape(layers=28, hidden=512, mlp=1024, heads=(8, 2, 64), vocab=4096),
    "qwen2.5-1.5b": _shape(layers=28, hidden=1536, mlp=8960, heads=(12, 2, 128), vocab=151936),
    "qwen2.5-7b": _shape(layers=28, hidden=3584, mlp=18944, heads=(28, 4, 128), vocab=152064),
    "qwen3-8b": _shape(layers=36, hidden=4096, mlp=12288, heads=(32, 8, 128), vocab=151936, kind="qwen3"),
}


def ngram_drafts(tokens: int) -> Json:
    """VLLM's configuration of so many drafts, by n-grams of up to four tokens."""
    return {"method": "ngram", "prompt_lookup_max": 4, "num_speculative_tokens": tokens}


def write_model(shape: str, folder: Path) -> Path:
    """A model folder that holds only the config of `shape`."""
    model = folder / shape
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPES[shape], indent=1))
    return model


def read_config(model: str | Path) -> Json:
    """The language model's part of the folder's config.json."""
    config: Json = json.loads((Path(model) / "config.json").read_text())
    text: Json = config.get("text_config", config)
    return text


def kv_cache_bytes(config: Json, needs: Sequence[Case], dtype: str) -> int:
    """What the largest of `needs` takes, with two spare blocks of 128 tokens per sequence."""
    heads: int = config["num_attention_heads"]
    kv_heads: int = config.get("num_key_value_heads", heads)
    head_dim: int = config.get("head_dim") or config["hidden_size"] // heads
    layers: int = config["num_hidden_layers"]
    per_token = layers * 2 * kv_heads * head_dim * CACHE_BYTES.get(dtype, 1)
    tokens = max(need.batch * (math.ceil(need.context / 128) + 2) * 128 for need in needs)
    return (tokens + 4 * 128) * per_token


def engine_arguments(args: argparse.Namespace, folder: Path, needs: Sequence[Case]) -> Json:
    """Arguments of vllm.LLM that all backends share; `needs` has the sequences' last lengths as context.

    On a GPU the cache takes what vLLM finds free, so that its size shows what a backend holds itself.
    """
    model = args.model or write_model(args.shape, folder)
    config = read_config(model)
    limit = config.get("max_position_embeddings", POSITIONS)
    arguments: Json = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": args.dtype,
        "kv_cache_dtype": args.kv_cache_dtype,
        "max_model_len": min(limit, max(need.context for need in needs) + SPARE_POSITIONS),
        "max_num_seqs": max(need.batch for need in needs),
        "enable_prefix_caching": False,
    }
    if args.platform == "cpu":
        dtype = args.dtype if args.kv_cache_dtype == "auto" else args.kv_cache_dtype
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes(config, needs, dtype)
    arguments.update(args.engine)
    return arguments


def prompt_case(case: Case, args: argparse.Namespace) -> Case:
    """`case` with as many context tokens as the model's positions leave room for."""
    return Case(case.batch, min(case.context, args.positions - args.lengths[1] - SPARE_POSITIONS))


def worker_job(args: argparse.Namespace, engine: Json, arm: str) -> Json:
    """What every worker is given; a benchmark adds its own."""
    backend = arm.partition("#")[0]
    own: Json = {"attention_backend": backend}
    if backend == DELTA and args.delta:
        own["additional_config"] = {"delta": args.delta}
    return {
        "engine": engine | own,
        "vocab": read_config(engine["model"])["vocab_size"],
        "cuda": args.platform == "cuda",
    }
