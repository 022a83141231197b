"""What DELTA does not support is refused before serving, with what is wrong and what is accepted."""

import json
import os
import subprocess
from types import SimpleNamespace

import pytest
from server import vllm_command

from vllm_delta.integration import validation
from vllm_delta.integration.speculation import check_speculation
from vllm_delta.kernels.limits import CPU, GPU
from vllm_delta.method.config import DeltaConfig, DeltaConfigError

# Configuration files alone: nothing of these models is loaded.
DEEPSEEK = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
BERT = {"model_type": "bert", "architectures": ["BertModel"]}
WHISPER = {
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "is_encoder_decoder": True,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
BLOOM = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "n_layer": 4, "n_head": 4}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "torch_dtype": "float32",
}

NGRAM = {"num_speculative_tokens": 2, "prompt_lookup_max": 2}


def write_config(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SIZES, **config}))
    return folder


def expect_refusal(build, *parts):
    with pytest.raises(ValueError) as error:
        build()
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ([1], ['"delta" must be an object']),
        (
            {"budget": 1},
            ["delta.budget is not a setting", "accepted: full_layers, selection_layers, budget_tokens"],
        ),
        ({"budget_tokens": "128"}, ["delta.budget_tokens must be an integer of at least 1", "'128'"]),
        ({"budget_tokens": 2**62}, ["delta.budget_tokens must be an integer", "at most 1073741824"]),
        (
            {"recall_sample_steps": 2**62},
            ["delta.recall_sample_steps must be an integer", "at most 1073741824"],
        ),
        ({"page_size": 2**62}, ["delta.page_size must be an integer", "at most 1073741824"]),
        ({"full_layers": True}, ["delta.full_layers must be an integer", "True"]),
        (
            {"budget_tokens": 128, "recent_tokens": 128},
            ["delta.budget_tokens (128) must be at least", "(128 + 16)"],
        ),
        ({"budget_tokens": 100}, ["delta.budget_tokens must be a multiple of delta.page_size (16)"]),
        ({"recent_tokens": 20}, ["delta.recent_tokens must be a multiple of delta.page_size (16)"]),
        ({"sink_tokens": 8}, ["delta.sink_tokens must be a multiple of delta.page_size (16)"]),
        (
            {"page_size": 8},
            ["delta.page_size must be one of 16, 32, 64, 128 on this platform, not 8"],
        ),
        ({"policy": "h2o"}, ["delta.policy must be one of delta, quest, lessismore,", "not 'h2o'"]),
        ({"recall_sample_steps": "1"}, ["delta.recall_sample_steps must be an integer of at least 0"]),
        ({"selection_layers": "2"}, ['delta.selection_layers must be "auto" or a list']),
        ({"selection_layers": [2, 2]}, ["delta.selection_layers must name each layer once"]),
        ({"selection_layers": [2, 99]}, ["delta.selection_layers: 99 is out of range", "0 to 7"]),
        ({"selection_layers": [1, 2]}, ["delta.selection_layers: layer 1", "full_layers", "2-7"]),
        ({"selection_layers": [3]}, ["delta.selection_layers must include layer 2"]),
        ({"full_layers": 9}, ["delta.full_layers must be at most the model's 8 layers"]),
    ],
    ids=str,
)
def test_settings(engine_config, tiny_model, settings, parts):
    expect_refusal(lambda: engine_config(tiny_model, additional_config={"delta": settings}), *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"kv_cache_dtype": "fp8"}, ["--kv-cache-dtype fp8", "accepted: auto"]),
        # Also a cache of another floating type than the model's: the kernels read the cache in one type.
        ({"kv_cache_dtype": "bfloat16"}, ["--kv-cache-dtype bfloat16", "accepted: auto"]),
        (
            {"block_size": 32, "additional_config": {"delta": {"page_size": 64, "sink_tokens": 64}}},
            ["delta.page_size (64) must divide", "--block-size 32"],
        ),
        ({"prefill_context_parallel_size": 2}, ["--prefill-context-parallel-size 2", "accepted: 1"]),
        (
            {"decode_context_parallel_size": 2, "tensor_parallel_size": 4},
            ["--decode-context-parallel-size 2", "accepted: 1"],
        ),
        ({"kv_sharing_fast_prefill": True}, ["--kv-sharing-fast-prefill", "leave it out"]),
        (
            {
                "attention_backend": None,
                "attention_config": {"backend": "DELTA", "use_non_causal": True},
            },
            ["attention_config.use_non_causal", "accepted: false"],
        ),
        (
            {"speculative_config": {"method": "ngram_gpu", **NGRAM}},
            ["--speculative-config", "'ngram_gpu'", "accepted: ngram"],
        ),
        ({"runner": "pooling"}, ["--runner pooling", "accepted: models that generate"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_options(engine_config, tiny_model, options, parts):
    expect_refusal(lambda: engine_config(tiny_model, **options), *parts)


def test_a_draft_model_is_for_cpus(engine_config, tiny_model):
    draft = {"model": str(tiny_model), "num_speculative_tokens": 2}
    config = engine_config(tiny_model, speculative_config=draft)
    assert config.cache_config.block_size == 32, "which CPU_ATTN takes, too"
    config.device_config.device_type = "cuda"
    expect_refusal(
        lambda: check_speculation(config), "--speculative-config", "'draft_model'", "accepted: ngram"
    )


LOSSLESS = {"lossless": True, "draft_tokens": 4}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"method": "ngram", "model": None}, ["method 'ngram'", "delta.lossless"]),
        ({"num_speculative_tokens": 3}, ["3 num_speculative_tokens", "delta.draft_tokens, 4"]),
        ({"rejection_sample_method": "block"}, ["rejection_sample_method 'block'", "'standard'"]),
        (
            {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.9] * 4},
            ["rejection_sample_method 'synthetic'", "'standard'"],
        ),
        ({"draft_sample_method": "greedy"}, ["draft_sample_method 'greedy'", "'probabilistic'"]),
        ({"parallel_drafting": True}, ["parallel_drafting True", "False"]),
        ({"disable_padded_drafter_batch": True}, ["disable_padded_drafter_batch True", "False"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_lossless_with_speculation_of_another_kind(engine_config, tiny_model, change, parts):
    """A speculative config may be given, as long as it is what lossless speculation would choose."""
    itself = {
        "method": "draft_model",
        "model": str(tiny_model),
        "num_speculative_tokens": 4,
        "draft_sample_method": "probabilistic",
    }
    additional = {"additional_config": {"delta": LOSSLESS}}
    engine_config(tiny_model, speculative_config=itself, **additional)
    given = {key: value for key, value in {**itself, **change}.items() if value is not None}
    expect_refusal(lambda: engine_config(tiny_model, speculative_config=given, **additional), *parts)


def test_batch_invariance_is_refused(engine_config, tiny_model, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    expect_refusal(lambda: engine_config(tiny_model), "VLLM_BATCH_INVARIANT=1", "accepted: 0")


def test_selecting_delta_for_one_kind_of_layer_is_checked_too(engine_config, tiny_model):
    options = {
        "attention_backend": None,
        "attention_config": {"backend_per_kind": {"full_attention": "DELTA"}},
    }
    assert engine_config(tiny_model, **options).parallel_config.worker_cls.endswith("DeltaCPUWorker")
    expect_refusal(
        lambda: engine_config(tiny_model, additional_config={"delta": {"x": 1}}, **options),
        "delta.x is not a setting",
    )


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (DEEPSEEK, ["DeepseekV2ForCausalLM", "MLA", "accepted: models with multi-head"]),
        (BERT, ["BertModel", "encoder-only", "accepted: models that generate"]),
        (WHISPER, ["WhisperForConditionalGeneration", "encoder-decoder", "accepted: decoders"]),
    ],
    ids=["mla", "encoder-only", "encoder-decoder"],
)
def test_models(engine_config, tmp_path, config, parts):
    expect_refusal(lambda: engine_config(write_config(tmp_path, config)), *parts)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"speculative_config": {"method": "ngram", **NGRAM}},
        {"dtype": "bfloat16", "kv_cache_dtype": "bfloat16"},
        {"block_size": 32},
        {"additional_config": {"delta": {"page_size": 128, "sink_tokens": 0}}},
        {"additional_config": {"delta": {"full_layers": 8}}},
    ],
    ids=str,
)
def test_neighbours_of_refused_cases_are_accepted(engine_config, tiny_model, options):
    engine_config(tiny_model, **options)


