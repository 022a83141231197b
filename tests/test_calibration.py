"""Calibration: the search and its rules, the file, and what the engine measures, against dense masks."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import in_engine_process
from dense_mask import logprobs_with_masks

from vllm_delta.calibration.file import CALIBRATION_FILE, with_calibrated_layers, write_settings
from vllm_delta.calibration.prompts import CalibrationError, given_text, read_prompts, render
from vllm_delta.calibration.search import (
    attended_share,
    join_passes,
    mass_rule,
    peak_rule,
    promising,
    search,
    split_passes,
)
from vllm_delta.cli import calibrate as calibrate_command
from vllm_delta.cli.main import parse_arguments
from vllm_delta.integration.calibration import Calibration, Distributions, Step
from vllm_delta.integration.worker_state import WorkerState
from vllm_delta.method.config import DeltaConfig, DeltaConfigError
from vllm_delta.method.counters import Counters
from vllm_delta.method.plan import make_plan
from vllm_delta.method.rows import SelectionRule

OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

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

    path = search(LAYERS, 3, loss)
    assert path[-1] == min(subsets(3), key=loss) == (0, 5, 9)
    assert [len(passes) for passes in path] == [1, 2, 3]
    assert search(LAYERS, 1, loss) == [(0,)]
    assert search(LAYERS, len(LAYERS), loss)[-1] == tuple(LAYERS)
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

    assert search(LAYERS, 3, loss, screen)[-1] in ((0, 8, 9), (0, 9, 10))
    assert len(set(whole)) == len(whole) < len(cheap) == len(set(cheap))


def test_only_promising_layers_are_tried():
    """The most sensitive ones, and the middles of the longest stretches; all where nobody knows."""
    layers = range(40)
    sensitivity = {layer: 1.0 if layer in (5, 6, 7, 8, 20, 21, 22, 23) else 0.01 for layer in layers}
    assert promising((0, 30), layers, sensitivity) == [5, 6, 7, 8, 15, 20, 21, 22, 23, 35]
    assert promising((0, 30), layers, None) == [layer for layer in layers if layer not in (0, 30)]
    tried = set()

    def loss(passes):
        tried.update(passes)
        return -len({7, 21} & set(passes))

    assert search(layers, 3, loss, sensitivity=sensitivity)[-1] == (0, 7, 21)
    assert len(tried) < 20


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", "is no calibration"),
        ("[]", "is no calibration"),
        ('{"delta": {}}', "is no calibration"),
        ('{"delta": {"full_layers": -1, "selection_layers": []}}', "is no calibration"),
        ('{"delta": {"full_layers": 1, "selection_layers": [1]}, "calibration": 3}', "is no calibration"),
        ("[" * 100000, "is no calibration"),
        (b"\xff\xfe", "is no calibration"),
        (b" " * (1 << 23), "is no calibration: it has more than 4194304 bytes"),
        (
            '{"delta": {"full_layers": 1, "selection_layers": [1]}, "calibration": {"num_layers": 28}}',
            "was made for another model: its num_layers is 28, this one's is 12",
        ),
        (
            '{"delta": {"full_layers": 1, "selection_layers": [1]}, "calibration": {"hidden_size": 64}}',
            "was made for another model: its hidden_size is 64, this one's is 128",
        ),
    ],
    ids=["text", "list", "empty", "number", "kind", "nested", "binary", "large", "layers", "size"],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / CALIBRATION_FILE
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for settings, model in (({"calibration": str(path)}, "some/model"), ({}, str(tmp_path))):
        with pytest.raises(DeltaConfigError, match=f"{path} {message}"):
            with_calibrated_layers(settings, model, 12, {"hidden_size": 128, "vocab_size": 9})


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch):
    write_calibration(tmp_path / CALIBRATION_FILE)

    def refuse_to_read(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_text", refuse_to_read)
    with pytest.raises(DeltaConfigError, match=f"{tmp_path}/{CALIBRATION_FILE}: Permission denied"):
        with_calibrated_layers({}, str(tmp_path))


def test_layers_of_a_calibration_that_do_not_fit_name_the_file():
    config = DeltaConfig(full_layers=1, selection_layers=(1, 40), calibration="some/file.json")
    with pytest.raises(DeltaConfigError, match=r"selection_layers of the calibration some/file\.json: 40 is"):
        make_plan(config, range(12), 12)


def test_a_plan_tells_its_calibration():
    config = DeltaConfig(selection_layers=(2, 4), calibration="model/delta_calibration.json")
    plan = make_plan(config, range(8), 8)
    assert "(selection layers from calibration model/delta_calibration.json)" in plan.describe()
    with pytest.raises(DeltaConfigError, match=r"delta.calibration must be a path, not 3"):
        DeltaConfig(calibration=3)


def test_settings_change_in_a_worker():
    """Plan and rule follow; what is not named is that of the start."""
    start = DeltaConfig(page_size=16, budget_tokens=256, recent_tokens=32)
    state = WorkerState(config=start, plan=make_plan(start, range(6), 6), counters=Counters(), table=None)
    calibration = object.__new__(Calibration)
    calibration._state, calibration._start, calibration._num_layers = state, start, 6
    calibration.use({"full_layers": 1, "selection_layers": [1, 3], "page_size": 32, "sink_tokens": 0})
    roles = [state.plan.roles[layer] for layer in calibration.layers()]
    assert roles == ["full", "selection", "sparse", "selection", "sparse", "sparse"]
    assert state.rule == SelectionRule(page_size=32, recent_pages=1, sink_pages=0)
    calibration.use({"policy": "oracle", "budget_tokens": 128})
    assert state.config == dataclasses.replace(start, policy="oracle", budget_tokens=128)
    assert list(state.plan.roles.values()) == ["full"] * 2 + ["sparse"] * 4
    assert state.rule == SelectionRule(page_size=16, recent_pages=2, sink_pages=1)
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
        (["--delta", '{"policy": "quest"}'], "--delta: policy does not apply to a calibration; layers are"),
        (
            ["--delta", '{"calibrate": "auto"}'],
            "calibrate does not apply to a calibration; it is what a server",
        ),
        (["--delta", '{"full_layers": 1}'], "full_layers does not apply to a calibration; use --full-layers"),
        (["--budget-tokens", "100"], "delta.budget_tokens must be a multiple of delta.page_size"),
        (["--budget-tokens", str(2**62)], "delta.budget_tokens must be an integer of at least 1 and at most"),
        (["--engine", "[1]"], "invalid json_object value"),
        (["--engine", '{"pipeline_parallel_size": 2}'], "does not support pipeline parallelism"),
        (["--selection-layers", "0"], "the other numbers are 1 or more"),
        (["--out", "{}/no/such/folder/x.json"], "--out: there is no folder {}/no/such/folder"),
        (["--out", "{}"], "--out: {} is a folder, not a file"),
        (["--out", "{}/read only/x.json"], "--out: {}/read only/x.json cannot be written"),
        (["--picture", "{}/x.jpeg"], "--picture: {}/x.jpeg must end in .svg or .png"),
        (["--picture", "{}/missing/x.svg"], "--picture: there is no folder {}/missing"),
        (["--prompts", "{}/missing"], "--prompts: {}/missing: No such file or directory"),
        (["--prompts", "{}"], "--prompts: {}: Is a directory"),
        (["--prompts", "{}/binary"], "--prompts: {}/binary is no text"),
        (["--prompts", "{}/empty"], "--prompts: {}/empty has no prompt"),
        (["--prompts", "{}/half"], "{}/half, line 2: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_refused_before_anything_starts(options, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "read only").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "half").write_text('a question\n{"prompt": "cut off\n')
    may_write = os.access
    monkeypatch.setattr(  # root may write everywhere
        os, "access", lambda path, mode: "read only" not in str(path) and may_write(path, mode)
    )
    with pytest.raises(SystemExit) as error:
        parse_arguments(["calibrate", "model", *(option.replace("{}", str(tmp_path)) for option in options)])
    assert error.value.code == 2
    assert message.replace("{}", str(tmp_path)) in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_refused_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parse_arguments(["calibrate", "model", "--picture", str(tmp_path / "x.svg")])
    assert "--picture takes matplotlib, which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "engine", "message"),
    [
        ("no/such/model", {}, "no/such/model cannot be loaded: "),
        (None, {"no_such_argument": 1}, "cannot be loaded: "),
        (None, {"dtype": "float12"}, "cannot be loaded: "),
    ],
    ids=["model", "argument", "value"],
)
def test_a_wrong_model_is_one_sentence(tiny_model, tmp_path, model, engine, message):
    """Without a traceback, and before an engine starts."""
    command = [sys.executable, "-m", "vllm_delta.cli", "calibrate", str(model or tiny_model)]
    command += ["--engine", json.dumps(engine), "--out", str(tmp_path / "out.json")]
    result = subprocess.run(command, capture_output=True, text=True, env=OFFLINE, check=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("vllm-delta calibrate: ") and message in last
    assert "Traceback" not in result.stderr and "EngineCore" not in result.stderr
    assert not (tmp_path / "out.json").exists()


def test_results_are_printed_before_they_are_written(tmp_path, capsys):
    """A disk that is full by then takes the file, not the table."""
    result = SimpleNamespace(settings=lambda: {"delta": {}})
    arguments = SimpleNamespace(out=tmp_path / "missing" / "x.json", picture=None)
    with pytest.raises(CalibrationError, match=r"x\.json: No such file or directory"):
        calibrate_command._write(arguments, result)


def test_prompts_are_read(tmp_path):
    path = tmp_path / "prompts"
    path.write_text('one two\n\n{"prompt": "three"}\n{"prompt_token_ids": [4]}\n')
    plain = [{"prompt": "three"}, {"prompt_token_ids": [4]}]
    entries = read_prompts(path)
    assert render(entries, None) == [{"prompt": "one two"}, *plain]
    seen = []
    rendered = render(entries, lambda chat: seen.append(chat) or [7])
    assert rendered == [{"prompt_token_ids": [7]}, *plain]
    assert seen == [[{"role": "user", "content": "one two"}]]


def refuse(messages):
    raise KeyError("role")


@pytest.mark.parametrize(
    ("text", "chat", "message"),
    [
        ('{"messages": []}', None, "line 1: this model has no chat template"),
        ('{"messages": [{}]}', refuse, "line 1: the chat template refuses these messages: 'role'"),
        ('{"messages": "hello"}', None, 'line 1: "messages" must be a list of messages'),
        ('{"text": ""}', None, "line 1: neither"),
        ('{"prompt": 3}', None, 'line 1: "prompt" must be a text'),
        ('{"prompt_token_ids": ["a"]}', None, 'line 1: "prompt_token_ids" must be a list of numbers'),
        ("ok\n{broken", None, "line 2: "),
        ("", None, "has no prompt"),
    ],
)
def test_wrong_prompts_are_refused(tmp_path, text, chat, message):
    path = tmp_path / "prompts"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=message):
        render(read_prompts(path), chat)


def test_blocks_are_kept_of_layers_with_a_kv_cache():
    """And put back as they were, but for those behind; the state of other layers is not."""
    cache = torch.randn(6, 2, 4, 8)
    before = cache.clone()
    attention = SimpleNamespace(block_table=torch.tensor([[5, 0, 3, 1]], dtype=torch.int32))
    context = SimpleNamespace(
        attn_metadata={"attention": attention, "mamba": SimpleNamespace()},
        no_compile_layers={
            "attention": SimpleNamespace(kv_cache=cache),
            "mamba": SimpleNamespace(kv_cache=(torch.zeros(3), torch.zeros(3))),
        },
    )
    (blocks,) = Step((), {}, context, 0, 0).blocks_before(9)
    cache.zero_()
    blocks.put_back()
    assert torch.equal(cache[[5, 0, 3]], before[[5, 0, 3]]) and not cache[[1, 2, 4]].any()


def encode(text, add_special_tokens=True):
    """A token a character, 1 in front of a text."""
    return [1] * add_special_tokens + [ord(letter) for letter in text]


def test_answers_and_documents_are_scored_as_they_are(tmp_path):
    path = tmp_path / "texts"
    lines = [
        {"document": "abcdef"},
        {"prompt": "ab", "answer": "cde"},
        {"messages": [{"role": "user", "content": "ab"}], "answer": "cde"},
        {"prompt": "ab"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = render(read_prompts(path), lambda messages: [7, 8])
    texts = [given_text(str(number), prompt, encode, 2) for number, prompt in enumerate(prompts)]
    document, answer, chat, nothing = texts
    assert document.tokens == encode("abcdef") and document.positions == [5, 6]
    assert answer.tokens == encode("abcde") and answer.positions == [4, 5]
    assert chat.tokens == [7, 8, *encode("cde", False)] and chat.first_row == 2
    assert nothing is None
    assert [set(text.scored.values()) for text in texts[:3]] == [{"documents"}, {"answers"}, {"answers"}]
    with pytest.raises(CalibrationError, match="line 3: 1 tokens are too few to score"):
        given_text("line 3", {"prompt": "ab", "answer": "c"}, encode, 2)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_settings({"delta": {}}, path)
    assert json.loads(path.read_text()) == {"delta": {}}
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_settings({"delta": {"full_layers": 1}}, path)
    assert json.loads(path.read_text()) == {"delta": {}} and list(tmp_path.iterdir()) == [path]


def command_of(process):
    """Its command line; empty where it has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("before an engine", signal.SIGTERM),
        ("while it starts", signal.SIGINT),
        ("while it works", None),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "name", "nobody waits"),
)
def test_a_signal_leaves_nothing_behind(tiny_model, tmp_path, moment, number):
    """Neither processes nor a file. Where nobody waits, it gives itself the signal."""
    prompts, out, log = (tmp_path / name for name in ("prompts.jsonl", "out.json", "log"))
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in random_prompts(4)))
    command = [sys.executable, "-m", "vllm_delta.cli", "calibrate", str(tiny_model), "--out", str(out)]
    command += (
        f"--prompts {prompts} --budget-tokens {BUDGET} --output-tokens 1500 --scored-tokens 700".split()
    )
    command += ["--delta", '{"recent_tokens": 32, "sink_tokens": 16}', "--engine", json.dumps(ENGINE)]
    command += ["--end-with-stdin"]
    with log.open("w") as stream:
        # A shell's background job would begin with the signal ignored, and a process group of its own has no
        # terminal to signal all of it.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=stream, env=OFFLINE, start_new_session=True
        )
        this = psutil.Process(process.pid)
        started = []
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            started = this.children(recursive=True)
            engine = any("EngineCore" in command_of(child) for child in started)
            if moment == "before an engine" or (engine and moment == "while it starts"):
                break
            if "calibrating" in log.read_text():
                break
            time.sleep(0.05)
        if number is None:
            process.stdin.close()
            number = signal.SIGTERM
        else:
            process.send_signal(number)
        assert process.wait(60) in (128 + number, -number), log.read_text()
    _, left = psutil.wait_procs(started, timeout=10)
    assert not [child for child in left if command_of(child)], "but for who waits to be noticed as ended"
    assert not out.exists()
    assert "Traceback" not in log.read_text()
    assert "interrupted" in log.read_text() or moment == "before an engine"


