"""The accuracy benchmarks: sweeps, resumption, intervals, rows; with a small HTTP server and a real one."""

from __future__ import annotations

import json
import threading
from argparse import Namespace
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from conftest import in_fresh_process
from reasoner import vocabulary
from test_reasoner import solve

from benchmarks.accuracy import accuracy, lm_eval, lm_eval_reasoner
from benchmarks.accuracy.jobs import run_jobs
from benchmarks.accuracy.problems import Outcomes, ask_all, question_of, wilson
from benchmarks.accuracy.servers import activity
from benchmarks.accuracy.settings import Setting, label, parse_layers
from benchmarks.lib.base import BenchmarkError
from benchmarks.lib.csv_rows import read_csv
from benchmarks.lib.rows import Accuracy, TaskAccuracy

FAMILIES = "chase,trace,needles"


@pytest.fixture(autouse=True)
def logs(tmp_path_factory, monkeypatch):
    """Benchmarks that fail keep their logs where temporary files go."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("logs")))


class Oracle:
    """An OpenAI server that answers problems as `answer` does, which takes the problem's text.

    It counts what it is asked.
    """

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    def respond(self, path, body):
        if path == "/v1/completions":
            prompt = body["prompt"]
            tokens = [0, *vocabulary.encode(prompt)] if isinstance(prompt, str) else prompt
            text = vocabulary.decode(tokens)
        else:
            assert path == "/v1/chat/completions"
            text = body["messages"][-1]["content"]
            tokens = vocabulary.encode(text)
        self.asked.append(text)
        assert body["temperature"] == 0
        answer = self.answer(text)
        assert len(vocabulary.encode(answer)) < body["max_tokens"]
        message = {"role": "assistant", "content": f"<think> 1 </think> {answer}"}
        choice = {"index": 0, "finish_reason": "stop", "text": answer, "message": message}
        usage = {"prompt_tokens": len(tokens), "completion_tokens": len(vocabulary.encode(answer)) + 1}
        usage["total_tokens"] = sum(usage.values())
        return {
            "id": "1",
            "object": "text",
            "created": 1,
            "model": "oracle",
            "choices": [choice],
            "usage": usage,
        }


class CountingOracle(Oracle):
    """One with DELTA's counters, in which sparse layers attend to `attended` of 1000 tokens per question."""

    attended = 100

    def respond(self, path, body):
        if path != "/collective_rpc":
            return super().respond(path, body)
        assert body["method"] == "delta_counters"
        asked = len(self.asked)
        full = {"rows": asked, "attended_tokens": 1000 * asked, "context_tokens": 1000 * asked}
        sparse = full | {"attended_tokens": self.attended * asked}
        counts = {"layers": {"full": full, "selection": full, "sparse": sparse}}
        counts |= {name: sum(c[name] for c in counts["layers"].values()) for name in list(full)[1:]}
        return {"results": [counts]}


@contextmanager
def serving(answer, kind=Oracle):
    """An oracle, with the address that it listens on in `url`."""
    oracle = kind(answer)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def send(self, body):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            if self.path == "/v1/models":
                self.send({"data": [{"id": "oracle"}]})
            else:
                self.send_error(404)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send(oracle.respond(self.path, body))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    oracle.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield oracle
    finally:
        server.shutdown()
        server.server_close()


def spoiled(text):
    """The right answer, but for the third step."""
    words = solve(text).split()
    step = {"chase": 3, "trace": 6, "needles": 4}[text.split()[0]]
    words[2 * step + 1] = "?"
    return " ".join(words)


def run(folder, *options, script=accuracy, url=None):
    """Exit status of the benchmark, its files being in `folder`."""
    where = ["--url", url, "--name", "oracle"] if url else []
    return script.main([*where, "--csv", str(folder / "rows.csv"), "--commit", "c", *options])


def sweep(folder, oracle, *options):
    """The rows of a small sweep against `oracle`."""
    sizes = ["--lengths", "200,400", "--problems", "5", "--families", FAMILIES]
    assert run(folder, *sizes, *options, url=oracle.url) == 0
    return read_csv(folder / "rows.csv", Accuracy)


