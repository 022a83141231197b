"""Which layer gets which role."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_delta.method.config import DeltaConfig, DeltaConfigError
from vllm_delta.method.plan import PRESETS, Role, make_plan


def plan_of(num_layers, model=None, eligible=None, **settings):
    eligible = range(num_layers) if eligible is None else eligible
    return make_plan(DeltaConfig(**settings), list(eligible), num_layers, model)


@pytest.mark.parametrize(("model", "selection"), PRESETS.items())
def test_presets(model, selection):
    plan = plan_of(model[1], model)
    assert plan.layers(Role.FULL) == [0, 1]
    assert plan.layers(Role.SELECTION) == list(selection)
    assert plan.source == "preset"


def test_preset_follows_full_layers():
    assert plan_of(28, ("qwen2", 28, 1536), full_layers=4).layers(Role.SELECTION) == [4, 14, 22]


@pytest.mark.parametrize(
    ("num_layers", "selection"),
    [
        (1, []),
        (2, []),
        (3, [2]),
        (4, [2]),
        (5, [2]),
        (6, [2]),
        (8, [2, 4, 6]),
        (12, [2, 6, 10]),
        (28, [2, 14, 22]),
        (36, [2, 18, 29]),
        (48, [2, 24, 38]),
        (80, [2, 40, 64]),
    ],
)
def test_rule(num_layers, selection):
    plan = plan_of(num_layers)
    assert plan.layers(Role.SELECTION) == selection
    assert plan.source == "rule"


@given(num_layers=st.integers(1, 130), full_layers=st.integers(0, 130))
def test_rule_is_always_valid(num_layers, full_layers):
    """Every sparse layer has a selection to read, and no selection layer after the first is idle."""
    full_layers = min(full_layers, num_layers)
    roles = plan_of(num_layers, full_layers=full_layers).roles
    assert list(roles) == list(range(num_layers))
    assert all(roles[layer] is Role.FULL for layer in range(full_layers))
    selected = False
    for layer in range(full_layers, num_layers):
        assert roles[layer] is not Role.FULL
        selected = selected or roles[layer] is Role.SELECTION
        assert selected
        if roles[layer] is Role.SELECTION and layer > full_layers:
            assert roles[layer - 1] is Role.SPARSE
            assert roles[layer + 1] is Role.SPARSE


def test_sliding_window_layers_have_no_role():
    eligible = [5, 11, 17, 23, 29]
    plan = plan_of(34, eligible=eligible, full_layers=1)
    assert list(plan.roles) == eligible
    assert plan.layers(Role.FULL) == [5]
    assert plan.layers(Role.SELECTION) == [11]


def test_explicit_layers():
    plan = plan_of(8, selection_layers=(5, 2))
    assert plan.layers(Role.SELECTION) == [2, 5]
    assert plan.layers(Role.SPARSE) == [3, 4, 6, 7]
    assert plan.source == "settings"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection_layers": (2, 8)}, "8 is out of range; the model's layers are 0 to 7"),
        ({"selection_layers": (-1, 2)}, "-1 is out of range"),
        ({"selection_layers": (1, 2)}, r"layer 1 is one of the first .* accepted: 2-7"),
        ({"selection_layers": (4,)}, "must include layer 2, the first one after the full layers"),
        ({"selection_layers": ()}, "must include layer 2"),
        ({"full_layers": 9}, "delta.full_layers must be at most the model's 8 layers"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(DeltaConfigError, match=message):
        plan_of(8, **settings)


def test_selection_layer_that_runs_no_full_attention_is_refused():
    with pytest.raises(DeltaConfigError, match="layer 3 does not run full attention; accepted: 4, 6"):
        plan_of(8, eligible=[0, 2, 4, 6], selection_layers=(3,))


def test_pipeline_rank_gets_a_selection_of_its_own():
    plan = plan_of(28)
    first, second = plan.for_rank(range(10)), plan.for_rank(range(10, 28))
    assert first.layers(Role.SELECTION) == [2]
    assert second.layers(Role.SELECTION) == [10, 14, 22]
    assert second.layers(Role.FULL) == []


@pytest.mark.parametrize("policy", ["quest", "streaming", "oracle"])
def test_policies_that_choose_in_every_layer(policy):
    """Selection layers of the settings are not theirs; a pipeline rank needs none."""
    plan = plan_of(8, policy=policy, selection_layers=(4,), full_layers=1)
    assert plan.layers(Role.FULL) == [0]
    assert plan.layers(Role.SPARSE) == list(range(1, 8))
    assert plan.for_rank(range(4, 8)).layers(Role.SPARSE) == [4, 5, 6, 7]
    assert plan.describe() == (
        f"policy {policy}, for comparison: 1 full 0, 0 selection, 7 sparse 1-7 "
        "(each sparse layer selects for itself)"
    )


@pytest.mark.parametrize("policy", ["lessismore", "tidal"])
def test_policies_with_two_selection_layers(policy):
    assert plan_of(36, policy=policy).layers(Role.SELECTION) == [2, 18]
    assert plan_of(28, ("qwen2", 28, 1536), policy=policy).layers(Role.SELECTION) == [2, 14]
    assert plan_of(4, policy=policy).layers(Role.SELECTION) == [2]
    chosen = plan_of(8, policy=policy, selection_layers=(2, 3, 6))
    assert chosen.layers(Role.SELECTION) == [2, 3, 6]
    assert chosen.for_rank(range(4, 8)).layers(Role.SELECTION) == [4, 6]
    assert chosen.describe().startswith(f"policy {policy}, for comparison: 2 full 0-1, 3 selection 2-3, 6, ")


def test_description():
    assert plan_of(8, full_layers=1, selection_layers=(1, 4)).describe() == (
        "1 full 0, 2 selection 1, 4, 5 sparse 2-3, 5-7 (selection layers from settings)"
    )
