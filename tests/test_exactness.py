"""DELTA inside vLLM gives exactly what it is defined to give, however the work is scheduled."""

import random

import pytest
from conftest import in_engine_process
from demo_model import build_demo_model
from dense_mask import logprobs_with_masks
from engines import pool, start_engine

SMALL_BUDGET = {"budget_tokens": 128, "recent_tokens": 32, "sink_tokens": 16}
ROLES = {"full_layers": 1, "selection_layers": [1, 4]}
LENGTHS = [40, 700, 128, 1300, 16, 333, 900, 129]

MODELS = {
    "llama-gqa": {"architecture": "llama", "num_heads": 6, "num_kv_heads": 2},
    "qwen3-mha": {"architecture": "qwen3", "num_heads": 4, "num_kv_heads": 4},
    "qwen2-gqa": {"architecture": "qwen2", "num_heads": 8, "num_kv_heads": 1, "hidden_size": 256},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_layers": 7, "hidden_size": 96, "head_dim": 32, "max_position_embeddings": 2048}
    return {name: build_demo_model(folder / name, **{**sizes, **kind}) for name, kind in MODELS.items()}


def random_prompts(lengths, seed=0):
    generator = random.Random(seed)
    return [[generator.randrange(10, 500) for _ in range(length)] for length in lengths]


def answers_in_a_batch_and_alone(model, backend):
    prompts = random_prompts(LENGTHS)
    engine = pool.get(model, backend)
    batch = [answer.tokens for answer in engine.generate(prompts, 64)]
    alone = engine.generate(prompts[3:4], 64)[0].tokens
    return batch, alone, engine.counters() if backend == "DELTA" else {}


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3-mha"])
def test_budget_of_the_context_equals_dense(models, name):
    """Greedy tokens equal CPU_ATTN's, alone and in a mixed batch."""
    *dense, _ = in_engine_process(answers_in_a_batch_and_alone, models[name], "CPU_ATTN")
    *delta, counts = in_engine_process(answers_in_a_batch_and_alone, models[name], "DELTA")
    assert delta == dense
    rows = 63 * (len(LENGTHS) + 1)  # the first token of an answer comes from the prefill
    assert counts["layers"]["sparse"]["rows"] == counts["dense_rows"]["within_budget"] > 0
    assert counts["layers"]["full"]["rows"] == 2 * rows
    assert counts["attended_tokens"] == counts["context_tokens"] > 0


def answers_with_logprobs(model):
    engine = pool.get(model, "DELTA", {**SMALL_BUDGET, **ROLES})
    return engine.generate(random_prompts(LENGTHS[:6], seed=1), 24, logprobs=5), engine.counters()


@pytest.mark.parametrize("name", MODELS)
def test_small_budget_equals_dense_masks(models, name):
    """Next-token log-probabilities equal those of dense attention with the chosen pages as a mask."""
    answers, counts = in_engine_process(answers_with_logprobs, models[name])
    assert counts["layers"]["sparse"]["attended_tokens"] < counts["layers"]["sparse"]["context_tokens"] / 2
    for prompt, answer in zip(random_prompts(LENGTHS[:6], seed=1), answers, strict=True):
        expected = logprobs_with_masks(
            models[name], prompt, answer.tokens, [1, 4], full_layers=1, budget=(16, 8, 2, 1)
        )
        for step, logprobs in enumerate(answer.logprobs):
            for token, logprob in logprobs.items():
                assert logprob == pytest.approx(expected[step, token].item(), abs=1e-4)


def check_schedules(model):
    """Alone, in a batch, after a prefix-cache hit, in chunks, after a preemption: the same tokens."""
    delta = {**SMALL_BUDGET, **ROLES}
    prompts, steps = random_prompts(LENGTHS, seed=2), 48
    with start_engine(model, "DELTA", delta, max_num_batched_tokens=2048) as engine:
        expected = [engine.generate([prompt], steps)[0].tokens for prompt in prompts]
        hits = engine.metric("vllm:prefix_cache_hits")
        assert [engine.generate([prompt], steps)[0].tokens for prompt in prompts] == expected
        assert engine.metric("vllm:prefix_cache_hits") > hits
        assert [answer.tokens for answer in engine.generate(prompts, steps)] == expected
        # One token longer than whole blocks: what a hit leaves of the prompt is a single token.
        prompt = prompts[3][:1025]
        first = engine.generate([prompt], steps)[0].tokens
        assert engine.generate([prompt], steps)[0].tokens == first
    chunks = {"max_num_batched_tokens": 100, "enable_prefix_caching": False}
    with start_engine(model, "DELTA", delta, **chunks) as engine:
        assert [answer.tokens for answer in engine.generate(prompts, steps)] == expected
    # 115 blocks of 16 tokens do not hold the batch. Without prefix caching a preempted request computes
    # all its tokens again, the generated ones included.
    preempting = {"num_gpu_blocks_override": 115, "enable_prefix_caching": False, "max_model_len": 1024}
    with start_engine(model, "DELTA", delta, **preempting, max_num_batched_tokens=300) as engine:
        lengths = [100, 120, 250, 500, 630]
        prompts = random_prompts(lengths, seed=3)
        alone = [engine.generate([prompt], 160)[0].tokens for prompt in prompts]
        assert engine.metric("vllm:num_preemptions") == 0
        assert [answer.tokens for answer in engine.generate(prompts, 160)] == alone
        assert engine.metric("vllm:num_preemptions") > 0


def test_same_answer_however_it_is_scheduled(models):
    in_engine_process(check_schedules, models["llama-gqa"])
