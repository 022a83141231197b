"""The probe of a model at its start: attention, hits, and the plan that it makes; alone and inside vLLM."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import in_engine_process, in_fresh_process
from engines import start_engine
from induction_model import LAYERS, RETRIEVES, build_induction_model
from torch.nn.functional import scaled_dot_product_attention

from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.plan import LOOKS_UP, Role, make_plan, probed_settings
from vllm_delta.plain.probe import PERIOD, RECENT, SEQUENCES, SINKS, causal_attention, probe_tokens

COUNT = 2 * PERIOD


def test_sequences_come_twice():
    tokens = probe_tokens(1000)
    assert tokens.shape == (SEQUENCES, COUNT)
    assert torch.equal(tokens[:, :PERIOD], tokens[:, PERIOD:])
    assert int(tokens.min()) >= 100 and int(tokens.max()) < 900, "special tokens are mostly at the ends"
    assert torch.equal(tokens, probe_tokens(1000)), "every rank has the same ones"
    assert probe_tokens(3).max() < 3


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_attention(window, sinks, softcap):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(COUNT, 6, 16, generator=generator)
    key, value = (torch.randn(COUNT, 2, 16, generator=generator) for _ in range(2))
    logits_of_sinks = torch.randn(6, generator=generator) if sinks else None
    output, _ = causal_attention(
        query, key, value, AttentionParameters(0.3, softcap, logits_of_sinks), window=window
    )
    place = torch.arange(COUNT)
    seen = (place <= place[:, None]) & (place > place[:, None] - (window or COUNT))
    if not softcap and not sinks:
        heads = [part.transpose(0, 1) for part in (query, key, value)]
        expected = scaled_dot_product_attention(*heads, seen, scale=0.3, enable_gqa=True).transpose(0, 1)
        torch.testing.assert_close(output, expected)
    logits = 0.3 * torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(3, 1)).double()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    weights = logits.exp() * seen
    total = weights.sum(-1) + (logits_of_sinks.double().exp()[:, None] if sinks else 0)
    expected = torch.einsum(
        "hqk,khd->qhd", weights / total[..., None], value.repeat_interleave(3, 1).double()
    )
    torch.testing.assert_close(output, expected.float())


def test_hits():
    """Heads that look at the same token before, at the one behind it, at their own place, and anywhere."""
    codes = torch.randn(PERIOD, 64, generator=torch.Generator().manual_seed(2)).sign().repeat(2, 1)
    behind = codes.roll(1, 0)
    anywhere = torch.randn(COUNT, 64, generator=torch.Generator().manual_seed(3))
    query = torch.stack([codes, codes, codes, anywhere], 1)
    key = torch.stack([codes, behind, -codes, codes], 1)
    _, hits = causal_attention(query, key, key, AttentionParameters(1.0))
    first, rows = SINKS, PERIOD - 1
    assert hits[0] == pytest.approx(1 - first / rows), "the first tokens do not count"
    assert hits[1] == pytest.approx(1 - (first - 1) / rows)
    assert max(hits[2:]) < 0.05
    assert RECENT < PERIOD


def rule_of(config, depth):
    plan = make_plan(config, range(depth), depth)
    return len(plan.layers(Role.FULL)) + len(plan.layers(Role.SELECTION))


def passes_of(hits, full_layers=None, depth=12):
    """The passes that a probe leads to; `hits` are those of layers that have some."""
    shares = {layer: hits.get(layer, 0.1) for layer in range(depth)}
    given = {} if full_layers is None else {"full_layers": full_layers}
    number = rule_of(DeltaConfig(**given), depth)
    config = probed_settings(DeltaConfig(**given), shares, number, keeps_full_layers=bool(given))
    if config is None:
        return None
    plan = make_plan(config, sorted(shares), len(shares))
    passes = tuple(plan.layers(Role.FULL) + plan.layers(Role.SELECTION))
    assert len(passes) == number, "as many as the rule of thumb has"
    return passes


@pytest.mark.parametrize(
    ("hits", "options", "passes"),
    [
        pytest.param({}, {}, None, id="nothing looks things up"),
        pytest.param({0: 0.9, 2: 0.9}, {}, None, id="nothing behind the first ones does"),
        pytest.param({4: 0.9, 10: 0.7}, {}, (0, 1, 2, 4, 10), id="early layers fill up"),
        pytest.param({4: 0.7, 5: 0.9, 9: LOOKS_UP, 10: 0.9}, {}, (0, 1, 2, 4, 10), id="runs"),
        pytest.param({4: 0.7, 8: 0.903, 9: 0.904}, {}, (0, 1, 2, 4, 8), id="what is nearly equal is equal"),
        pytest.param({4: 0.9, 10: LOOKS_UP - 0.01}, {}, (0, 1, 2, 3, 4), id="too few hits"),
        pytest.param({3: 1, 5: 1, 7: 1, 9: 1}, {}, (0, 2, 3, 5, 7), id="the first runs count"),
        pytest.param({5: 1, 6: 1, 7: 1, 8: 1}, {}, (0, 1, 2, 5, 7), id="a long run is cut"),
        pytest.param({4: 1, 6: 1, 8: 1}, {"full_layers": 2}, (0, 1, 2, 4, 6), id="full layers were chosen"),
        pytest.param({4: 1, 6: 1}, {"full_layers": 0}, (0, 4, 6), id="none were chosen"),
        pytest.param({8: 1}, {"full_layers": 6}, (0, 1, 2, 3, 4, 5, 6, 8), id="many were chosen"),
        pytest.param({8: 1}, {"full_layers": 12}, None, id="all are full"),
        pytest.param({3: 1}, {"depth": 4}, (0, 2, 3), id="few layers"),
        pytest.param(
            {2: 0.55, 7: 0.7, 8: 0.91, 14: 0.89, 15: 0.91, 17: 0.93, 18: 0.94, 20: 0.76, 23: 0.74, 24: 0.59},
            {"depth": 30},
            (0, 2, 7, 15, 18),
            id="a real model",
        ),
    ],
)
def test_plans(hits, options, passes):
    assert passes_of(hits, **options) == passes


@pytest.mark.parametrize("seed", range(300))
def test_any_hits_make_a_plan(seed):
    draw = random.Random(seed)
    eligible = sorted(draw.sample(range(80), draw.randrange(1, 60)))
    hits = {layer: draw.random() ** draw.choice([0.3, 1, 3]) for layer in eligible}
    full_layers, number = draw.randrange(0, 12), draw.randrange(1, 9)
    keeps = draw.random() < 0.5
    config = probed_settings(DeltaConfig(full_layers=full_layers), hits, number, keeps_full_layers=keeps)
    if config is None:
        return
    plan = make_plan(config, eligible, 80)
    passes = plan.layers(Role.FULL) + plan.layers(Role.SELECTION)
    assert passes[0] == eligible[0]
    assert len(passes) <= max(number, 3, full_layers + 2 if keeps else 0)
    assert max(hits[layer] for layer in passes) >= LOOKS_UP - 0.005


def plan_of(worker):
    from vllm_delta.integration.layers import find_state

    plan = find_state(worker.vllm_config).plan
    return plan.source, {str(role): plan.layers(role) for role in Role}


def started(model, delta, options):
    with start_engine(model, "DELTA", delta, skip_tokenizer_init=True, **options) as engine:
        (plan,) = engine.llm.collective_rpc(plan_of)
        counts = engine.counters()
        (answer,) = engine.generate([list(range(20, 60)) * 2], 12)
        return plan, counts["context_tokens"], answer.tokens


SMALL = {"budget_tokens": 64, "recent_tokens": 16, "sink_tokens": 16}


@pytest.fixture(scope="module")
def induction_model(tmp_path_factory):
    return build_induction_model(tmp_path_factory.mktemp("models") / "induction")


@pytest.mark.parametrize(
    ("delta", "options", "source", "selects"),
    [
        pytest.param(SMALL, {}, "probe", True, id="by default"),
        pytest.param(SMALL | {"full_layers": 1}, {}, "probe", True, id="full layers chosen"),
        pytest.param(SMALL, {"max_model_len": 500}, "rule", False, id="too short for a probe"),
        pytest.param(SMALL, {"max_num_batched_tokens": 256}, "rule", False, id="steps too short for one"),
        pytest.param(SMALL | {"selection_layers": [2, 4]}, {}, "settings", False, id="layers chosen"),
        pytest.param(SMALL | {"policy": "quest"}, {}, "rule", False, id="another policy"),
    ],
)
def test_a_start_finds_the_layer_that_looks_things_up(induction_model, delta, options, source, selects):
    (found, layers), counted, answer = in_engine_process(
        started, induction_model, delta, {"max_model_len": 1024} | options
    )
    assert found == source, layers
    assert (RETRIEVES in layers["selection"]) == selects
    assert sum(map(len, layers.values())) == LAYERS
    assert counted == 0, "what a probe computes is no step"
    if selects:
        assert answer == list(range(20, 32)), "the sequence goes on: what is looked up is found"


def test_a_model_that_looks_nothing_up_keeps_the_rule(tiny_model):
    (found, layers), *_ = in_engine_process(started, tiny_model, SMALL, {"max_model_len": 1024})
    assert found == "rule"
    assert layers["full"] == [0, 1] and layers["selection"] == [2, 4, 6]


def broken(model, delta):
    """A start where the model's forward wants more than tokens."""
    from unittest.mock import patch

    from vllm_delta.integration import probe_at_start

    with patch.object(probe_at_start, "_run", side_effect=TypeError("missing pixels")):
        return started(model, delta, {"max_model_len": 1024})


def test_a_model_that_cannot_be_probed_keeps_the_rule(induction_model):
    (found, _), *_ = in_engine_process(broken, induction_model, SMALL)
    assert found == "rule"


def two_ranks(model):
    options = {"skip_tokenizer_init": True, "max_model_len": 1024, "tensor_parallel_size": 2}
    with start_engine(model, "DELTA", SMALL, **options) as engine:
        (answer,) = engine.generate([list(range(20, 60)) * 2], 12)
        return answer.tokens, engine.counters()["layers"]


def test_ranks_agree_on_what_either_of_them_finds(induction_model):
    """One of the two has the head that looks things up."""
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}
    answer, layers = in_fresh_process(two_ranks, induction_model, **environment)
    assert answer == list(range(20, 32))
    assert layers["full"]["rows"] == 0, "as in a probe's plan, not in the rule's"
    assert layers["selection"]["rows"] / layers["sparse"]["rows"] == 5 / (LAYERS - 5)
