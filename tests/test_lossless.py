"""Lossless speculation: whatever the drafts, the answers are full attention's."""

from __future__ import annotations

import functools
import math
import os
import random
from pathlib import Path

import pytest
import torch
from conftest import in_engine_process, in_fresh_process
from demo_model import build_demo_model
from engines import start_engine
from odd_models import build_gemma3, build_gpt_oss, build_of_few_tokens

#: Prompts fill blocks and pages, or leave one token over; some fit the budget, and some grow past it.
LENGTHS = (40, 700, 95, 1100, 333, 257)
STEPS = 64
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 2048}


def settings(**changes: object) -> dict[str, object]:
    """Lossless, with a small budget."""
    sizes = {"budget_tokens": 96, "recent_tokens": 32, "sink_tokens": 16}
    return {"lossless": True, "draft_when": "always", **sizes, **changes}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_layers": 6, "hidden_size": 96, "head_dim": 32, "max_position_embeddings": 2048}
    grouped = {"num_heads": 6, "num_kv_heads": 2, **sizes}
    return {
        "llama": build_demo_model(folder / "llama", architecture="llama", **grouped),
        "qwen3": build_demo_model(folder / "qwen3", architecture="qwen3", **grouped),
        "gemma3": build_gemma3(folder / "gemma3"),
        "gpt-oss": build_gpt_oss(folder / "gpt-oss", torch.float32),
    }


def random_prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(10, 500) for _ in range(length)] for length in lengths]


def answers(model: Path, backend: str, delta: dict | None, lengths=LENGTHS, steps=STEPS, seed=0, **options):
    """Tokens of all prompts together, of some alone, of some after a hit; and what was counted."""
    prompts = random_prompts(lengths, seed)
    with start_engine(model, backend, delta, **{**OPTIONS, **options}) as engine:
        batch = [answer.tokens for answer in engine.generate(prompts, steps)]
        alone = [engine.generate([prompt], steps)[0].tokens for prompt in prompts[1:3]]
        names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
        counted = {name: engine.metric(f"vllm:spec_decode_{name}") for name in names}
        counted |= {name: engine.metric(f"vllm:{name}") for name in ("num_preemptions", "prefix_cache_hits")}
        return batch, alone, counted, engine.counters() if backend == "DELTA" else {}


@functools.cache
def of_full_attention(model: Path) -> list[list[list[int]]]:
    """What vLLM's own backend answers."""
    *tokens, _, _ = in_engine_process(answers, model, "CPU_ATTN", None)
    return tokens


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt-oss"])
def test_tokens_equal_full_attention(models: dict[str, Path], name: str) -> None:
    """In a batch, alone, and after a prefix-cache hit; models with windows and sinks among them."""
    *found, counted, counters = in_engine_process(answers, models[name], "DELTA", settings(draft_pages="own"))
    assert found == of_full_attention(models[name])
    assert counted["prefix_cache_hits"] > 0
    assert counted["num_draft_tokens"] == 7 * counted["num_drafts"] > 0
    assert 0 < counted["num_accepted_tokens"] < counted["num_draft_tokens"], "drafts show nothing"
    layers = counters["layers"]
    assert layers["selection"]["attended_tokens"] == layers["selection"]["context_tokens"] > 0
    assert 0 < layers["sparse"]["attended_tokens"] < layers["sparse"]["context_tokens"] / 2


