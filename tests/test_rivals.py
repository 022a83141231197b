"""The methods that DELTA is compared with, and live recall in an engine: against masks made another way."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from conftest import in_engine_process
from dense_mask import logprobs_with_choices
from engines import pool, start_engine, use_settings
from rival_masks import MASKS, Budget, MaskRow
from rival_rows import (
    BUDGETS,
    KEPT_PAGES,
    LENGTHS,
    SHAPES,
    as_mask,
    double_row,
    mask_row,
    masked_attention,
    paged_layer,
    random_rows,
    settings,
)

from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.config import POLICIES
from vllm_delta.method.counters import Counters
from vllm_delta.method.plan import SELF_SELECTING, Role
from vllm_delta.method.rows import ALL_PAGES
from vllm_delta.plain.rivals import COMPARISONS, make_policy
from vllm_delta.plain.rivals.run import Chosen, decode_rows
from vllm_delta.plain.rows import RequestRows, RowIndex, together


def test_every_policy_has_a_class_and_a_mask():
    assert {"delta", *COMPARISONS} == set(POLICIES)
    assert set(MASKS) == set(COMPARISONS)


@pytest.mark.parametrize("policy", COMPARISONS)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_choice_and_attention_equal_the_mask(policy, budget):
    torch.manual_seed(0)
    config = settings(budget, policy)
    for shape in SHAPES:
        rows = random_rows([130, budget.budget + 1, *LENGTHS], *shape)
        tokens = make_policy(config).choose(rows)
        attended = rows.attend(tokens).numpy()
        assert tokens.sum(-1).max() <= budget.budget
        for number in range(len(rows)):
            mask = MASKS[policy](mask_row(rows, number), budget)
            assert (as_mask(rows, tokens, number) == mask).all()
            np.testing.assert_allclose(attended[number], masked_attention(rows, mask, number), atol=1e-12)


@pytest.mark.parametrize("policy", COMPARISONS)
@pytest.mark.parametrize("budget", BUDGETS[1:], ids=str)
def test_ties_go_to_the_lower_index(policy, budget):
    """Small whole numbers, whose products are exact; the query of nothing ties everything."""
    torch.manual_seed(1)
    for scale in (0, 1):
        rows = random_rows([150], 4, 2, 8, 0.0, False)
        query, keys = scale * rows.queries.round().clamp(-1, 1), rows.keys.round().clamp(-1, 1)
        if policy == "oracle":
            query *= 0  # sums of other numbers depend on their order
        if policy == "tidal":
            query[:, 1::2] = query[:, ::2]  # and so does the softmax, between heads
        rows = RequestRows(query, keys, rows.values, rows.lengths, AttentionParameters(1.0))
        mask = MASKS[policy](mask_row(rows), budget)
        assert (as_mask(rows, make_policy(settings(budget, policy)).choose(rows)) == mask).all()


def test_rows_come_together_by_request_and_memory(monkeypatch):
    indices = [RowIndex(n, request, 10 + n, KEPT_PAGES) for n, request in enumerate([0, 0, 0, 1, 0, 2, 2])]
    assert [len(part) for part in together(indices, 4)] == [3, 1, 1, 2]
    monkeypatch.setattr("vllm_delta.plain.rows.TOGETHER", 2 * 4 * 11)
    parts = list(together(indices, 4))
    assert [len(part) for part in parts] == [2, 1, 1, 1, 1, 1]
    assert [index for part in parts for index in part] == indices


@pytest.mark.parametrize("policy", COMPARISONS)
def test_decode_rows(policy):
    """Rows of all kinds in one step; where layers share a choice, it is the selection layer's."""
    torch.manual_seed(2)
    budget, page = BUDGETS[0], BUDGETS[0].page
    lengths = [1, 64, 65, 200, 150, 63, 90]
    layer, rows = paged_layer(lengths)
    rows = [  # a prompt's last token
        index._replace(kept_pages=ALL_PAGES) if index.length == 90 else index for index in rows
    ]
    more = [
        RowIndex(number, 3, length, KEPT_PAGES) for number, length in enumerate([199, 60, 120], len(lengths))
    ]
    rows[rows.index(next(index for index in rows if index.request == 3)) + 1 :] += more
    rows.sort(key=lambda index: (index.request, index.token))
    lengths += [index.length for index in more]
    layer = dataclasses.replace(layer, query=2 * torch.randn(len(lengths), *layer.query.shape[1:]))
    rows.insert(3, RowIndex(0, 0, 0, KEPT_PAGES))  # padding
    other = dataclasses.replace(layer, query=torch.randn_like(layer.query))
    config, counters, chosen = settings(budget, policy), Counters(), Chosen()
    arguments = rows, chosen, counters
    output = torch.full_like(layer.query, math.nan)
    if policy not in SELF_SELECTING:
        with pytest.raises(RuntimeError, match="before any selection layer"):
            decode_rows(make_policy(config), Role.SPARSE, layer, *arguments, output)
        decode_rows(make_policy(config), Role.SELECTION, other, *arguments, output)
        for index in rows:
            if index.length:
                row = double_row(other, index)
                np.testing.assert_allclose(
                    output[index.token].numpy(), masked_attention(row, True), atol=1e-5, rtol=1e-4
                )
    output.fill_(math.nan)
    decode_rows(make_policy(config), Role.SPARSE, layer, *arguments, output, recall_layer=3)

    attended, mass = 0, 0.0
    for index in rows:
        if not index.length:
            continue
        row = double_row(layer, index)
        chooser = row if policy in SELF_SELECTING else double_row(other, index)
        mask = np.ones((4, index.length), dtype=bool)
        if index.length > budget.budget and index.kept_pages != ALL_PAGES:
            mask = MASKS[policy](mask_row(chooser), budget)
            attended += -(-index.length // page) if policy == "quest" else 0
        attended += mask[0].sum()
        mass += 0 if index.kept_pages == ALL_PAGES else (mask_row(row).probabilities * mask).sum() / 4
        np.testing.assert_allclose(
            output[index.token].numpy(), masked_attention(row, mask), atol=1e-5, rtol=1e-4
        )
    counts = counters.as_dict()
    assert counts["layers"]["sparse"] == {
        "rows": len(lengths),
        "attended_tokens": attended,
        "context_tokens": sum(lengths),
    }
    selecting = counts["layers"]["selection"]
    assert selecting["rows"] == (0 if policy in SELF_SELECTING else len(lengths))
    assert selecting["attended_tokens"] == selecting["context_tokens"]
    assert (counts["dense_rows"]["within_budget"], counts["dense_rows"]["prefill"]) == (4, 1)
    assert counts["recall"] == {3: {"rows": len(lengths) - 1, "mass": pytest.approx(mass, abs=1e-5)}}


@pytest.mark.parametrize("policy", COMPARISONS)
def test_budget_of_the_context_keeps_everything(policy):
    torch.manual_seed(6)
    budget = Budget(budget=208, recent=32, sink=16, page=16)
    layer, rows = paged_layer([1, 100, 208, 207])
    chosen, counters = Chosen(), Counters()
    roles = [Role.SPARSE] if policy in SELF_SELECTING else [Role.SELECTION, Role.SPARSE]
    for role in roles:
        output = torch.full_like(layer.query, math.nan)
        arguments = layer, rows, chosen, counters, output, 2
        decode_rows(make_policy(settings(budget, policy)), role, *arguments)
        for index in rows:
            expected = masked_attention(double_row(layer, index), True)
            np.testing.assert_allclose(output[index.token].numpy(), expected, atol=1e-5, rtol=1e-4)
    counts = counters.as_dict()
    assert counts["attended_tokens"] == counts["context_tokens"] == 516 * len(roles)
    assert counts["dense_rows"]["within_budget"] == 4
    assert counts["recall"] == {2: {"rows": 4, "mass": 4.0}}


def test_quantised_cache():
    """Keys, values and the query come with factors."""
    torch.manual_seed(3)
    layer, rows = paged_layer([40])
    scales = torch.tensor([0.5, 3.0, 0.25]).unbind()
    parameters = dataclasses.replace(layer.parameters, scales=scales)
    scaled = dataclasses.replace(layer, parameters=parameters).rows(rows)
    plain = layer.rows(rows)
    assert torch.equal(scaled.queries, plain.queries * 0.5)
    assert torch.equal(scaled.keys, plain.keys * 3.0)
    assert torch.equal(scaled.values, plain.values * 0.25)


# --- inside vLLM -----------------------------------------------------------------------------------

SMALL = Budget(budget=128, recent=32, sink=16, page=16)
FULL_LAYERS, SELECTION_LAYERS, LAYERS = 1, (1, 4), 8
PROMPTS, STEPS, SAMPLE_STEPS = (40, 600, 120), 14, 3


class PolicyMasks:
    """What `logprobs_with_choices` asks, and the mass that each sparse layer's rows keep."""

    def __init__(self, policy, prompt_len, length):
        self.policy, self.prompt_len, self.length = policy, prompt_len, length
        self.mask = None
        self.mass = {}  # (layer, row) to the mass

    def __call__(self, layer, query, key, probabilities):
        own = self.policy in SELF_SELECTING
        if layer < FULL_LAYERS:
            return None
        if own or layer in SELECTION_LAYERS:
            self.mask = torch.ones(len(query), self.length, self.length, dtype=torch.bool)
            for row in range(self.prompt_len, self.length):
                if row + 1 > SMALL.budget:
                    seen = key[:, : row + 1], probabilities[:, row, : row + 1]
                    self.mask[:, row, : row + 1] = self.choose(query[:, row], *seen)
            if not own:
                return None
        for row in range(self.prompt_len, self.length):
            self.mass[layer, row] = (probabilities[:, row] * self.mask[:, row]).sum(-1).mean().item()
        return self.mask

    def choose(self, query, key, probabilities):
        logits = (key @ query[:, :, None])[:, :, 0].numpy() * query.shape[1] ** -0.5
        row = MaskRow(query.numpy(), key.numpy(), logits, probabilities.numpy(), 2)
        masks = {**MASKS, "delta": MASKS["oracle"]}
        return torch.from_numpy(masks[self.policy](row, SMALL))


def delta_settings(policy, sample_steps):
    return {
        "policy": policy,
        "full_layers": FULL_LAYERS,
        "selection_layers": list(SELECTION_LAYERS),
        "budget_tokens": SMALL.budget,
        "recent_tokens": SMALL.recent,
        "sink_tokens": SMALL.sink,
        "recall_sample_steps": sample_steps,
    }


def generate(model, sample_steps, options):
    """Under every policy, answers and counters, from one engine."""
    options = {"enable_prefix_caching": False, **options}
    results = {}
    for policy in POLICIES:
        engine = pool.get(model, "DELTA", delta_settings(policy, sample_steps), **options)
        results[policy] = engine.generate(make_prompts(), STEPS, logprobs=5), engine.counters()
    return results


def make_prompts():
    generator = random.Random(0)
    return [[generator.randrange(10, 500) for _ in range(length)] for length in PROMPTS]


def sparse_layers(policy):
    own = policy in SELF_SELECTING
    return [layer for layer in range(FULL_LAYERS, LAYERS) if own or layer not in SELECTION_LAYERS]


def compare_with_masks(model, policy, answers):
    """The distances of log-probabilities from the masks', and each sparse layer's mass by step."""
    distances, mass = [], np.zeros((LAYERS, STEPS))
    for prompt, answer in zip(make_prompts(), answers, strict=True):
        masks = PolicyMasks(policy, len(prompt), len(prompt) + STEPS - 1)
        expected = logprobs_with_choices(model, prompt, answer.tokens, masks)
        for step, logprobs in enumerate(answer.logprobs):
            for token, logprob in logprobs.items():
                distances.append(abs(logprob - expected[step, token].item()))
        for (layer, row), kept in masks.mass.items():
            mass[layer, row - len(prompt) + 1] += kept
    return distances, mass


@pytest.fixture(scope="module")
def results(tiny_model):
    return in_engine_process(generate, tiny_model, SAMPLE_STEPS, {})


@pytest.mark.parametrize("policy", POLICIES)
def test_answers_recall_and_counters(tiny_model, results, policy):
    """Next-token log-probabilities equal those of dense attention with the policy's tokens as a mask."""
    answers, counts = results[policy]
    distances, mass = compare_with_masks(tiny_model, policy, answers)
    assert max(distances) < 1e-4
    sampled = range(SAMPLE_STEPS, STEPS, SAMPLE_STEPS)
    assert counts["recall"] == {
        layer: {
            "rows": len(sampled) * len(PROMPTS),
            "mass": pytest.approx(mass[layer, sampled].sum(), abs=1e-3),
        }
        for layer in sparse_layers(policy)
    }
    check_counters(policy, counts)


def generate_from_the_start(model, policy):
    with start_engine(model, "DELTA", delta_settings(policy, SAMPLE_STEPS)) as engine:
        return engine.generate(make_prompts(), STEPS, logprobs=5), engine.counters()


def test_policy_of_the_settings(tiny_model, results):
    """Started with a policy, an engine does what it does when its settings are changed to it."""
    answers, counts = in_engine_process(generate_from_the_start, tiny_model, "quest")
    changed, changed_counts = results["quest"]
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in changed]
    recall, changed_recall = counts.pop("recall"), changed_counts["recall"]
    assert counts == {key: value for key, value in changed_counts.items() if key != "recall"}
    assert recall == {layer: pytest.approx(sums) for layer, sums in changed_recall.items()}