def test_nothing_is_checked_without_delta(engine_config, tiny_model):
    engine_config(tiny_model, attention_backend="CPU_ATTN", additional_config={"delta": {"x": 1}})


LAYER = {"attn_type": "decoder", "alibi_slopes": None, "kv_cache_dtype": "auto", "head_size": 64}


@pytest.mark.parametrize("limits", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"attn_type": "encoder_decoder"}, ["decoder models", "encoder_decoder"]),
        ({"alibi_slopes": [0.5]}, ["ALiBi", "accepted: RoPE"]),
        ({"head_size": 36}, ["head size", "multiple of", "not 36"]),
        ({"head_size": 1024}, ["head size", "at most", "not 1024"]),
    ],
    ids=["cross-attention", "alibi", "head size", "large head"],
)
def test_layers(change, parts, limits):
    validation.check_layer(SimpleNamespace(**LAYER), limits)
    expect_refusal(lambda: validation.check_layer(SimpleNamespace(**{**LAYER, **change}), limits), *parts)


def test_cache_types_of_layers():
    """FlashAttention's are checked by its own backend; the CPU's kernels read the model's type alone."""
    impl = SimpleNamespace(**{**LAYER, "kv_cache_dtype": "fp8_e4m3"})
    parts = "--kv-cache-dtype fp8_e4m3", "accepted: auto, bfloat16"
    expect_refusal(lambda: validation.check_layer(impl, CPU), *parts)
    validation.check_layer(impl, GPU)


