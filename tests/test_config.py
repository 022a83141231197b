"""Settings: defaults, parsing and what is refused."""

import pytest

from vllm_delta.method.config import DeltaConfig, DeltaConfigError


def parse(settings):
    return DeltaConfig.from_additional_config({"delta": settings})


def test_defaults_are_the_documented_ones():
    assert parse({}) == DeltaConfig(
        full_layers=2,
        selection_layers="auto",
        budget_tokens=2048,
        recent_tokens=128,
        sink_tokens=16,
        page_size=16,
        policy="delta",
        calibrate="never",
        recall_sample_steps=0,
    )


@pytest.mark.parametrize("additional_config", [None, {}, {"other": 1}])
def test_no_settings_means_defaults(additional_config):
    assert DeltaConfig.from_additional_config(additional_config) == DeltaConfig()


def test_all_keys_are_taken():
    config = parse(
        {
            "full_layers": 1,
            "selection_layers": [1, 5],
            "budget_tokens": 256,
            "recent_tokens": 64,
            "sink_tokens": 0,
            "page_size": 32,
            "policy": "quest",
            "calibrate": "auto",
            "recall_sample_steps": 100,
        }
    )
    others = {"policy": "quest", "calibrate": "auto", "recall_sample_steps": 100}
    assert config == DeltaConfig(1, (1, 5), 256, 64, 0, 32, **others)
    assert (config.budget_pages, config.recent_pages, config.sink_pages) == (8, 2, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 1}, r"delta\.budget is not a setting; accepted: full_layers, .*page_size"),
        ({"budget_tokens": "2048"}, r"delta\.budget_tokens must be an integer"),
        ({"budget_tokens": 2048.0}, r"delta\.budget_tokens must be an integer"),
        ({"budget_tokens": True}, r"delta\.budget_tokens must be an integer"),
        ({"budget_tokens": None}, r"delta\.budget_tokens must be an integer"),
        ({"budget_tokens": 0}, r"delta\.budget_tokens must be an integer of at least 1"),
        ({"full_layers": -1}, r"delta\.full_layers must be an integer of at least 0"),
        ({"sink_tokens": -16}, r"delta\.sink_tokens must be an integer of at least 0"),
        ({"page_size": 0}, r"delta\.page_size must be an integer of at least 1"),
        ({"policy": "h2o"}, r"delta\.policy must be one of delta, quest, .*oracle, not 'h2o'"),
        ({"policy": ["quest"]}, r"delta\.policy must be one of delta, quest, "),
        ({"policy": None}, r"delta\.policy must be one of delta, quest, "),
        ({"calibrate": "always"}, r"delta\.calibrate must be one of never, auto, not 'always'"),
        ({"calibrate": True}, r"delta\.calibrate must be one of never, auto, not True"),
        ({"recall_sample_steps": -1}, r"delta\.recall_sample_steps must be an integer of at least 0"),
        ({"recall_sample_steps": 0.5}, r"delta\.recall_sample_steps must be an integer of at least 0"),
        ({"budget_tokens": 1000}, r"delta\.budget_tokens must be a multiple of delta\.page_size"),
        ({"recent_tokens": 100}, r"delta\.recent_tokens must be a multiple of delta\.page_size"),
        ({"sink_tokens": 8}, r"delta\.sink_tokens must be a multiple of delta\.page_size"),
        ({"page_size": 32}, r"delta\.sink_tokens must be a multiple of delta\.page_size \(32\)"),
        ({"budget_tokens": 128}, r"delta\.budget_tokens \(128\) must be at least .*128 \+ 16"),
        ({"selection_layers": "all"}, r'delta\.selection_layers must be "auto" or a list'),
        ({"selection_layers": 3}, r'delta\.selection_layers must be "auto" or a list'),
        ({"selection_layers": [2, "14"]}, r'delta\.selection_layers must be "auto" or a list'),
        ({"selection_layers": [2, True]}, r'delta\.selection_layers must be "auto" or a list'),
        ({"selection_layers": [2, 2]}, r"delta\.selection_layers must name each layer once"),
        ([], r'"delta" must be an object'),
        (None, r'"delta" must be an object'),
    ],
)
def test_refused(settings, message):
    with pytest.raises(DeltaConfigError, match=message):
        parse(settings)


def test_budget_may_be_all_recent_and_sink():
    assert parse({"budget_tokens": 144}).budget_pages == 9


def test_policies_and_recall_need_python():
    assert parse({}).runs_kernels_alone
    assert not parse({"policy": "oracle"}).runs_kernels_alone
    assert not parse({"recall_sample_steps": 10}).runs_kernels_alone


def test_a_budget_above_the_context_takes_no_more_pages_than_the_context():
    """And so no more memory, whatever the number; with a partial page at the end."""
    assert DeltaConfig(budget_tokens=1 << 24).most_kept_pages(1000) == 63
    assert DeltaConfig(budget_tokens=512).most_kept_pages(1000) == 32
