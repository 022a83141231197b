"""The benchmark on real texts: its documents, its sums, and one engine."""

from __future__ import annotations

import json
import random
from argparse import Namespace

import pytest
from conftest import in_engine_process

from benchmarks.accuracy import acceptance, documents, plot_real_text, real_text
from benchmarks.accuracy.documents import CUE, PLACES, QUOTED, Document, Source, make_document
from benchmarks.accuracy.settings import Setting
from benchmarks.lib.csv_rows import read_csv
from benchmarks.lib.rows import Acceptance, TextLoss
from benchmarks.lib.text_losses import FACTS, PROSE, QUOTES, attended_share, divergence, rise
from vllm_delta.calibration import search
from vllm_delta.calibration.evidence import Found
from vllm_delta.calibration.texts import Text, passages

#: sentences of words in no order, so that no two are the same
WORDS = sorted({word.strip(".,;") for passage in passages() for word in passage.split()})
DRAW = random.Random(0)
TEXT = " ".join(f"{' '.join(DRAW.choices(WORDS, k=12))}." for _ in range(600))


def encode(text):
    """A token a word or sign."""
    return [hash(word) % 50_000 for word in text.replace(".", " .").split()]


@pytest.fixture(scope="module")
def source():
    return Source.read("passages", TEXT, encode)


def runs(positions):
    """Stretches of neighbours."""
    found = []
    for position in positions:
        if found and found[-1][-1] == position - 1:
            found[-1].append(position)
        else:
            found.append([position])
    return found


def test_documents_hold_what_they_look_up(source):
    document = make_document(source, 2048, 0, 7, encode, [1])
    text = document.text
    assert len(text.tokens) == 2048
    assert min(text.scored) > text.first_row
    body = text.tokens[: text.first_row]
    by_family = {
        family: runs([position for position in text.positions if text.scored[position] == family])
        for family in documents.FAMILIES
    }
    assert len(by_family[QUOTES]) == documents.NUM_QUOTES
    joined = " ".join(map(str, body))
    places = set()
    for stretch in by_family[QUOTES]:
        assert len(stretch) == QUOTED
        passage = " ".join(map(str, text.tokens[stretch[0] - CUE : stretch[-1] + 1]))
        assert joined.count(passage) == 1
        (place,) = {document.places[position] for position in stretch}
        depth = len(joined[: joined.index(passage)].split()) / len(body)
        assert abs(depth * PLACES - place - 0.5) < 1
        places.add(place)
    assert places == set(range(PLACES))
    assert len(by_family[FACTS]) == documents.NUM_FACTS
    for stretch in by_family[FACTS]:
        assert " ".join(str(text.tokens[position]) for position in stretch) in joined
    (prose,) = by_family[PROSE]
    assert len(prose) == documents.PROSE_ROWS - 1
    goes_on = " ".join(map(str, text.tokens[prose[0] : prose[-1] + 1]))
    assert goes_on not in joined
    assert goes_on in " ".join(map(str, source.tokens))


def test_documents_depend_on_seed_and_part_alone(source):
    def tokens(part, seed):
        return make_document(source, 2048, part, seed, encode, []).text.tokens

    assert tokens(0, 0) == tokens(0, 0)
    assert len({tuple(tokens(part, seed)) for part in (0, 1) for seed in (0, 1)}) == 4


@pytest.mark.parametrize(
    ("context", "text", "message"),
    [(1024, TEXT, "documents have at least 2048 tokens"), (2048, "A short text. It ends.", "too few")],
)
def test_what_is_too_short_is_refused(context, text, message):
    with pytest.raises(ValueError, match=message):
        make_document(Source.read("text", text, encode), context, 0, 0, encode, [])


def test_sums_count_what_full_attention_gets_right():
    scored = {3: PROSE, 4: QUOTES, 5: QUOTES, 6: QUOTES, 7: FACTS}
    document = Document(Text("text", [0, 1, 2, 3, 4, 5, 6, 7], 2, scored), {3: 0, 4: 1, 5: 1, 6: 1, 7: 3})
    full = Found([0] * 5, [9, 4, 5, 0, 7], [-1, -1, -1, -1, -2])
    found = Found([0.5, 0.25, 0.25, 4, 1], [9, 4, 8, 0, 7], [-1.5, -1, -2, -3, -2])
    sums = real_text.sums_of(document, full, found)
    assert sums[PROSE, 0] == {
        **{"tokens": 1, "right": 1, "kept": 1},
        **{"divergence": 0.5, "full_loss": 1, "loss": 1.5},
    }
    assert sums[QUOTES, 1] == {
        **{"tokens": 3, "right": 2, "kept": 1},
        **{"divergence": 4.5, "full_loss": 3, "loss": 6},
    }
    assert sums[FACTS, 3]["kept"] == 1