def generate_on_a_gpu(model):
    """As `generate`; graphs are captured for the settings of the start, which need Python."""
    options = {"dtype": "float16", "enforce_eager": False, "kv_cache_memory_bytes": 1 << 28}
    options = {"enable_prefix_caching": False, **options}
    results = {}
    with start_engine(model, "DELTA", delta_settings("delta", 1), **options) as engine:
        for policy in POLICIES:
            engine.llm.collective_rpc(use_settings, args=(delta_settings(policy, 1),))
            results[policy] = engine.generate(make_prompts(), STEPS, logprobs=5), engine.counters()
    return results


@pytest.fixture(scope="module")
def gpu_results(tiny_model):
    return in_engine_process(generate_on_a_gpu, tiny_model)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_answers_recall_and_counters_on_a_gpu(tiny_model, gpu_results, policy):
    """The same in float16, with piecewise CUDA graphs; rounding moves a few choices."""
    answers, counts = gpu_results[policy]
    distances, mass = compare_with_masks(tiny_model, policy, answers)
    assert np.median(distances) < 0.05
    for layer in sparse_layers(policy):
        recall = counts["recall"][layer]
        assert recall["rows"] == (STEPS - 1) * len(PROMPTS)
        assert recall["mass"] == pytest.approx(mass[layer].sum(), rel=0.02)
    check_counters(policy, counts)


def check_counters(policy, counts):
    num_sparse = len(sparse_layers(policy))
    lengths = [length + step for length in PROMPTS for step in range(1, STEPS)]
    layers = counts["layers"]
    for role, number in (("full", 1), ("selection", LAYERS - 1 - num_sparse), ("sparse", num_sparse)):
        assert layers[role]["rows"] == number * len(lengths)
        assert layers[role]["context_tokens"] == number * sum(lengths)
        if role != "sparse":
            assert layers[role]["attended_tokens"] == layers[role]["context_tokens"]
    kept = 0
    for length in lengths:
        partial = -length % SMALL.page if policy in ("delta", "oracle", "quest") else 0
        kept += length if length <= SMALL.budget else SMALL.budget - partial
        kept += -(-length // SMALL.page) if policy == "quest" and length > SMALL.budget else 0
    assert layers["sparse"]["attended_tokens"] == num_sparse * kept
    short = sum(length <= SMALL.budget for length in lengths)
    assert counts["dense_rows"]["within_budget"] == num_sparse * short
