"""Calibration: the search and its rules, the file, and what the engine measures, against dense masks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ONE_THREAD, in_fresh_process
from dense_mask import logprobs_with_masks

from vllm_delta.calibration.file import CALIBRATION_FILE, with_calibrated_layers
from vllm_delta.calibration.search import (
    attended_share,
    join_passes,
    mass_rule,
    peak_rule,
    search,
    split_passes,
)
from vllm_delta.config import DeltaConfig, DeltaConfigError
from vllm_delta.gpu.ops import Selection
from vllm_delta.integration.calibration import Calibration, Distributions
from vllm_delta.plan import make_plan

LAYERS = [0, 2, 3, 5, 8, 9, 10, 13]  # of a model whose other layers have sliding windows


def subsets(number):
    return [(LAYERS[0], *rest) for rest in itertools.combinations(LAYERS[1:], number - 1)]


def test_passes_are_settings():
    assert split_passes((0, 2, 3, 8), LAYERS) == (2, (3, 8))
    assert split_passes((0, 8), LAYERS) == (0, (0, 8))
    assert split_passes(tuple(LAYERS), LAYERS) == (len(LAYERS), ())
    for passes in subsets(4):
        assert join_passes(*split_passes(passes, LAYERS), LAYERS) == passes
    with pytest.raises(ValueError, match="must begin with layer 0"):
        split_passes((2, 8), LAYERS)
    with pytest.raises(ValueError, match="eligible"):
        split_passes((0, 4), LAYERS)


def test_attended_share():
    assert attended_share((0, 2), LAYERS, 100, [50, 150]) == pytest.approx(2 / 8 + 6 / 8 * 150 / 200)


def test_search_finds_what_greed_alone_misses():
    """One layer is best alone and useless beside its neighbours, which are the best pair."""
    asked = []

    def loss(passes):
        asked.append(passes)
        return 5 - 2 * (8 in passes) - 1.5 * (5 in passes) - 3 * ({5, 9} <= set(passes)) + 0.01 * sum(passes)

    best = search(LAYERS, 3, loss)
    assert best == min(subsets(3), key=loss) == (0, 5, 9)
    assert search(LAYERS, 1, loss) == (0,)
    assert search(LAYERS, len(LAYERS), loss) == tuple(LAYERS)
    with pytest.raises(ValueError, match="1 to 8, not 9"):
        search(LAYERS, 9, loss)


def test_search_screens_and_asks_once():
    whole, cheap = [], []

    def loss(passes):
        whole.append(passes)
        return sum((layer - 9) ** 2 for layer in passes)

    def screen(passes):
        cheap.append(passes)
        return sum(abs(layer - 9) for layer in passes)

    assert search(LAYERS, 3, loss, screen) in ((0, 8, 9), (0, 9, 10))
    assert len(set(whole)) == len(whole) < len(cheap) == len(set(cheap))


@pytest.mark.parametrize("number", [1, 2, 4, 8])
def test_mass_rule_keeps_the_most(number):
    generator = random.Random(number)
    mass = {(i, j): generator.random() for i, j in itertools.combinations(LAYERS, 2)}

    def kept(passes):
        total, last = 0.0, None
        for layer in LAYERS:
            last = layer if layer in passes else last
            total += 1.0 if layer == last else mass[last, layer]
        return total

    assert mass_rule(mass, LAYERS, number) == max(subsets(number), key=kept)


def test_peak_rule():
    distances = dict.fromkeys(LAYERS, 0.1) | {3: 0.5, 5: 0.4, 9: 0.9, 10: 0.8, 13: 0.3}
    assert peak_rule(distances, LAYERS, 4, 1) == (0, 2, 3, 9)
    assert peak_rule(distances, LAYERS, 5, 1) == (0, 2, 3, 9, 10), "there is no third peak"
    layers = range(20)
    distances = {layer: 1.0 if layer in (9, 10) else 0.5 if layer == 16 else 0.1 for layer in layers}
    assert peak_rule(distances, layers, 5, 2) == (0, 1, 2, 9, 16), "10 is too near"
    assert peak_rule(distances, LAYERS, 8, 1) == tuple(LAYERS)


def write_calibration(path, **settings):
    path.write_text(json.dumps({"delta": {"full_layers": 1, "selection_layers": [1, 4], **settings}}))


def test_a_file_beside_the_model_is_found(tmp_path):
    model = str(tmp_path)
    assert with_calibrated_layers({"budget_tokens": 512}, model) == {"budget_tokens": 512}
    write_calibration(tmp_path / CALIBRATION_FILE, budget_tokens=64)
    expected = {"full_layers": 1, "selection_layers": [1, 4], "calibration": str(tmp_path / CALIBRATION_FILE)}
    found = with_calibrated_layers({"budget_tokens": 512}, model)
    assert found == {"budget_tokens": 512, **expected}
    assert with_calibrated_layers(found, model) == found
    for settings in ({"selection_layers": [2]}, {"full_layers": 2}, {"policy": "oracle"}):
        assert with_calibrated_layers(settings, model) == settings


def test_a_named_file_counts(tmp_path):
    path = tmp_path / "other.json"
    write_calibration(path)
    named = {"calibration": str(path)}
    assert with_calibrated_layers(named, "some/model")["selection_layers"] == [1, 4]
    with pytest.raises(DeltaConfigError, match=r"full_layers is 2, but .*other.json was made for 1"):
        with_calibrated_layers({**named, "full_layers": 2}, "some/model")
    with pytest.raises(DeltaConfigError, match=r"there is no file .*missing"):
        with_calibrated_layers({"calibration": str(tmp_path / "missing")}, "some/model")
    for text in ("nothing", "[]", '{"delta": {}}', '{"delta": {"full_layers": -1, "selection_layers": []}}'):
        path.write_text(text)
        with pytest.raises(DeltaConfigError, match="is no calibration"):
            with_calibrated_layers(named, "some/model")


def test_a_plan_tells_its_calibration():
    config = DeltaConfig(selection_layers=(2, 4), calibration="model/delta_calibration.json")
    plan = make_plan(config, range(8), 8)
    assert "(selection layers from calibration model/delta_calibration.json)" in plan.describe()
    with pytest.raises(DeltaConfigError, match=r"delta.calibration must be a path, not 3"):
        DeltaConfig(calibration=3)


def test_settings_change_in_a_worker():
    """Roles of layers, and a GPU's form of the settings, follow; what is not named is that of the start."""
    start = DeltaConfig(page_size=16, budget_tokens=256, recent_tokens=32)
    calibration = object.__new__(Calibration)
    calibration._state = SimpleNamespace(config=start, plan=None, selection=Selection(16, 256, 32, 16))
    calibration._start, calibration._num_layers = start, 6
    calibration._impls = {layer: SimpleNamespace(role=None) for layer in range(6)}
    state = calibration._state
    calibration.use({"full_layers": 1, "selection_layers": [1, 3], "page_size": 32, "sink_tokens": 0})
    roles = [calibration._impls[layer].role for layer in calibration.layers()]
    assert roles == ["full", "selection", "sparse", "selection", "sparse", "sparse"]
    assert state.plan.roles == dict(enumerate(roles))
    assert state.selection == Selection(32, 256, 32, 0)
    calibration.use({"policy": "oracle", "budget_tokens": 128})
    assert state.config == dataclasses.replace(start, policy="oracle", budget_tokens=128)
    assert [impl.role for impl in calibration._impls.values()] == ["full"] * 2 + ["sparse"] * 4
    assert state.selection == Selection(16, 128, 32, 16)
    with pytest.raises(ValueError, match="action must be one of layers, use"):
        calibration.call("_observe")