def test_shares_become_budgets(tmp_path):
    engine = Namespace(eligible=list(range(10)))
    setting = Setting("two passes", "DELTA", {"full_layers": 0, "selection_layers": [0, 4]})
    shares = [0.3, 0.5, 0.21]
    settings = real_text.with_shares(setting, shares, str(tmp_path), engine, 10, [4000])
    assert [found.name for found in settings] == ["two passes, 30%", "two passes, 50%"], "21% has no room"
    for found, share in zip(settings, shares, strict=False):
        attended = search.attended_share((0, 4), range(10), found.delta["budget_tokens"], [4000])
        assert share - 0.004 < attended <= share
    assert real_text.with_shares(setting, [], str(tmp_path), engine, 10, [4000]) == [setting]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--texts", "none.txt"], "there is no file none.txt"),
        (["--contexts", "512"], "at least 2048 tokens"),
        (["--shares", "1.5"], "above 0 and at most 1"),
        (["--shares", "0.5", "--budgets", "512"], "leave --budgets out"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    base = ["model", "--texts", str(tmp_path / "text.txt"), "--csv", str(tmp_path / "rows.csv")]
    with pytest.raises(SystemExit):
        real_text.parse_arguments([*base, *options])
    assert message in capsys.readouterr().err


def measure(*arguments):
    """The exit status of the benchmark, and the columns of its table, which `main` prints."""
    return real_text.main([str(argument) for argument in arguments])


def test_an_engine_measures_once(tiny_model, tmp_path):
    """A budget of the whole context loses nothing, a small one something, at the share that is asked for."""
    text, rows, settings = (tmp_path / name for name in ("text.txt", "rows.csv", "settings.json"))
    text.write_text(TEXT)
    layers = {"full_layers": 0, "selection_layers": [0, 4], "recent_tokens": 16, "sink_tokens": 0}
    settings.write_text(json.dumps([{"name": "two passes", "delta": layers}]))
    arguments = [tiny_model, "--texts", text, "--contexts", 3072, "--settings", settings, "--csv", rows]
    arguments += ["--dtype", "float32", "--shares", "0.3,1", "--parts", 2]
    assert in_engine_process(measure, *arguments) == 0
    found = read_csv(rows, TextLoss)
    assert {row.part for row in found} == {0, 1}
    few, whole = (
        [row for row in found if row.setting == name] for name in ("two passes, 30%", "two passes, 100%")
    )
    assert len(few) == len(whole) > 0
    assert sum(row.tokens for row in few) == sum(row.tokens for row in whole)
    assert abs(attended_share(few) - 0.3) < 0.01
    assert attended_share(whole) > 0.99
    assert divergence(whole) < 1e-4 < divergence(few)
    assert abs(rise(whole)) < 1e-4
    assert all(0 <= row.kept <= row.right <= row.tokens for row in found)
    assert in_engine_process(measure, *arguments) == 0
    assert read_csv(rows, TextLoss) == found, "nothing is measured twice"
    pictures = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for picture in pictures:
        assert plot_real_text.main([str(rows), str(picture)]) == 0
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert b"two passes" in pictures[0].read_bytes()


def test_accepted_drafts_are_counted(tiny_model, tmp_path, capsys):
    """Of DELTA's own drafts: each step gives one token, and those that are accepted."""
    text, rows = tmp_path / "text.txt", tmp_path / "rows.csv"
    text.write_text(TEXT)
    options = [tiny_model, "--texts", text, "--context", 3072, "--parts", 1, "--output", 33, "--csv", rows]
    options += ["--dtype", "float32", "--delta", '{"draft_tokens": 3, "draft_pages": "own"}']
    assert acceptance.main([str(option) for option in options]) == 0
    (row,) = read_csv(rows, Acceptance)
    accepted = [int(count) for count in row.accepted.split()]
    assert row.drafts >= accepted[0] >= accepted[1] >= accepted[2] > 0
    assert row.acceptance == pytest.approx(sum(accepted) / sum([row.drafts, *accepted[:2]]), abs=1e-4)
    assert row.drafts + sum(accepted) in range(32, 36), "but the first token, and drafts behind the end"
    assert json.loads(row.settings)["draft_when"] == "always"
    assert row.text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--texts", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--delta", '{"draft_tokens": 99}'], "delta.draft_tokens must be at most"),
        (["--parts", "0"], "needs prompts and output"),
        (["--ngram", "-1"], "no number may be below 0"),
    ],
)
def test_wrong_options_of_the_acceptance(tiny_model, capsys, options, message):
    with pytest.raises(SystemExit):
        acceptance.parse_arguments([str(tiny_model), *options])
    assert message in capsys.readouterr().err