def test_right_answers_are_exact(tmp_path, capsys) -> None:
    with serving(solve) as oracle:
        rows = sweep(tmp_path, oracle)
    assert [(row.family, row.length) for row in rows] == [
        (family, length) for family in FAMILIES.split(",") for length in (200, 400)
    ]
    for row in rows:
        assert (row.problems, row.exact, row.accuracy, row.right_share) == (5, 5, 1.0, 1.0)
        assert (row.accuracy_low, row.accuracy_high) == (pytest.approx(0.5655, abs=1e-4), 1.0)
        assert (row.first_wrong_step, row.attended_share) == (None, None)
        assert (row.shape, row.weights, row.setting, row.commit) == ("oracle", "oracle", "oracle", "c")
        assert 5 < row.generated_tokens < 5 * row.length
    table = capsys.readouterr().out
    assert table.count("100.0%") == 3 * 2 * 3  # accuracy, the interval's end, right steps


def test_wrong_answers_are_counted_with_their_first_wrong_step(tmp_path) -> None:
    with serving(spoiled) as oracle:
        rows = sweep(tmp_path, oracle)
    for row in rows:
        assert (row.exact, row.accuracy, row.accuracy_low, row.first_wrong_step) == (0, 0.0, 0.0, 3.0)
        assert 0 < row.right_share < 1
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(lines) == 30
    for line in lines:
        wrong, right = line["wrong_step"].split(), line["right_step"].split()
        assert [*wrong[:1], *wrong[2:]] == [*right[:1], *right[2:]]
        assert (wrong[1], line["right_steps"]) == ("?", 2)


def test_answers_that_go_on_are_wrong_behind_their_last_step(tmp_path) -> None:
    with serving(lambda text: f"{solve(text)} 7") as oracle:
        rows = sweep(tmp_path, oracle, "--families", "needles")
    assert all(row.exact == 0 and row.right_share == 1 and row.first_wrong_step > 3 for row in rows)


def test_a_run_that_goes_on_asks_nothing_twice(tmp_path, capsys) -> None:
    with serving(solve) as oracle:
        rows = sweep(tmp_path, oracle)
        assert len(oracle.asked) == len(set(oracle.asked)) == 30

        # What a run that was killed leaves behind: a few outcomes, the last one cut off, and no rows.
        kept = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)[:13]
        (tmp_path / "rows.jsonl").write_text("".join([*kept[:-1], kept[-1][:50]]))
        (tmp_path / "rows.csv").unlink()
        again = sweep(tmp_path, oracle)
        assert len(oracle.asked) == 30 + 18
        assert "12 of 30 outcomes" in capsys.readouterr().err

        def measured(row):
            return {**accuracy._measured(row), "seconds": None}

        assert list(map(measured, again)) == list(map(measured, rows))
        assert sweep(tmp_path, oracle) == again  # rows are not written twice
        assert len(oracle.asked) == 48

        more = sweep(tmp_path, oracle, "--problems", "6")
        assert len(oracle.asked) == 48 + 6
        assert [row.problems for row in more] == [5] * 6 + [6] * 6
        sweep(tmp_path, oracle, "--seed", "1")
        assert len(oracle.asked) == 54 + 30


def test_attended_tokens_are_counted_over_interruptions(tmp_path) -> None:
    """Each run's counters begin where its questions begin."""
    options = ["--backends", "delta", "--delta", '{"budget_tokens": 64}', "--families", "needles"]
    with serving(solve, CountingOracle) as oracle:
        sweep(tmp_path, oracle, *options, "--problems", "2")
        rows = sweep(tmp_path, oracle, *options)
    for row, problems in zip(rows, (2, 2, 5, 5), strict=True):
        assert (row.problems, row.context_tokens, row.attended_tokens) == (
            problems,
            problems * 3000,
            problems * 2100,
        )
        assert (row.sparse_context_tokens, row.attended_share) == (problems * 1000, 0.7)


def test_delta_has_to_be_at_work(tmp_path, capsys) -> None:
    options = [
        "--backends",
        "DELTA",
        "--delta",
        '{"budget_tokens": 64}',
        "--lengths",
        "200",
        "--problems",
        "2",
    ]
    with serving(solve, CountingOracle) as oracle:
        oracle.attended = 1000
        assert run(tmp_path, *options, url=oracle.url) == 1
        assert len(oracle.asked) == 6
    error = capsys.readouterr().err
    assert error.count("sparse layers attended to every token, although the context exceeds the budget") == 3
    assert not (tmp_path / "rows.csv").exists()


