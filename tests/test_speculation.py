"""Speculative decoding by others inside vLLM: what DELTA makes of a token and the drafts behind it."""

from __future__ import annotations

import random
from functools import partial

import pytest
from conftest import in_engine_process
from demo_model import build_demo_model
from dense_mask import logprobs_with_masks
from engines import start_engine

ROLES = {"full_layers": 1, "selection_layers": [1, 4]}
BUDGET = {"budget_tokens": 128, "recent_tokens": 32, "sink_tokens": 16}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
#: drafts by another model, whose layers run dense; here by the same one, to have some accepted
DRAFT_MODEL = {"method": "draft_model", "num_speculative_tokens": 3}
#: enough for a model of random weights to repeat itself, which n-grams need
STEPS = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {"num_layers": 7, "hidden_size": 96, "head_dim": 32, "num_heads": 6, "num_kv_heads": 2}
    folder = tmp_path_factory.mktemp("model")
    return build_demo_model(folder, architecture="llama", max_position_embeddings=2048, **sizes)


def make_prompts():
    generator = random.Random(4)
    return [[generator.randrange(10, 500) for _ in range(length)] for length in (700, 40, 333)]


def record_rows(worker):
    """Keep the rows of every step that is split from now on."""
    from vllm_delta.integration.cpu import builder

    split, worker.recorded = builder.split_step, []

    def recording(*arguments, **options):
        step = split(*arguments, **options)
        if step.rows is not None:
            worker.recorded.append((step.rows.lengths.tolist(), step.rows.query_lens.tolist()))
        return step

    builder.split_step, worker.restore = recording, lambda: setattr(builder, "split_step", split)


def recorded_rows(worker):
    worker.restore()
    return worker.recorded


def speculation(model, method):
    return {"ngram": NGRAM, "draft_model": {**DRAFT_MODEL, "model": str(model)}}[method]


def verify(model, method):
    """Each prompt by itself: its answer, and its rows, as (length, query tokens) in the steps' order."""
    answers, rows = [], []
    options = {"speculative_config": speculation(model, method), "enable_prefix_caching": False}
    with start_engine(model, "DELTA", {**BUDGET, **ROLES}, **options) as engine:
        for prompt in make_prompts():
            engine.llm.collective_rpc(record_rows)
            answers += engine.generate([prompt], STEPS, logprobs=5)
            (recorded,) = engine.llm.collective_rpc(recorded_rows)
            rows.append([(*lengths, *query_lens) for lengths, query_lens in recorded])
        return answers, rows, engine.metric("vllm:spec_decode_num_accepted_tokens"), engine.counters()


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_drafts_read_the_pages_of_the_token_before_them(model, method):
    """Every step equals dense attention with a mask: of the row's first token, and all tokens since."""
    answers, rows, accepted, counts = in_engine_process(verify, model, method)
    assert accepted > 0 and any(query_len > 1 for of_prompt in rows for _, query_len in of_prompt)
    sparse = counts["layers"]["sparse"]
    assert sparse["rows"] == 4 * sum(query_len for of_prompt in rows for _, query_len in of_prompt)
    assert sparse["attended_tokens"] < sparse["context_tokens"] / 2
    for prompt, answer, of_prompt in zip(make_prompts(), answers, rows, strict=True):
        together = {}  # what is computed again counts the last time
        for end, query_len in of_prompt:
            together |= dict.fromkeys(range(end - query_len, end), (end - query_len, end))
        expected = logprobs_with_masks(
            model, prompt, answer.tokens, [1, 4], full_layers=1, budget=(16, 8, 2, 1), rows=together
        )
        for step, logprobs in enumerate(answer.logprobs):
            for token, logprob in logprobs.items():
                assert logprob == pytest.approx(expected[step, token].item(), abs=1e-4)


def answers_with(model, delta, **options):
    with start_engine(model, "DELTA", {**BUDGET, **ROLES, **delta}, **options) as engine:
        answers = engine.generate(make_prompts(), STEPS)
        return [answer.tokens for answer in answers], engine.metric("vllm:spec_decode_num_accepted_tokens")


def test_tokens_by_themselves_where_recent_pages_may_not_hold_the_drafts(model):
    """Then each token chooses for itself, and speculation changes none."""
    delta = {"recent_tokens": 16}
    plain, _ = in_engine_process(answers_with, model, delta)
    for method in ("ngram", "draft_model"):
        options = {"speculative_config": speculation(model, method)}
        speculative, accepted = in_engine_process(partial(answers_with, model, delta, **options))
        assert accepted > 0
        assert speculative == plain
