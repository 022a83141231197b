"""The reasoner: problems that their prompts solve, checked step by step; a tokenizer; training and export."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from reasoner import vocabulary
from reasoner.problems import FAMILIES, TRACE_INPUTS, check, make_problem


def solve(text):
    """The answer to a problem's text, by a program that knows nothing of how it was made."""
    family, *words = vocabulary.split(text)
    facts, question = words[: words.index("?")], words[words.index("?") + 1 : -1]
    answer = []
    if family == "chase":
        known = {name: (digit, after) for name, digit, after in zip(*[iter(facts)] * 3, strict=True)}
        name, total = question[0], 0
        while name in known:
            digit, after = known[name]
            total = (total + int(digit)) % 10
            answer += [name, digit, str(total)]
            name = after
    elif family == "trace":
        inputs, lines = facts[: 2 * TRACE_INPUTS], facts[2 * TRACE_INPUTS :]
        values = dict(zip(inputs[::2], map(int, inputs[1::2]), strict=True))
        for left, right, _, name in zip(*[iter(lines)] * 4, strict=True):
            values[name] = (values[left] + values[right]) % 10
            for operand in (left, right, name):
                answer += [operand, str(values[operand])]
        assert name == question[0]
    else:
        known = {name: digits for name, *digits in zip(*[iter(facts)] * 4, strict=True)}
        for name in question:
            answer += [name, *known[name]]
    return " ".join(answer)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [64, 500, 8192, 16384])
def test_problems_have_one_answer(family: str, length: int) -> None:
    generator = np.random.default_rng(length)
    for _ in range(5):
        problem = make_problem(family, length, generator)
        assert 0.8 * length - 16 <= len(problem.tokens) <= length
        text = vocabulary.decode(problem.prompt)
        assert vocabulary.encode(text) == problem.prompt[1:].tolist()
        outcome = check(problem, solve(text))
        assert outcome.exact and outcome.right_steps == outcome.num_steps == problem.num_steps > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_answers_are_found(family: str) -> None:
    problem = make_problem(family, 300, np.random.default_rng(0))
    words = vocabulary.split(vocabulary.decode(problem.answer))
    assert not check(problem, " ".join(words[:-1])).exact
    assert not check(problem, " ".join([*words, "7"])).exact
    middle = problem.num_steps // 2
    words[problem.step * (middle + 1) - 1] = "?"
    outcome = check(problem, " ".join(words))
    assert (outcome.exact, outcome.right_steps) == (False, middle)


def test_prompts_for_a_calibration() -> None:
    from reasoner.prompts import make_prompts

    prompts = [prompt["prompt_token_ids"] for prompt in make_prompts(300, 2, seed=0)]
    families = [vocabulary.decode(prompt).split()[0] for prompt in prompts]
    assert families == [*FAMILIES] * 2
    assert prompts[0] != prompts[3]
    assert solve(vocabulary.decode(prompts[0]))


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match="one of chase, trace, needles, not 'sums'"):
        make_problem("sums", 100, np.random.default_rng(0))
    with pytest.raises(ValueError, match="64 tokens or more, not 20"):
        make_problem("trace", 20, np.random.default_rng(0))


def test_tokenizer_agrees_with_the_vocabulary(tmp_path) -> None:
    from transformers import AutoTokenizer

    vocabulary.save_tokenizer(str(tmp_path), 16384)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    problem = make_problem("trace", 200, np.random.default_rng(0))
    text = vocabulary.decode(problem.prompt[:-1])
    assert tokenizer.encode(text) == problem.prompt[:-1].tolist()
    chat = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert tokenizer.encode(rendered, add_special_tokens=False) == problem.prompt.tolist()
    answer = tokenizer.decode(problem.answer, skip_special_tokens=True)
    assert check(problem, answer).exact