def test_outcomes_of_other_problems_and_settings_are_not_taken(tmp_path) -> None:
    outcomes = Outcomes(tmp_path / "o.jsonl")
    answerer = {"setting": "a", "backend": "b", "settings": "{}", "weights": "w", "dtype": "d", "options": []}
    question = question_of("chase", 100, 0, 0)
    first = {"seconds": 1.0, "counts": {"rows": 4}, "run": "one"}
    outcomes.add(answerer | question | first)
    outcomes.add(answerer | question_of("chase", 100, 0, 1) | first | {"seconds": 3.0, "counts": {"rows": 9}})
    outcomes.add(answerer | question_of("chase", 100, 0, 2) | first | {"run": "two"})
    for where in (outcomes, Outcomes(tmp_path / "o.jsonl")):
        assert where.find(answerer, question) == answerer | question | first
        assert where.segments(answerer, "chase", 100, 0) == ({"rows": 13}, 4.0)
        assert where.segments(answerer, "chase", 100, 1) == ({}, 0)
        for change in ({"index": 3}, {"seed": 1}, {"problem": "00000000"}):
            assert where.find(answerer, question | change) is None
        for change in ({"setting": "c"}, {"weights": "v"}, {"settings": '{"page_size": 32}'}):
            assert where.find(answerer | change, question) is None
    assert question_of("chase", 100, 0, 0) == question
    assert question_of("needles", 100, 0, 0)["problem"] != question["problem"]


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe, Statistics in Medicine 17 (1998), table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (0, 0, 0.0, 1.0),
    ],
)
def test_confidence_intervals(right, of, low, high) -> None:
    assert wilson(right, of) == pytest.approx((low, high), abs=5e-5)


def settings_of(tmp_path, *options):
    arguments = ["--model", str(tmp_path), "--csv", str(tmp_path / "rows.csv"), *options]
    return accuracy.parse_arguments(arguments).expanded


@pytest.fixture
def model_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8192}')
    return tmp_path


def test_sweeps_multiply_out(model_folder) -> None:
    dense = settings_of(model_folder, "--backends", "CPU_ATTN,DELTA")
    assert dense == [Setting("CPU_ATTN", "CPU_ATTN"), Setting("DELTA", "DELTA")]
    assert [setting.backend for setting in settings_of(model_folder)][1:] == ["DELTA"]

    swept = settings_of(
        model_folder,
        *["--backends", "DELTA", "--policies", "delta,quest", "--budgets", "256,512"],
        *["--page-sizes", "16", "--selection-layers", "2,6,9;3;auto", "--delta", '{"sink_tokens": 0}'],
        *["--recent-tokens", "64"],
    )
    assert len(swept) == 2 * 3 * 2
    assert swept[0] == Setting(
        "delta layers=2-6-9 page=16 recent=64 budget=256",
        "DELTA",
        {
            "sink_tokens": 0,
            "policy": "delta",
            "selection_layers": [2, 6, 9],
            "page_size": 16,
            "recent_tokens": 64,
            "budget_tokens": 256,
        },
    )
    assert [setting.delta["budget_tokens"] for setting in swept[:3]] == [256, 512, 256]
    assert [setting.delta["selection_layers"] for setting in swept[2::4]][:2] == [[3], [2, 6, 9]]
    assert swept[-1].name == "quest layers=auto page=16 recent=64 budget=512"
    assert parse_layers("auto;3,5") == ["auto", [3, 5]]
    assert label({"budget_tokens": 64}) == "DELTA budget=64"


def test_settings_come_from_a_file(model_folder) -> None:
    path = model_folder / "settings.json"
    path.write_text(
        json.dumps([{"name": "d", "backend": "CPU_ATTN"}, {"name": "q", "delta": {"policy": "quest"}}])
    )
    listed = [Setting("d", "CPU_ATTN"), Setting("q", "DELTA", {"policy": "quest"})]
    assert settings_of(model_folder, "--settings", str(path)) == listed
    more = settings_of(model_folder, "--settings", str(path), "--budgets", "64")
    assert more == [*listed, Setting("DELTA budget=64", "DELTA", {"budget_tokens": 64})]