def test_divergence_of_the_likeliest_tokens(monkeypatch):
    """All tokens but the likeliest count as one, which is never more than the whole divergence."""
    torch.manual_seed(0)
    expected, found = (2 * torch.randn(2, 5, 40)).log_softmax(-1).unbind()
    whole = (expected.exp() * (expected - found)).sum(-1)
    torch.testing.assert_close(Distributions.keep(expected).divergence(found), whole)
    monkeypatch.setattr("vllm_delta.integration.calibration.LIKELIEST", 10)
    part = Distributions.keep(expected).divergence(found)
    assert ((part > 0.5 * whole) & (part < whole)).all()
    joined = Distributions.join([Distributions.keep(expected[:2]), Distributions.keep(expected[2:])])
    torch.testing.assert_close(joined.slice(1, 4).divergence(found[1:4]), part[1:4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--delta", '{"pages": 1}'], "delta.pages is not a setting"),
        (["--budget-tokens", "100"], "delta.budget_tokens must be a multiple of delta.page_size"),
        (["--engine", "[1]"], "invalid json_object value"),
        (["--engine", '{"pipeline_parallel_size": 2}'], "does not serve pipeline parallelism"),
        (["--selection-layers", "0"], "the other numbers are 1 or more"),
    ],
)
def test_wrong_options_are_refused(options, message, capsys):
    from vllm_delta.cli import parse_arguments

    with pytest.raises(SystemExit):
        parse_arguments(["calibrate", "model", *options])
    assert message in capsys.readouterr().err