def train_a_little(tmp_path, *options: str):
    from reasoner import train

    sizes = "--steps 12 --decay 4 --batch-tokens 1024 --length 256 --layers 2 --workers 1 --log-every 1"
    arguments = train.parse_arguments(["--out", str(tmp_path / "model"), *sizes.split(), *options])
    training = train.Training(arguments)
    if arguments.checkpoint and arguments.checkpoint.exists():
        training.load(arguments.checkpoint)
    training.run()
    return training


def test_training_writes_a_model_that_transformers_loads(tmp_path) -> None:
    """A few steps of a tiny network: the loss falls, and transformers computes what training computed."""
    import csv
    import json

    import torch
    from reasoner.model import export
    from transformers import AutoModelForCausalLM

    training = train_a_little(tmp_path)
    training.write_log(tmp_path / "log.csv")
    export(training.model, tmp_path / "model")
    with (tmp_path / "log.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    problem = make_problem("chase", 200, np.random.default_rng(0))
    tokens = torch.from_numpy(problem.tokens)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ours = training.model.bfloat16().float()(tokens)
    assert (loaded(tokens).logits - ours).abs().max() < 1e-3 * ours.abs().max()
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["temperature"] == 0


def test_training_goes_on_where_it_stopped(tmp_path) -> None:
    import torch

    whole = train_a_little(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    stopped = train_a_little(tmp_path, "--stop-after", "0", "--checkpoint", str(checkpoint))
    assert 0 < stopped.step < 12
    stopped.save(checkpoint)
    resumed = train_a_little(tmp_path, "--checkpoint", str(checkpoint))
    assert resumed.step == 12 and len(resumed.rows) == 12
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_training_ends_some_while_after_the_longest_problems(tmp_path) -> None:
    """The rate falls from then on; a later call knows when that was."""
    checkpoint = tmp_path / "checkpoint"
    options = ["--length", "128", "--plateau", "1", "--checkpoint", str(checkpoint)]
    stopped = train_a_little(tmp_path, *options, "--stop-after", "0")
    assert stopped.grown == 0
    stopped.save(checkpoint)
    training = train_a_little(tmp_path, *options)
    assert (training.step, training.steps) == (5, 5)
    rates = [row["rate"] for row in training.rows]
    assert len(rates) == 5 and rates[-1] == pytest.approx(2e-3 * min(5 / 200, 1 / 4))


def test_training_starts_from_a_model(tmp_path) -> None:
    """Its weights, and problems as long as its own were; problems grow from there."""
    import torch
    from reasoner import train
    from reasoner.model import export

    first = train_a_little(tmp_path)
    export(first.model, tmp_path / "first")
    options = "--out there --layers 2 --length 1024 --start"
    training = train.Training(train.parse_arguments([*options.split(), str(tmp_path / "first")]))
    assert {course.length for course in training.courses.values()} == {256}
    assert {course.longest for course in training.courses.values()} == {1024}
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(training.model.state_dict()[name], value.bfloat16().float())
    with pytest.raises(RuntimeError, match="Missing key"):
        train.Training(
            train.parse_arguments([*options.replace("2", "3", 1).split(), str(tmp_path / "first")])
        )


def test_batches_depend_on_seed_and_step_alone() -> None:
    from reasoner.train import IGNORED, make_batch

    tokens, targets, length = make_batch(7, "trace", 1, 8192, 600)
    again, other = make_batch(7, "trace", 1, 8192, 600), make_batch(8, "trace", 1, 8192, 600)
    assert np.array_equal(tokens, again.tokens)
    assert tokens.shape != other.tokens.shape or not np.array_equal(tokens, other.tokens)
    assert len(tokens) >= 2 and tokens.shape[1] % 64 == 0 and length <= tokens.shape[1] < length + 64
    rows, columns = np.nonzero(targets != IGNORED)
    assert np.array_equal(targets[rows, columns], tokens[rows, columns + 1])


def test_short_problems_keep_coming() -> None:
    from reasoner.train import SHORTEST, choose_length

    generator = np.random.default_rng(0)
    lengths = np.array([choose_length(16384, generator) for _ in range(2000)])
    assert lengths.min() >= SHORTEST // 2 and lengths.max() == 16384
    assert 0.3 < (lengths == 16384).mean() < 0.4
    assert all(((lengths >= least) & (lengths < 4 * least)).mean() > 0.04 for least in (64, 256, 1024))


def test_problems_grow_when_they_are_mastered() -> None:
    from reasoner.train import DECIDING, GROWTH, SHORTEST, Course

    course = Course(longest=int(SHORTEST * GROWTH) + 5)
    for _ in range(DECIDING - 1):
        course.see(SHORTEST, 1.0)
    course.see(SHORTEST - 1, 1.0)
    assert course.length == SHORTEST, "shorter problems do not decide"
    course.see(SHORTEST, 0.9)
    assert course.length == int(SHORTEST * GROWTH)
    for accuracy in [0.9] * DECIDING:
        course.see(course.length, accuracy)
    assert course.length == int(SHORTEST * GROWTH)
    for _ in range(DECIDING):
        course.see(course.length, 1.0)
    assert course.length == course.longest


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trained_model_solves_problems(family: str) -> None:
    """Every token of the right answer is the likeliest one, so a greedy answer is exact."""
    import torch
    from reasoner.demo import ROOT
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ROOT / "tools" / "reasoner" / "trained", dtype=torch.float32)
    generator = np.random.default_rng([*family.encode()])
    for length in (300, 1000, 2000):
        problem = make_problem(family, length, generator)
        tokens, start = torch.from_numpy(problem.tokens), len(problem.prompt)
        with torch.no_grad():
            guesses = model(tokens[None]).logits[0].argmax(-1)
        assert torch.equal(guesses[start - 1 : -1], tokens[start:])


class FakeServer:
    """Answers as `solve` does, but for one wrong digit in the middle under DELTA."""

    attended: ClassVar[int] = 40

    def __init__(self, model, options, **_) -> None:
        self.model, self.args = str(model), options
        self.steps = 1

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass

    def client(self):
        return SimpleNamespace(
            chat=SimpleNamespace(completions=SimpleNamespace(create=self.chat)),
            completions=SimpleNamespace(create=self.complete),
        )

    def complete(self, prompt, max_tokens, **_):
        assert len(prompt) == 300
        self.steps += 1
        time.sleep(max_tokens * (0.001 if "DELTA" in self.args else 0.003))

    def chat(self, messages, **_):
        content = messages[0]["content"]
        words = solve(f"{content} =").split()
        if "DELTA" in self.args and not any("lossless" in argument for argument in self.args):
            words[len(words) // 2] = "?"
        message = SimpleNamespace(content=" ".join(words))
        usage = SimpleNamespace(
            prompt_tokens=len(vocabulary.encode(content)) + 2, completion_tokens=len(words) + 1
        )
        return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage=usage)

    def counters(self):
        return {"attended_tokens": self.attended * self.steps, "context_tokens": 100 * self.steps}


@pytest.mark.parametrize(("attended", "status"), [(40, 0), (100, 1)])
def test_demo(monkeypatch, capsys, attended, status) -> None:
    from reasoner import demo

    monkeypatch.setattr(demo, "Server", FakeServer)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(FakeServer, "attended", attended)
    sizes = ["--length", "600", "--context", "300"]
    monkeypatch.setattr("sys.argv", ["demo", "folder", *sizes, "--delta", '{"budget_tokens": 128}'])
    assert demo.main() == status
    printed = capsys.readouterr()
    assert printed.out.count("every step is right of") == 6
    assert printed.out.count("wrong at step") == 3
    assert '{"delta": {"budget_tokens": 128}}' in printed.out
    if status == 0:
        assert "in these, DELTA attended to 40 of 100 tokens, 40.0%" in printed.out
        assert "3 of 3 lossless answers are full's" in printed.out
        assert "4 sequences of 300 tokens, DELTA attended to " in printed.out
        ratio = float(re.search(r"DELTA +[0-9.]+ ms per token, ([0-9.]+)x", printed.out)[1])
        assert 1.5 < ratio < 6
    else:
        assert "nothing was saved" in printed.err