def test_settings_come_from_a_calibration(model_folder) -> None:
    """The sets that it compared, each with the budget that it was made for."""
    found = {
        "calibrated": {"full_layers": 0, "selection_layers": [0, 4], "divergence": 0.1},
        "peaks": {"full_layers": 1, "selection_layers": [5], "divergence": 0.2},
    }
    delta = {"full_layers": 0, "selection_layers": [0, 4], "budget_tokens": 512}
    path = model_folder / "calibration.json"
    path.write_text(json.dumps({"delta": delta, "calibration": {"compared": found}}))
    assert settings_of(model_folder, "--settings", str(path), "--backends", "CPU_ATTN") == [
        Setting("CPU_ATTN", "CPU_ATTN"),
        Setting("calibrated", "DELTA", delta),
        Setting("peaks", "DELTA", delta | {"full_layers": 1, "selection_layers": [5]}),
    ]


@pytest.mark.parametrize(("policy", "fails"), [("quest", False), ("delta", True)])
def test_only_a_policy_that_reads_to_choose_may_read_more_than_all(policy, fails) -> None:
    counts = {
        "layers": {"sparse": {"rows": 10, "attended_tokens": 700, "context_tokens": 650}},
        "attended_tokens": 700,
        "context_tokens": 650,
    }
    setting = Setting("a", "DELTA", {"policy": policy, "budget_tokens": 64})
    if fails:
        with pytest.raises(BenchmarkError, match="attended to every token"):
            activity("b", setting, counts, 65)
    else:
        assert activity("b", setting, counts, 65)["attended_share"] == pytest.approx(700 / 650, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--settings", "{folder}/old.json"], "it has no 'full_layers'"),
        (["--settings", "{folder}/twice.json"], "every setting needs a name of its own; several have: a"),
        (["--settings", "{folder}/odd.json"], 'a setting has "name", "backend" and "delta", not {"nom": 1}'),
        (["--lengths", "10000"], "has no positions for problems of 10000 tokens"),
        (["--families", "sums"], "one of chase, trace, needles, not 'sums'"),
        (["--lengths", "20"], "a problem of the family chase has 32 tokens or more, not 20"),
        (["--budgets", "many"], "invalid parse_numbers value"),
        (["--problems", "0"], "at least one problem"),
        (["--url", "http://localhost:1"], "not allowed with argument --model"),
    ],
)
def test_what_makes_no_sense_is_refused(model_folder, capsys, options, message) -> None:
    (model_folder / "twice.json").write_text('[{"name": "a"}, {"name": "a"}]')
    (model_folder / "odd.json").write_text('[{"nom": 1}]')
    old = {"delta": {"full_layers": 0}, "calibration": {"compared": {"mass": {"passes": [0, 4]}}}}
    (model_folder / "old.json").write_text(json.dumps(old))
    with pytest.raises(SystemExit):
        settings_of(model_folder, *(option.format(folder=model_folder) for option in options))
    assert message in capsys.readouterr().err


def test_a_server_that_is_not_there_is_an_error(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, url="http://127.0.0.1:1")
    assert "does not name a model" in capsys.readouterr().err


def test_picture_of_a_training(tmp_path, capsys) -> None:
    """Of logs one after another, the same each time; other files are refused."""
    from benchmarks.accuracy import plot_training

    log = tmp_path / "log.csv"
    rows = [f"{step},{100 * step + 50},{4 / (step + 1)},128,{1 - 0.5**step}" for step in range(12)]
    log.write_text("\n".join(["step,tokens,loss,length_chase,right_chase", *rows]))
    pictures = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for picture in pictures:
        assert plot_training.main([str(log), str(log), str(picture)]) == 0
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    tokens = plot_training.read_logs([log, log])["tokens"]
    assert tokens[12:] == [tokens[11] + seen for seen in tokens[:12]]
    log.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        plot_training.main([str(log), str(pictures[0])])
    assert "no log of a training" in capsys.readouterr().err