@pytest.mark.parametrize(
    ("options", "length", "tokens"),
    [({}, 401, 401), ({"max_model_len": 4096}, 4096, 4096), ({"max_model_len": -1}, -1, 401)],
    ids=str,
)
def test_an_engine_of_a_length_that_is_told_has_a_cache_for_it(monkeypatch, options, length, tokens):
    """vLLM refuses a cache that does not hold the longest sequence; with -1 it takes what the cache holds."""
    from vllm_delta.calibration.engine import Engine

    started = {}

    def start(_, **arguments):
        started.update(arguments)
        return SimpleNamespace(collective_rpc=lambda *_, **__: [[0, 1]])

    monkeypatch.setattr("vllm.LLM", start)
    model = SimpleNamespace(
        name="model", options=options, num_layers=2, max_model_len=8192, cache_bytes=lambda tokens: tokens
    )
    Engine(model, DeltaConfig(), 256, 400)
    assert (started["max_model_len"], started["kv_cache_memory_bytes"]) == (length, tokens)


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
    """Answers, and what each plan makes of each of them; mass on the pages of earlier layers."""
    from vllm_delta.calibration.engine import Engine, Model

    engine = Engine(Model(str(model), ENGINE), DeltaConfig(**SETTINGS), 2 * BUDGET, 400)
    try:
        answers = engine.answer(random_prompts(2), 40, 25)
        full = [engine.keep(key, answer, 8) for key, answer in enumerate(answers)]
        # In turns: each finds its own keys and values, whatever ran in between.
        found = {
            (plan, budget, key): (
                engine.score(plan, budget, key),
                engine.guesses(answers[key].tokens, answers[key].first_row),
            )
            for plan in PLANS
            for budget in (BUDGET, 2 * BUDGET)
            for key in range(len(answers))
        }
        return answers, engine.observations(), full, found
    finally:
        engine.close()


