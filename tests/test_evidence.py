"""What a calibration asks a model, what counts of it, and what it concludes, without an engine."""

from __future__ import annotations

import json
import random

import pytest

from vllm_delta.calibration import run
from vllm_delta.calibration.engine import Observed
from vllm_delta.calibration.evidence import Found, Loss, Unit, units_of
from vllm_delta.calibration.prompts import CalibrationError
from vllm_delta.calibration.search import join_passes
from vllm_delta.calibration.texts import PROSE, RETRIEVAL, Text, answered, make_text, passages
from vllm_delta.method.config import DeltaConfig

LENGTH, ROWS = 3000, 400


def encode(text: str) -> list[int]:
    """A token a character."""
    return [ord(letter) for letter in text]


def decode(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


@pytest.mark.parametrize("seed", range(6))
def test_what_is_looked_up_stands_far_back(seed: int) -> None:
    text = make_text(seed, encode, [1], 40000, 4000, seed % 2)
    assert text.tokens[0] == 1 and len(text.tokens) <= 40000
    assert text.first_row % 4000 == 0 and 2000 < len(text.tokens) - text.first_row <= 4000
    assert set(text.scored.values()) == {*RETRIEVAL, PROSE}
    assert min(text.positions) > text.first_row
    before = decode(text.tokens[1 : text.first_row])
    for unit in stretches(text):
        wanted = decode([text.tokens[position] for position in unit])
        assert (wanted.strip() in before) == (text.scored[unit[0]] != PROSE), wanted


def stretches(text: Text) -> list[list[int]]:
    """Scored tokens that are neighbours and of one family."""
    found: list[list[int]] = []
    for position in text.positions:
        family = text.scored[position]
        if found and found[-1][-1] == position - 1 and text.scored[found[-1][0]] == family:
            found[-1].append(position)
        else:
            found.append([position])
    return found


def test_a_seed_gives_the_same_text_and_a_half_of_the_prose() -> None:
    assert make_text(3, encode, [], LENGTH, ROWS) == make_text(3, encode, [], LENGTH, ROWS)
    assert make_text(3, encode, [], LENGTH, ROWS) != make_text(4, encode, [], LENGTH, ROWS)
    whole = [decode(make_text(0, encode, [], 40000, 4000, part).tokens) for part in (0, 1)]
    for number, paragraph in enumerate(passages()):
        assert paragraph[:60] not in whole[1 - number % 2]


def test_an_answer_is_scored_at_its_end() -> None:
    text = answered("one", [5] * 10, [7, 8, 9, 10], 2)
    assert (text.first_row, text.positions) == (11, [12, 13])
    assert answered("one", [5] * 10, [7, 8, 9, 10], 100).positions == [11, 12, 13]


def test_tokens_count_that_full_attention_gets_right() -> None:
    scored = {3: "facts", 4: "facts", 5: "facts", 8: "facts", 9: PROSE, 10: PROSE}
    text = Text("one", list(range(100, 112)), 2, scored)
    full = Found([0] * 6, [103, 104, 999, 108, 1, 2])
    units = units_of(text, full, Found([0.5, 0.25, 9, 0, 1, 2], [103, 7, 105, 108, 1, 3]))
    assert units == [Unit("facts", 2, 1, 0.75), Unit("facts", 1, 1, 0), Unit(PROSE, 2, 1, 3)]
    loss = Loss(tuple(units))
    assert (loss.tokens(), loss.tokens(PROSE)) == (3, 2)
    assert loss.kept() == loss.kept("facts") == pytest.approx(2 / 3)
    assert (loss.divergence, loss.agreement) == (1.5, 0.5)
    assert loss.value == pytest.approx(0.25 + 1.5)
    low, high = loss.interval("kept")
    assert 0.5 <= low < 2 / 3 < high <= 1
    with pytest.raises(ValueError, match="1 tokens were scored, not 6"):
        units_of(text, full, Found([0.5], [103]))


class FakeEngine:
    """Of a model in which layers 4 and 9 look things up, and prose needs any three passes."""

    def __init__(self, texts: list[Text], right: float = 1.0, noise: float = 0.0) -> None:
        self.texts, self.right, self.noise = texts, right, noise
        self.eligible = list(range(12))
        self.full: dict[int, list[int]] = {}

    def keep(self, key: int, text: Text, observed_rows: int) -> Found:
        draw = random.Random(key)
        likeliest = [
            text.tokens[position] if draw.random() < self.right else -1 for position in text.positions
        ]
        self.full[key] = likeliest
        return Found([0.0] * len(likeliest), likeliest)

    def hits(self):
        return {layer: float(layer == 4) for layer in self.eligible}

    def observations(self) -> Observed:
        pairs = {(i, j): 0.5 for j in self.eligible for i in range(j)}
        return Observed(pairs, dict.fromkeys(self.eligible[1:], 0.1))

    def score(self, passes: tuple[int, ...], budget_tokens: int, key: int) -> Found:
        text, full = self.texts[key], self.full[key]
        if passes == tuple(self.eligible):
            return Found([self.noise] * len(full), full)
        missing = len({4, 9} - set(passes))
        lost = missing * 0.4 * min(1.0, 512 / budget_tokens)
        divergences, likeliest = [], []
        for index, position in enumerate(text.positions):
            looked_up = text.scored[position] != PROSE
            loses = looked_up and (index * 7919) % 100 < 100 * lost
            divergences.append(3.0 if loses else 0.05 / min(3, len(passes)) if not looked_up else 0.0)
            likeliest.append(-2 if loses else full[index])
        return Found(divergences, likeliest)


def options(**changes: object) -> run.Options:
    given = {"search_budget": 512, "most_passes": 5, "exactly": False, "keep": 0.99} | changes
    return run.Options(config=DeltaConfig(budget_tokens=1024), **given)  # type: ignore[arg-type]


def texts_of(count: int = 4) -> list[Text]:
    return [make_text(seed, encode, [], 12000, 3000, seed % 2) for seed in range(count)]


def test_the_fewest_passes_that_keep_enough_are_found() -> None:
    texts, done = texts_of(), []
    result = run.calibrate(FakeEngine(texts), texts, options(), done.append)
    assert result.best.name == "calibrated" and result.best.passes == (0, 4, 9)
    assert result.fewest_passes == 3 and result.smallest_budget == 256
    assert result.best.loss.kept() == 1
    assert max(result.sensitivity, key=result.sensitivity.__getitem__) in (4, 9)
    assert sum(done) <= run.estimate(texts, options(), 12) < 2 * sum(done)
    settings = json.loads(json.dumps(result.settings()))
    assert settings["delta"]["full_layers"] == 0 and settings["delta"]["selection_layers"] == [0, 4, 9]
    assert settings["delta"]["budget_tokens"] == 1024
    found = settings["calibration"]
    assert found["compared"]["rule of thumb"]["kept"] < 0.7
    assert [entry["passes"] for entry in found["passes"]] == [1, 2, 3, 4, 5]
    assert [entry["kept"] > 0.9 for entry in found["passes"]] == [False, False, True, True, True]
    assert set(found["compared"]["calibrated"]["kept_of"]) == set(RETRIEVAL)
    table = run.table(result)
    assert "99% of what full attention looks up is kept from a budget of 256 tokens on, and with 3 " in table
    assert "0, 4, 9" in table and "rule of thumb" in table


def test_as_many_passes_as_are_told() -> None:
    texts = texts_of()
    told = options(exactly=True, most_passes=4)
    result = run.calibrate(FakeEngine(texts), texts, told, lambda tokens: None)
    assert len(result.best.passes) == 4
    with pytest.raises(CalibrationError, match="must be 1 to 12, not 13"):
        run.calibrate(FakeEngine(texts), texts, options(most_passes=13), lambda tokens: None)


def test_a_rule_is_written_where_it_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the search found."""
    texts = texts_of()
    monkeypatch.setattr(run, "search", lambda *_: [(0,), (0, 1), (0, 1, 2)])
    monkeypatch.setattr(run, "rules_of", lambda *_: {run.THUMB: (0, 1, 3), "peaks": (0, 4, 9)})
    result = run.calibrate(FakeEngine(texts), texts, options(most_passes=3), lambda tokens: None)
    assert result.best.name == "peaks"
    written = result.settings()
    assert written["calibration"]["chosen"] == "peaks"
    layers = written["delta"]["full_layers"], written["delta"]["selection_layers"]
    assert join_passes(*layers, range(12)) == (0, 4, 9)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            {"right": 0.005},
            r"looks up only \d+ tokens right, where 60 are needed: the built-in texts say nothing",
        ),
        ({"noise": 0.3}, r"full attention differs from itself by 0\.6 nats when it runs again"),
    ],
    ids=["too few are right", "what runs again differs"],
)
def test_too_little_evidence_is_an_error(engine: dict, message: str) -> None:
    texts = texts_of()
    with pytest.raises(CalibrationError, match=message):
        run.calibrate(FakeEngine(texts, **engine), texts, options(), lambda tokens: None)


def test_the_budget_of_the_search_leaves_most_out() -> None:
    assert run.search_budget(DeltaConfig(), 4096) == 512
    assert run.search_budget(DeltaConfig(), 800) == 208  # recent, sink and four pages
    assert run.search_budget(DeltaConfig(budget_tokens=256), 8192) == 256
    assert run.budgets(options()) == [256, 512, 1024, 2048]