def test_picture(tmp_path) -> None:
    from benchmarks.accuracy import plot_accuracy

    with serving(solve) as oracle:
        sweep(tmp_path, oracle)
    out = tmp_path / "picture.svg"
    assert plot_accuracy.main([str(tmp_path / "rows.csv"), str(out)]) == 0
    picture = out.read_bytes()
    assert b"needles" in picture
    assert plot_accuracy.main([str(tmp_path / "rows.csv"), str(out)]) == 0
    assert out.read_bytes() == picture


def jobs_of(oracle, count):
    groups = [[question_of("needles", 100, 0, index) for index in range(3)]]
    shared = {"groups": groups, "url": oracle.url, "concurrency": 2, "timeout": 60, "max_model_len": None}
    setting = {"backend": "unknown"}
    return [{"setting": setting | {"name": f"s{number}"}, "log": "", **shared} for number in range(count)]


@pytest.mark.parametrize("parallel", [1, 2])
def test_settings_run_one_after_another_or_through_ray(parallel) -> None:
    """One that fails does not stop the others, and is reported in the end."""
    taken = []
    with serving(solve) as oracle:
        jobs = jobs_of(oracle, 3)
        jobs[1]["url"] = "http://127.0.0.1:1"
        (error,) = run_jobs(
            *(Namespace(parallel=parallel, platform="cpu"), ask_all, jobs),
            lambda number, outcome: taken.append((number, outcome["index"], outcome["exact"])),
        )
        assert len(oracle.asked) == 6
    assert error.startswith("s1: ServerError: ")
    assert sorted(taken) == [(number, index, True) for number in (0, 2) for index in range(3)]


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    assert lm_eval_reasoner.main([str(folder), "--lengths", "200", "--problems", "4"]) == 0
    return folder


@pytest.mark.parametrize("ways", [(), ("--chat", "--think-end", "</think>")])
def test_lm_eval_scores_right_answers(tmp_path, tasks, monkeypatch, ways) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = ["--tasks", "reasoner_chase_200,reasoner_trace_200", "--include-path", str(tasks), *ways]
    options += ["--keep", str(tmp_path / "keep")]

    def answer(text):
        return spoiled(text) if text.startswith("trace") else solve(text)

    with serving(answer) as oracle:
        assert run(tmp_path, *options, script=lm_eval, url=oracle.url) == 0
        assert len(oracle.asked) == len(set(oracle.asked)) == 8
    rows = read_csv(tmp_path / "rows.csv", TaskAccuracy)
    assert [(row.task, row.metric, row.value, row.samples) for row in rows] == [
        ("reasoner_chase_200", "exact_match", 1.0, 4),
        ("reasoner_trace_200", "exact_match", 0.0, 4),
    ]
    assert [row.stderr for row in rows] == [0.0, 0.0]
    assert list((tmp_path / "keep").rglob("samples_*.jsonl"))


class FakeEngine:
    """Guesses right, but for the third step where the budget is small; counts as DELTA would."""

    eligible: ClassVar = [0, 1, 2]

    def __init__(self):
        self.used = []
        self.rows = 0

    def use(self, settings):
        self.used.append(settings)

    def guesses(self, tokens, first_row):
        self.rows += len(tokens) - first_row
        guesses = [*tokens[first_row:], vocabulary.token_ids()[vocabulary.EOS]]
        if self.used[-1]["budget_tokens"] < 200:
            family = vocabulary.words()[tokens[1]]
            guesses[2 * {"chase": 3, "trace": 6, "needles": 4}[family] + 1] = 0
        return guesses

    def counters(self):
        layer = {"rows": self.rows, "attended_tokens": self.rows, "context_tokens": 2 * self.rows}
        return {
            "layers": {"sparse": layer},
            **{name: layer[name] for name in ("attended_tokens", "context_tokens")},
        }