CHANGES = {
    "pages of selection layers": (settings(draft_pages="shared", selection_layers=[1, 4], full_layers=1), {}),
    "two full layers in drafts": (settings(draft_full_layers=2), {}),
    "one draft": (settings(draft_tokens=1), {}),
    "15 drafts, large pages": (
        settings(draft_tokens=15, page_size=32, budget_tokens=128, recent_tokens=64, sink_tokens=32),
        {},
    ),
    "budget of 256": (settings(budget_tokens=256), {}),
    "chunks": (settings(), {"max_num_batched_tokens": 100, "enable_prefix_caching": False}),
    "where it pays": (settings(draft_when="pays"), {}),
    "compiled": (settings(), {"enforce_eager": False}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tokens_equal_whatever_the_settings(models: dict[str, Path], name: str) -> None:
    delta, options = CHANGES[name]
    *found, counted, _ = in_engine_process(answers_with, models["llama"], delta, options)
    assert found == of_full_attention(models["llama"])
    assert (counted["num_accepted_tokens"] > 0) == (name != "where it pays")


def answers_with(model: Path, delta: dict, options: dict):
    return answers(model, "DELTA", delta, **options)


def test_two_ranks_answer_as_one(models: dict[str, Path]) -> None:
    """Tensor parallel ranks choose pages by their own heads, and draft the same tokens."""
    run = functools.partial(answers, models["llama"], tensor_parallel_size=2)
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}
    *dense, _, _ = in_fresh_process(functools.partial(run, backend="CPU_ATTN", delta=None), **environment)
    *found, counted, _ = in_fresh_process(
        functools.partial(run, backend="DELTA", delta=settings()), **environment
    )
    assert found == dense
    assert counted["num_accepted_tokens"] > 0


def preempted(model: Path, backend: str, delta: dict | None):
    """58 blocks of 32 tokens do not hold the batch; preempted requests compute all their tokens again."""
    options = {"num_gpu_blocks_override": 58, "enable_prefix_caching": False, "block_size": 32}
    lengths = (100, 120, 250, 500, 630)
    return answers(
        model, backend, delta, lengths, 160, seed=3, **options, max_model_len=1024, max_num_batched_tokens=300
    )


def test_tokens_equal_after_preemptions(models: dict[str, Path]) -> None:
    *dense, _, _ = in_engine_process(preempted, models["llama"], "CPU_ATTN", None)
    *found, counted, _ = in_engine_process(preempted, models["llama"], "DELTA", settings())
    assert counted["num_preemptions"] > 0
    assert found == dense


def to_the_end(model: Path, backend: str, delta: dict | None):
    """Sequences that end where the model's context does."""
    return answers(model, backend, delta, (470, 500, 508), 512, seed=4, max_model_len=512)


def test_tokens_equal_up_to_the_end_of_the_context(models: dict[str, Path]) -> None:
    *dense, _, _ = in_engine_process(to_the_end, models["llama"], "CPU_ATTN", None)
    *found, _, _ = in_engine_process(to_the_end, models["llama"], "DELTA", settings())
    assert [len(tokens) for tokens in dense[0]] == [42, 12, 4]
    assert found == dense


# --- sampling ------------------------------------------------------------------------------------------

#: Of each test; 100,000 were drawn once, with the same result.
SAMPLES = int(os.environ.get("LOSSLESS_SAMPLES", "8000"))
CONTINUATION = 3


@pytest.fixture(scope="module")
def few_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_of_few_tokens(tmp_path_factory.mktemp("models") / "few")


def few_prompt() -> list[int]:
    generator = random.Random(5)
    return [generator.randrange(32) for _ in range(250)]


def sample(model: Path, delta: dict, sampling: dict) -> tuple[list[tuple[int, ...]], float]:
    """Continuations of the prompt, and the share of drafts that was accepted."""
    from vllm import SamplingParams

    options = {"max_num_seqs": 128, "max_model_len": 512, "skip_tokenizer_init": True}
    with start_engine(model, "DELTA", delta, **options) as engine:
        parameters = SamplingParams(
            n=100,
            max_tokens=CONTINUATION,
            ignore_eos=True,
            detokenize=False,
            **({"temperature": 1} | sampling),
        )
        prompts = [{"prompt_token_ids": few_prompt()}] * (SAMPLES // 100)
        results = engine.llm.generate(prompts, parameters, use_tqdm=False)
        drafted, accepted = (
            engine.metric(f"vllm:spec_decode_num_{name}_tokens") for name in ("draft", "accepted")
        )
        return [
            tuple(output.token_ids) for result in results for output in result.outputs
        ], accepted / drafted


def exact_distribution(model: Path, temperature: float = 1.0, top_k: int | None = None) -> torch.Tensor:
    """Of all continuations, ``[32] * CONTINUATION``, by full attention computed with transformers."""
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prefixes, distribution = torch.zeros(1, 0, dtype=torch.long), torch.ones(1)
    with torch.inference_mode():
        for _ in range(CONTINUATION):
            tokens = torch.cat([torch.tensor(few_prompt()).expand(len(prefixes), -1), prefixes], 1)
            parts = [exact(part).logits[:, -1] for part in tokens.split(128)]
            logits = torch.cat(parts).double() / temperature
            if top_k is not None:
                least = logits.topk(top_k).values[:, -1:]
                logits = logits.masked_fill(logits < least, -math.inf)
            distribution = (distribution[:, None] * logits.softmax(-1)).flatten()
            prefixes = torch.cat(
                [prefixes.repeat_interleave(32, 0), torch.arange(32).repeat(len(prefixes))[:, None]], 1
            )
    return distribution


def chi_square_p(samples: list[tuple[int, ...]], distribution: torch.Tensor) -> float:
    """That such samples come from the distribution, by their pairs of neighbours: the least of all pairs.

    Pairs of which fewer than 5 are expected are one together.
    """
    tokens = torch.tensor(samples)
    exact = distribution.view([32] * CONTINUATION).double()
    found = []
    for place in range(CONTINUATION - 1):
        others = [axis for axis in range(CONTINUATION) if axis not in (place, place + 1)]
        expected = exact.sum(others).flatten() * len(samples)
        index = tokens[:, place] * 32 + tokens[:, place + 1]
        counts = torch.bincount(index, minlength=32 * 32).double()
        large = expected >= 5
        cells = [torch.cat([part[large], part[~large].sum()[None]]) for part in (counts, expected)]
        statistic = ((cells[0] - cells[1]) ** 2 / cells[1].clamp(min=1e-9)).sum()
        freedom = torch.tensor(len(cells[0]) - 1.0, dtype=torch.float64)
        found.append(float(torch.special.gammaincc(freedom / 2, statistic / 2)))
    return min(found)


DRAFTS = {
    "own pages": {"draft_pages": "own"},
    "own pages, greedy drafts": {"draft_pages": "own", "draft_sampling": "greedy"},
    "fresh pages": {"draft_pages": "fresh"},
}


@pytest.mark.parametrize("name", DRAFTS)
def test_samples_have_the_distribution_of_full_attention(few_tokens: Path, name: str) -> None:
    """At temperature 1, with drafts that are often rejected."""
    delta = settings(draft_tokens=2, budget_tokens=64, recent_tokens=32, **DRAFTS[name])
    samples, accepted = in_engine_process(sample, few_tokens, delta, {})
    assert 0.02 < accepted < 0.95, "drafts show nothing"
    assert len(samples) == SAMPLES
    assert chi_square_p(samples, exact_distribution(few_tokens)) > 0.001


def test_samples_with_top_k_have_its_distribution(few_tokens: Path) -> None:
    delta = settings(draft_tokens=2, budget_tokens=64, recent_tokens=32, draft_pages="own")
    samples, _ = in_engine_process(sample, few_tokens, delta, {"temperature": 0.7, "top_k": 5})
    assert chi_square_p(samples, exact_distribution(few_tokens, 0.7, 5)) > 0.001
    assert chi_square_p(samples, exact_distribution(few_tokens)) < 1e-6, "the test sees no difference"