def test_prompts_are_read(tmp_path):
    from vllm_delta.calibration.engine import CalibrationError, read_prompts

    path = tmp_path / "prompts"
    path.write_text('one two\n\n{"prompt": "three"}\n{"prompt_token_ids": [4]}\n')
    plain = [{"prompt": "three"}, {"prompt_token_ids": [4]}]
    assert read_prompts(path, None) == [{"prompt": "one two"}, *plain]
    seen = []
    assert read_prompts(path, lambda chat: seen.append(chat) or [7]) == [{"prompt_token_ids": [7]}, *plain]
    assert seen == [[{"role": "user", "content": "one two"}]]
    for text, message in (
        ('{"messages": []}', "line 1: this model has no chat template"),
        ('{"text": ""}', "line 1: neither"),
        ("", "has no prompt"),
    ):
        path.write_text(text)
        with pytest.raises(CalibrationError, match=message):
            read_prompts(path, None)


PLANS = [(0, 1, 2, 3, 4, 5, 6, 7), (0, 1, 4), (0, 3)]
BUDGET = 96
SETTINGS = {"budget_tokens": BUDGET, "recent_tokens": 32, "sink_tokens": 16}
ENGINE = {"dtype": "float32", "gpu_memory_utilization": 0.3, "max_num_batched_tokens": 160}


def random_prompts(count):
    generator = random.Random(3)
    return [
        {"prompt_token_ids": [generator.randrange(10, 500) for _ in range(150 + 60 * index)]}
        for index in range(count)
    ]


def measure(model):
    """Answers, and what each plan loses along each of them; mass on the pages of earlier layers."""
    from vllm_delta.calibration.engine import Engine
    from vllm_delta.config import DeltaConfig

    engine = Engine(str(model), DeltaConfig(**SETTINGS), 2 * BUDGET, 400, ENGINE)
    try:
        answers = engine.answer(random_prompts(2), 40, 25)
        observed = engine.record(answers, 8, lambda: None)
        losses = {
            (plan, budget, key): (
                engine.loss(plan, budget, [key]),
                engine.guesses(answers[key].tokens, answers[key].first_row),
            )
            for plan in PLANS
            for budget in (BUDGET, 2 * BUDGET)
            for key in range(len(answers))
        }
        return answers, observed, losses
    finally:
        engine.close()


@pytest.fixture(scope="module")
def measured(tiny_model):
    return in_fresh_process(measure, tiny_model, **ONE_THREAD)