def test_right_answers_are_judged(tmp_path, monkeypatch) -> None:
    from benchmarks.accuracy import forced

    engine = FakeEngine()
    monkeypatch.setattr(forced, "_engine", lambda job: engine)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"max_position_embeddings": 2048}')
    options = ["--model", str(model), "--forced", "--lengths", "400", "--problems", "3"]
    options += ["--families", FAMILIES, "--backends", "CPU_ATTN,DELTA", "--budgets", "160,256"]
    assert run(tmp_path, *options) == 0
    rows = read_csv(tmp_path / "rows.csv", Accuracy)
    assert [(row.setting, row.exact) for row in rows if row.family == "trace"] == [
        ("CPU_ATTN", 3),
        ("DELTA budget=160", 0),
        ("DELTA budget=256", 3),
    ]
    for row in rows:
        assert row.way == "forced"
        assert row.first_wrong_step == (None if row.exact else 3.0)
        assert row.attended_share == (None if row.backend == "CPU_ATTN" else 0.5)
    assert engine.used[0]["full_layers"] == 3 and engine.used[0]["selection_layers"] == []
    assert {**engine.used[1], "budget_tokens": 256} == engine.used[2]
    assert engine.used[1]["recent_tokens"] == 128, "the default, whatever the engine was started with"
    asked = engine.rows
    assert run(tmp_path, *options) == 0
    assert engine.rows == asked, "a second run finds the outcomes"
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert all("--forced" in json.loads(line)["options"] for line in lines)
    with pytest.raises(SystemExit):
        run(tmp_path, *options, "--parallel", "2")


def test_what_an_engine_needs_for_all_settings() -> None:
    from benchmarks.accuracy import engines

    deltas = [{}, {"budget_tokens": 4096}, {"page_size": 64, "sink_tokens": 64}, {"page_size": 128}]
    needs = engines.engine_options(deltas, 1000, {"dtype": "float32"})
    options = {"dtype": "float32", "block_size": 64}
    assert needs == {"page_size": 16, "budget": 4096, "length": 1000, "options": options}


@pytest.mark.slow
def test_a_real_server(tmp_path, capsys) -> None:
    """What the script starts, asks and counts; the tiny model has never learned to answer."""
    import torch
    from reasoner.model import Reasoner, Size, export

    torch.manual_seed(0)
    export(Reasoner(Size(num_layers=3, max_length=1024)), tmp_path / "model")
    settings = [
        {"name": "small", "delta": {"full_layers": 1, "budget_tokens": 128, "recent_tokens": 32}},
        {"name": "wrong", "delta": {"budget_tokens": 16}},
    ]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    options = ["--model", str(tmp_path / "model"), "--settings", str(tmp_path / "settings.json")]
    options += ["--families", "chase", "--lengths", "500", "--problems", "3"]
    options += ["--enforce-eager", "--gpu-memory-utilization", "0.3"]
    assert run(tmp_path, *options) == 1
    error = "wrong: vllm serve refuses it: delta.budget_tokens (16) must be at least delta.recent_tokens"
    assert error in capsys.readouterr().err
    (row,) = read_csv(tmp_path / "rows.csv", Accuracy)
    assert (row.setting, row.shape, row.problems, row.exact) == ("small", "model", 3, 0)
    assert (row.accuracy_low, row.first_wrong_step) == (0.0, 1.0)
    assert 0 < row.generated_tokens < 3 * 500
    assert 0 < row.sparse_attended_tokens <= 128 / 250 * row.sparse_context_tokens
    assert row.attended_share == pytest.approx(row.attended_tokens / row.context_tokens, abs=1e-6)
    # Three layers saw each decode row, of which an answer's first token is none. A step may have been under
    # way when an answer ended.
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    contexts = [line["prompt_tokens"] + i for line in lines for i in range(1, line["generated_tokens"])]
    assert 1 <= row.context_tokens / (3 * sum(contexts)) < 1.03
    # Judged in one engine, right answers are as wrong, and as long.
    options = ["--model", str(tmp_path / "model"), "--forced", "--families", "chase", "--lengths", "500"]
    delta = json.dumps(settings[0]["delta"])
    options += ["--problems", "3", "--backends", "DELTA", "--delta", delta]
    options += ["--engine", '{"gpu_memory_utilization": 0.3}']
    assert in_fresh_process(run, tmp_path, *options) == 0
    forced = read_csv(tmp_path / "rows.csv", Accuracy)[-1]
    assert (forced.way, forced.problems, forced.exact, forced.first_wrong_step) == ("forced", 3, 0, 1.0)
    assert 0 < forced.sparse_attended_tokens < forced.sparse_context_tokens
