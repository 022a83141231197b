"""Which layers may be sparse is asked of the layers that vLLM has built; weights are read as they are now."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import in_engine_process, in_fresh_process
from engines import start_engine
from odd_models import build_gpt_oss, build_llama4, build_nemotron_nas
from vllm.model_executor.layers.attention import Attention

from vllm_delta.integration import layers
from vllm_delta.integration.layers import DeltaLayer, local_layers
from vllm_delta.integration.validation import declared_layers
from vllm_delta.method.config import DeltaConfig, DeltaConfigError
from vllm_delta.method.plan import Role, make_plan

PROMPTS = [[(7 * i * i + length) % 500 + 5 for i in range(length)] for length in (16, 97, 300)]
SMALL = {"budget_tokens": 64, "recent_tokens": 32, "sink_tokens": 16}


def answers(model, backend, delta=None, **options):
    options = {"skip_tokenizer_init": True, "max_model_len": 1024, **options}
    with start_engine(model, backend, delta, **options) as engine:
        tokens = [answer.tokens for answer in engine.generate(PROMPTS, 12)]
        return tokens, engine.counters() if backend == "DELTA" else {}


NAS = {"trust_remote_code": True}


@pytest.fixture(scope="module")
def nemotron_nas(tmp_path_factory):
    return build_nemotron_nas(tmp_path_factory.mktemp("models") / "nas", without_attention=(2, 5))


def run(model, backend, delta=None, options=()):
    return in_engine_process(answers_of, model, backend, delta, dict(options))


def answers_of(model, backend, delta, options):
    return answers(model, backend, delta, **options)


def rows_of(counts):
    """Rows of each role, in units of the decode rows of one layer."""
    return {role: layer["rows"] / (11 * len(PROMPTS)) for role, layer in counts["layers"].items()}


def test_layers_without_attention(nemotron_nas):
    """Layers 2 and 5 have none: the rule counts the others, and settings may name the others."""
    dense, _ = run(nemotron_nas, "CPU_ATTN", None, NAS)
    delta, counts = run(nemotron_nas, "DELTA", None, NAS)
    assert delta == dense
    assert rows_of(counts) == {"full": 2, "selection": 1, "sparse": 3}
    named = {**SMALL, "full_layers": 2, "selection_layers": [3, 6]}
    _, counts = run(nemotron_nas, "DELTA", named, NAS)
    assert rows_of(counts) == {"full": 2, "selection": 2, "sparse": 2}
    assert counts["layers"]["sparse"]["attended_tokens"] < counts["layers"]["sparse"]["context_tokens"]


def refuse_layer_two(model):
    with pytest.raises(DeltaConfigError, match="layer 2 does not run full attention; accepted: 3-4, 6-7"):
        answers(model, "DELTA", {"full_layers": 2, "selection_layers": [2, 6]}, **NAS)


def test_a_layer_without_attention_cannot_select(nemotron_nas):
    in_engine_process(refuse_layer_two, nemotron_nas)


def test_pipeline_ranks_know_each_others_layers(nemotron_nas):
    """Layers 0 to 3 and 4 to 7: each rank's part of one plan, as one rank has it."""
    named = {**SMALL, "full_layers": 1, "selection_layers": [1, 6]}
    one, one_counts = run(nemotron_nas, "DELTA", named, NAS)
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}
    # Without compilation, vLLM leaves out a first run on CPUs that pipelines need.
    ranks = {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": {"backend": "eager"}}
    two, two_counts = in_fresh_process(answers_of, nemotron_nas, "DELTA", named, {**NAS, **ranks}, **env)
    # The second rank has no selection to read at layer 4, and selects there.
    assert rows_of(one_counts) == {"full": 1, "selection": 2, "sparse": 3}
    assert rows_of(two_counts) == {"full": 1, "selection": 3, "sparse": 2}
    assert [len(answer) for answer in two] == [len(answer) for answer in one]


def test_chunked_layers_are_vllms(tmp_path):
    """Llama 4's layers with chunks are batches of their own; the others run DELTA."""
    model = build_llama4(tmp_path / "llama4")
    dense, _ = run(model, "CPU_ATTN", None, {"block_size": 32})
    delta, counts = run(model, "DELTA", {"full_layers": 0, "selection_layers": [3]})
    assert delta == dense
    assert rows_of(counts) == {"full": 0, "selection": 1, "sparse": 1}
    assert counts["dense_rows"]["not_eligible"] == 6 * sum(len(prompt) + 11 for prompt in PROMPTS)
    sparse = {**SMALL, "full_layers": 0, "selection_layers": [3]}
    _, counts = run(model, "DELTA", sparse)
    assert counts["layers"]["sparse"]["attended_tokens"] < counts["layers"]["sparse"]["context_tokens"]


def load_sinks(worker):
    """As trainers do between rollouts."""
    generator = torch.Generator().manual_seed(2)
    weights = [
        (f"model.layers.{layer}.self_attn.sinks", 3 + 2 * torch.randn(8, generator=generator))
        for layer in range(8)
    ]
    worker.model_runner.get_model().load_weights(weights)


def answers_with_new_sinks(model, backend, first):
    """Answers after new sinks were loaded, into an engine that has answered before or one that has not."""
    options = {"dtype": "bfloat16", "skip_tokenizer_init": True, "max_model_len": 1024}
    with start_engine(model, backend, {"full_layers": 1, **SMALL}, **options) as engine:
        old = [answer.tokens for answer in engine.generate(PROMPTS, 12)] if first else None
        engine.llm.collective_rpc(load_sinks)
        engine.llm.reset_prefix_cache()
        return old, [answer.tokens for answer in engine.generate(PROMPTS, 12)]


def test_sinks_that_are_loaded_later_are_used(tmp_path):
    model = build_gpt_oss(tmp_path / "gpt-oss")
    old, after = in_engine_process(answers_with_new_sinks, model, "DELTA", True)
    _, fresh = in_engine_process(answers_with_new_sinks, model, "DELTA", False)
    assert after == fresh
    assert after != old, "the new sinks change nothing, so that this shows nothing"


# --- without an engine ---------------------------------------------------------------------------------


class Impl(DeltaLayer):
    """The attention of a layer that DELTA runs."""

    def __init__(self, window: int = -1) -> None:
        self.sliding_window = window


def built(name: str, impl: object, kind: type = Attention, **attributes: object) -> Attention:
    layer = object.__new__(kind)
    for key, value in {"layer_name": name, "impl": impl, **attributes}.items():
        object.__setattr__(layer, key, value)
    return layer


def config_of(*of_worker: Attention, num_layers: int = 8, ranks: int = 1) -> SimpleNamespace:
    """As much of vLLM's configuration as is asked for the layers of a worker."""
    text = SimpleNamespace(model_type="odd", hidden_size=64, layer_types=None, sliding_window=None)
    model = SimpleNamespace(
        hf_text_config=text,
        get_total_num_hidden_layers=lambda: num_layers,
        is_hybrid=True,
        has_noops=False,
        is_attention_free=False,
    )
    return SimpleNamespace(
        compilation_config=SimpleNamespace(
            static_forward_context={layer.layer_name: layer for layer in of_worker}
        ),
        model_config=model,
        parallel_config=SimpleNamespace(pipeline_parallel_size=ranks, worker_cls="some.Worker"),
    )


def attention(index: int, window: int = -1) -> Attention:
    return built(f"model.layers.{index}.attn", Impl(window))


class ChunkedAttention(Attention):
    """Another kind of vLLM's, built on `Attention`."""


def test_a_hybrid_model_is_planned_by_its_attention_layers():
    """Configurations spell recurrent layers in many ways; they are no attention layers once built."""
    local = local_layers(DeltaConfig(), config_of(*map(attention, (1, 3, 5, 7))))
    assert local.plan.layers(Role.FULL) == [1, 3]
    assert local.plan.layers(Role.SELECTION) == [5]
    assert local.plan.layers(Role.SPARSE) == [7]


def test_a_draft_models_layers_are_not_the_targets():
    draft = built("draft_model.model.layers.0.attn", Impl(), is_draft_layer=True)
    local = local_layers(DeltaConfig(), config_of(*map(attention, range(4)), draft))
    assert list(local.eligible) == [0, 1, 2, 3]
    assert local.eligible[0].layer_name == "model.layers.0.attn"


def test_other_kinds_and_windows_are_not_eligible():
    chunked = built("model.layers.1.attn", Impl(), ChunkedAttention)
    config = config_of(attention(0), chunked, attention(2, window=128), attention(3), built("x.4", object()))
    local = local_layers(DeltaConfig(), config)
    assert list(local.eligible) == [0, 3]
    assert len(local.layers) == 4


def test_two_stacks_of_layers_are_refused():
    other = built("talker.model.layers.1.attn", Impl())
    with pytest.raises(DeltaConfigError, match=r"model\.layers\.1\.attn and talker\.model\.layers\.1\.attn"):
        local_layers(DeltaConfig(), config_of(attention(0), attention(1), other))


def test_a_model_without_full_attention_is_refused():
    with pytest.raises(DeltaConfigError, match="a model that has no layer with full attention"):
        local_layers(DeltaConfig(), config_of(attention(0, window=64)))


@pytest.mark.parametrize(
    ("local", "roles"),
    [
        ((0, 1, 3), {0: "full", 1: "full", 3: "selection"}),
        ((4, 6, 7), {4: "selection", 6: "selection", 7: "sparse"}),
        ((), {}),
    ],
    ids=str,
)
def test_a_pipeline_rank_has_its_part_of_the_plan(monkeypatch, local, roles):
    """Also one that has no layer with full attention, which has nothing to do."""
    config = config_of(*map(attention, local), attention(2, window=64), ranks=2)
    group = SimpleNamespace(world_size=2, cpu_group=None)
    monkeypatch.setattr(layers, "get_pp_group", lambda: group)

    def all_gather(of_ranks, mine, group):
        of_ranks[:] = [mine, sorted({0, 1, 3, 4, 6, 7} - set(mine))]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather)
    layers.exchange_layers(config)
    chosen = DeltaConfig(full_layers=2, selection_layers=(3, 6))
    assert local_layers(chosen, config).plan.roles == roles