def test_losses_equal_dense_masks(tiny_model, measured):
    """The divergence of every plan, rows computed all at once, is that of masks over dense attention."""
    answers, _, losses = measured
    assert len(answers) == 2 and all(1 < answer.num_rows <= 25 for answer in answers)
    for (plan, budget, key), (loss, guesses) in losses.items():
        answer = answers[key]
        full_layers, selection = split_passes(plan, range(8))
        dense, sparse = (
            logprobs_with_masks(
                tiny_model,
                answer.tokens[: answer.first_row],
                [*answer.tokens[answer.first_row :], 0],
                layers,
                full_layers=full,
                budget=(16, budget // 16, 2, 1),
            )
            for layers, full in (((), 8), (selection, full_layers))
        )
        assert guesses == sparse.argmax(-1).tolist()
        dense, sparse = dense[1:], sparse[1:]
        expected = (dense.exp() * (dense - sparse)).sum(-1).mean().item()
        assert loss.divergence == pytest.approx(expected, rel=0.02, abs=1e-5)
        agreement = (dense.argmax(-1) == sparse.argmax(-1)).double().mean().item()
        assert loss.agreement == pytest.approx(agreement, abs=0.041)
    assert all(losses[PLANS[0], BUDGET, key][0].divergence < 1e-5 for key in range(2))
    assert all(losses[PLANS[2], BUDGET, key][0].divergence > 1e-3 for key in range(2))


def test_mass_is_a_share(measured):
    _, observed, _ = measured
    assert set(observed.mass) == set(itertools.combinations(range(8), 2))
    assert set(observed.distances) == set(range(1, 8))
    values = torch.tensor(list(observed.mass.values()))
    assert values.min() > 0.2 and values.max() < 1 + 1e-5
    assert all(0 <= distance <= 1 for distance in observed.distances.values())


def calibrate(folder, prompts):
    """The command, then an engine that finds the file beside the model; its settings and counters."""
    from engines import start_engine

    from vllm_delta import cli

    settings = json.dumps({"recent_tokens": 32, "sink_tokens": 16})
    # With as long prompts as it takes by default, the model has too few positions.
    sizes = f"--budget-tokens {BUDGET} --output-tokens 40 --scored-tokens 16"
    command = ["calibrate", str(folder), "--prompts", str(prompts), *sizes.split(), "--full-layers", "1"]
    command += ["--selection-layers", "2", "--delta", settings, "--engine", json.dumps(ENGINE)]
    status = cli.calibrate(cli.parse_arguments([*command, "--picture", str(folder / "picture.svg")]))
    with start_engine(folder, "DELTA", {**SETTINGS}, max_model_len=512) as engine:
        engine.generate([prompt["prompt_token_ids"] for prompt in random_prompts(2)], 8)
        return status, engine.llm.llm_engine.vllm_config.additional_config, engine.counters()


def test_the_command_writes_what_a_server_finds(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in random_prompts(4)))
    status, config, counts = in_fresh_process(calibrate, folder, prompts, **ONE_THREAD)
    assert status == 0
    written = json.loads((folder / CALIBRATION_FILE).read_text())
    assert written["calibration"]["model"] == folder.name
    layers = {name: written["delta"][name] for name in ("full_layers", "selection_layers")}
    assert layers["full_layers"] + len(layers["selection_layers"]) == 3
    assert {name: config["delta"][name] for name in layers} == layers
    assert config["delta"]["calibration"] == str(folder / CALIBRATION_FILE)
    rows = {role: counts["layers"][role]["rows"] for role in ("full", "selection", "sparse")}
    assert rows["selection"] * 5 == rows["sparse"] * len(layers["selection_layers"]) > 0
    compared = written["calibration"]["compared"]
    assert set(compared) == {"calibrated", "rule of thumb", "peaks", "mass"}
    for entry in compared.values():
        assert len(join_passes(entry["full_layers"], entry["selection_layers"], range(8))) == 3
    budgets = written["calibration"]["budgets"]
    assert [entry["budget_tokens"] for entry in budgets] == [48, 96, 192]
    assert budgets[0]["divergence"] > budgets[2]["divergence"]
    assert (folder / "picture.svg").stat().st_size > 1000