@pytest.fixture(scope="module")
def measured(tiny_model):
    return in_engine_process(measure, tiny_model)


def test_losses_equal_dense_masks(tiny_model, measured):
    """The divergence of every plan, rows computed all at once, is that of masks over dense attention."""
    answers, _, full, results = measured
    assert len(answers) == 2
    for (plan, budget, key), (found, guesses) in results.items():
        answer = answers[key]
        assert answer.positions == list(range(answer.first_row + 1, len(answer.tokens)))
        assert 1 < len(answer.positions) <= 25
        full_layers, selection = split_passes(plan, range(8))
        dense, sparse = (
            logprobs_with_masks(
                tiny_model,
                answer.tokens[: answer.first_row],
                [*answer.tokens[answer.first_row :], 0],
                layers,
                full_layers=full_layers,
                budget=(16, budget // 16, 2, 1),
            )
            for layers, full_layers in (((), 8), (selection, full_layers))
        )
        assert guesses == sparse.argmax(-1).tolist()
        dense, sparse = dense[1:-1], sparse[1:-1]  # of the row before the first, and behind the last
        expected = (dense.exp() * (dense - sparse)).sum(-1)
        assert found.divergences == pytest.approx(expected.tolist(), rel=0.05, abs=2e-4)
        assert found.likeliest == sparse.argmax(-1).tolist()
        assert full[key].likeliest == dense.argmax(-1).tolist()
    assert all(max(results[PLANS[0], BUDGET, key][0].divergences) < 1e-5 for key in range(2))
    assert all(max(results[PLANS[2], BUDGET, key][0].divergences) > 1e-3 for key in range(2))


def test_mass_is_a_share(measured):
    _, observed, _, _ = measured
    assert set(observed.mass) == set(itertools.combinations(range(8), 2))
    assert set(observed.distances) == set(range(1, 8))
    values = torch.tensor(list(observed.mass.values()))
    assert values.min() > 0.2 and values.max() < 1 + 1e-5
    assert all(0 <= distance <= 1 for distance in observed.distances.values())


def calibrate(folder, prompts):
    """The command, then an engine that finds the file beside the model; its settings and counters."""
    from engines import start_engine

    from vllm_delta.cli.main import parse_arguments

    settings = json.dumps({"recent_tokens": 32, "sink_tokens": 16})
    # With as long prompts as it takes by default, the model has too few positions.
    sizes = f"--budget-tokens {BUDGET} --output-tokens 40 --scored-tokens 16"
    command = ["calibrate", str(folder), "--prompts", str(prompts), *sizes.split(), "--full-layers", "1"]
    command += ["--selection-layers", "2", "--delta", settings, "--engine", json.dumps(ENGINE)]
    arguments = parse_arguments([*command, "--picture", str(folder / "picture.svg")])
    status = arguments.run(arguments)
    with start_engine(folder, "DELTA", {**SETTINGS}, max_model_len=512) as engine:
        engine.generate([prompt["prompt_token_ids"] for prompt in random_prompts(2)], 8)
        return status, engine.llm.llm_engine.vllm_config.additional_config, engine.counters()


def test_the_command_writes_what_a_server_finds(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in random_prompts(4)))
    status, config, counts = in_engine_process(calibrate, folder, prompts)
    assert status == 0
    written = json.loads((folder / CALIBRATION_FILE).read_text())
    assert written["calibration"]["model"] == folder.name
    assert (written["calibration"]["num_layers"], written["calibration"]["hidden_size"]) == (8, 128)
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
        low, high = entry["divergence_interval"]
        assert low <= entry["divergence"] <= high and "kept" not in entry
    assert compared[written["calibration"]["chosen"]]["divergence"] == min(
        entry["divergence"] for entry in compared.values()
    )
    budgets = written["calibration"]["budgets"]
    assert [entry["budget_tokens"] for entry in budgets] == [48, 96, 192, 384]
    assert budgets[0]["divergence"] > budgets[2]["divergence"]
    assert set(written["calibration"]["sensitivity"]) == {str(layer) for layer in range(1, 8)}
    assert (folder / "picture.svg").stat().st_size > 1000