def test_a_rule_of_thumb_is_named_one(monkeypatch):
    """Whose answers may suffer should hear of it; not where layers were chosen, or none is sparse."""
    warned = []
    monkeypatch.setattr(layers, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(layers.logger, "warning", lambda text: warned.append(text))
    for config, expected in (
        (DeltaConfig(), 1),
        (DeltaConfig(selection_layers=(2, 5)), 0),
        (DeltaConfig(full_layers=12), 0),
        (DeltaConfig(policy="quest"), 0),
    ):
        warned.clear()
        state = SimpleNamespace(config=config, plan=make_plan(config, range(12), 12), nbytes=0, drafting=None)
        layers.report_plan(state)
        assert len(warned) == expected, config
        assert all("`vllm-delta calibrate MODEL`" in text for text in warned)


def test_ranks_that_cannot_know_each_others_layers_are_refused():
    with pytest.raises(DeltaConfigError, match=r"--worker-cls some\.Worker with --pipeline-parallel-size"):
        local_layers(DeltaConfig(), config_of(attention(0), ranks=2))


@pytest.mark.parametrize(
    ("text", "model", "expected"),
    [
        ({}, {"is_hybrid": False}, [0, 1, 2, 3]),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, {}, [0, 2]),
        ({"layer_types": ["full_attention", "linear_attention"] * 2}, {}, [0, 2]),
        ({"layer_types": ["attention", "hybrid"] * 2}, {}, None),
        ({"layer_types": ["full_attention"] * 3}, {}, None),
        ({}, {"is_hybrid": True}, None),
        ({}, {"is_hybrid": False, "has_noops": True}, None),
        ({"sliding_window": 128}, {"is_hybrid": False}, None),
    ],
    ids=str,
)
def test_what_a_configuration_says_of_layers(text, model, expected):
    """It only serves to refuse wrong settings early; what is not sure is left to the built layers."""
    config = config_of(num_layers=4).model_config
    vars(config.hf_text_config).update(text)
    vars(config).update(model)
    assert declared_layers(config) == expected