@pytest.mark.parametrize("isa", ["neon", "rvv", "vsx", "vxe"])
def test_unknown_cache_layouts(isa):
    with pytest.raises(DeltaConfigError, match=f"{isa}.*accepted: vec, vec16, amx"):
        validation.check_isa(isa)


def test_block_size():
    validation.check_block_size(DeltaConfig(page_size=16), 128)
    with pytest.raises(DeltaConfigError, match=r"delta.page_size \(16\) must divide.*24"):
        validation.check_block_size(DeltaConfig(page_size=16), 24)


def serve(model, *arguments):
    """Run `vllm serve` to its end, which must come by itself."""
    return subprocess.run(
        [vllm_command(), "serve", str(model), "--dtype", "float32", "--enforce-eager", *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


def test_serve_ends_with_the_message_before_it_starts_an_engine(tiny_model):
    settings = json.dumps({"delta": {"budget_tokens": 100}})
    result = serve(tiny_model, "--attention-backend", "DELTA", "--additional-config", settings)
    assert result.returncode != 0
    assert "delta.budget_tokens must be a multiple of delta.page_size (16), not 100" in result.stdout
    assert "EngineCore" not in result.stdout


def test_serve_ends_with_the_message_of_a_layer(tiny_model, tmp_path):
    """Only the layers know that BLOOM uses ALiBi; they are built in the worker, before serving."""
    model = write_config(tmp_path, BLOOM)
    result = serve(
        *[model, "--load-format", "dummy", "--tokenizer", str(tiny_model)],
        *["--attention-backend", "DELTA"],
    )
    assert result.returncode != 0
    assert "DELTA does not support models with ALiBi; accepted: RoPE" in result.stdout
    assert "Application startup complete" not in result.stdout
