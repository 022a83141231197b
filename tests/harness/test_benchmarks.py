"""The benchmarks themselves: files, rows, tables and command lines, and the comparison of two commits."""

from __future__ import annotations

import ast
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
from conftest import ROOT

from benchmarks import RESULTS
from benchmarks.across import compare, query, report
from benchmarks.across.catalogue import SOURCES, source_of
from benchmarks.kernels import kernels
from benchmarks.kernels.timing import Timing
from benchmarks.lib.cases import Case
from benchmarks.lib.csv_rows import append_csv, read_csv
from benchmarks.lib.processes import checkout_first
from benchmarks.lib.provenance import describe_environment
from benchmarks.lib.rows import Comparison, Generation, KernelTime, Measurement
from benchmarks.speed import lossless, profile_steps

BENCHMARKS = ROOT / "benchmarks"
ROOMS = ("speed", "kernels", "accuracy", "across", "lib")
SCRIPTS = [
    f"benchmarks.{path.parent.name}.{path.stem}"
    for room in ROOMS
    for path in sorted((BENCHMARKS / room).glob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text()
]
LAUNCHERS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.stem != "__init__")


# --- files ---------------------------------------------------------------------------------------


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_strangers_and_share_the_library(room):
    allowed = {"lib": {"lib"}, "across": {"across", "speed", "lib"}}.get(room, {room, "lib"})
    for path in (BENCHMARKS / room).glob("*.py"):
        parts = [name.split(".") for name in imports_of(path)]
        used = {words[1] for words in parts if words[0] == "benchmarks" and len(words) > 1}
        assert used <= allowed, path
        assert "sys.path" not in path.read_text() or path.name == "jobs.py", path
        assert len(path.read_text().splitlines()) < 400, path


@pytest.mark.parametrize("module", SCRIPTS)
def test_every_script_has_help(module, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main(["--help"])
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_the_second_accuracy_benchmark_has_help(capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module("benchmarks.accuracy.accuracy").main(["lm-eval", "--help"])
    assert end.value.code == 0
    assert "lm-eval" in capsys.readouterr().out


def test_launchers_name_scripts():
    named = {ast.parse((BENCHMARKS / name).read_text()).body[-1].body[1].module for name in LAUNCHERS}
    assert named <= set(SCRIPTS)
    assert len(named) == len(LAUNCHERS) == 10


def test_a_launcher_runs_in_any_folder(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "report.py"), "--check"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=tmp_path, env=env, check=True)


def test_workers_import_this_checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert checkout_first() == {"PYTHONPATH": f"{ROOT}{os.pathsep}/elsewhere"}
    monkeypatch.delenv("PYTHONPATH")
    assert checkout_first() == {"PYTHONPATH": str(ROOT)}


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_every_result_has_a_row_class_and_a_script(path):
    source = source_of(path.name)
    rows = read_csv(path, source.kind)
    assert rows
    if not path.name.startswith("train_"):  # which are as the training writes them
        assert b"\r" not in path.read_bytes()
        for row in rows:
            assert row.date and row.commit and row.machine and row.cores > 0
            assert source.script.split()[0] in row.command


def test_every_kind_of_result_has_a_script_that_exists():
    for source in SOURCES:
        words = source.script.removeprefix("-m ").split()
        where = words[0].removesuffix(".py").replace(".", "/")
        assert (ROOT / f"{where}.py").is_file() or (ROOT / "tools" / f"{where}.py").is_file(), source
    with pytest.raises(LookupError, match=r"no script here makes profile\.csv"):
        source_of("profile.csv")


def test_commands_do_not_say_whose_machine_it_was(monkeypatch):
    words = [
        "x.py",
        "/home/me/model",
        "--texts",
        "/home/me/a.txt,/home/b.txt",
        "--csv=/tmp/rows.csv",
        "--n",
        "1",
    ]
    monkeypatch.setattr("sys.argv", words)
    command = describe_environment("benchmarks/x.py")["command"]
    assert command == "python benchmarks/x.py model --texts a.txt,b.txt --csv=rows.csv --n 1"


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "folder" / "rows.csv"
    (row, *_) = read_csv(RESULTS / "decode_cpu.csv", Measurement)
    rows = [row, replace(row, kv_capacity_tokens=None, settings='{"a": "b, c"}')]
    for each in rows:
        append_csv(path, each)
    assert read_csv(path, Measurement) == rows
    with pytest.raises(ValueError, match="other columns than this version writes"):
        append_csv(path, read_csv(RESULTS / "generate_cuda.csv", Generation)[0])


# --- tables --------------------------------------------------------------------------------------


def test_the_documentation_has_the_tables_of_the_results(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_a_table_is_written_and_checked(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: decode_cpu tiny28 short -->\nold\n<!-- end -->\nbehind\n")
    assert report.main(["--check", str(page)]) == 1
    assert "old" in page.read_text()
    assert report.main([str(page)]) == 0
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-2], lines[-1]) == ("before", "<!-- end -->", "behind")
    rows = [row for row in read_csv(RESULTS / "decode_cpu.csv", Measurement) if row.shape == "tiny28"]
    cases = {row.case for row in rows if row.date == rows[-1].date}
    assert len(lines) == 4 + 2 + len(cases)
    assert report.main(["--check", str(page)]) == 0
    assert "run benchmarks/report.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: sums -->\n<!-- end -->", "no table is called sums"),
        ("<!-- table: decode_cpu -->\n", "needs a line of its own, and an <!-- end -->"),
        ("<!-- table: decode_cpu no -->\n<!-- end -->", "decode_cpu.csv has no rows of no that fit"),
        ("<!-- table: decode_cpu commit=no -->\n<!-- end -->", "has no rows that fit"),
        ("<!-- table: decode_cpu day=1 -->\n<!-- end -->", "day is none of machine, commit"),
    ],
)
def test_a_marker_that_is_wrong_is_an_error(tmp_path, capsys, text, message):
    page = tmp_path / "page.md"
    page.write_text(text)
    assert report.main([str(page)]) == 2
    assert message in capsys.readouterr().err
    assert page.read_text() == text


def test_the_latest_run_of_a_shape_and_machine_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(query, "RESULTS", tmp_path)
    (row, *_) = read_csv(RESULTS / "decode_cpu.csv", Measurement)
    rows = [
        replace(row, date="2026-01-02", commit="late", machine="Some CPU", shape="a", round=1),
        replace(row, date="2026-01-02", commit="late", machine="Some CPU", shape="a", round=2),
        replace(row, date="2026-01-01", commit="early", machine="Some CPU", shape="a"),
        replace(row, date="2026-01-03", commit="other", machine="Another", shape="a"),
        replace(row, date="2026-01-04", commit="shape", machine="Some CPU", shape="b"),
    ]
    for each in rows:
        append_csv(tmp_path / "decode_cpu.csv", each)

    def found(marker):
        return [(row.commit, row.round) for row in query.Query.parse(marker).rows(Measurement)]

    assert found("decode_cpu a machine=SomeCPU") == [("late", 1), ("late", 2)]
    assert found("decode_cpu a") == [("other", 1)]
    assert found("decode_cpu") == [("shape", 1)]
    assert found("decode_cpu a commit=early") == [("early", 1)]
    assert found("decode_cpu a,b machine=SomeCPU") == [("late", 1), ("late", 2), ("shape", 1)]


# --- scripts -------------------------------------------------------------------------------------


def test_kernel_times_become_rows(tmp_path, monkeypatch, capsys):
    """On any platform, by its module's functions; a second run appends, other columns are refused."""
    platform = SimpleNamespace(
        SHAPES={"small": (4, 2, 64)},
        CASES="1x1k,2x4k",
        ROUNDS=3,
        prepare=lambda: 2e10,
        measure=lambda case, heads, dtype, rounds: [Timing("dense", 10.0 * case.batch, 1.0, 10**5)],
    )
    monkeypatch.setattr(kernels, "platform_of", lambda name: platform)
    monkeypatch.setattr(kernels, "find_machine", lambda: ("cpu", "Some CPU"))
    path = tmp_path / "k.csv"
    for _ in range(2):
        assert kernels.main(["--csv", str(path), "--commit", "c"]) == 0
    rows = read_csv(path, KernelTime)
    assert [(row.shape, str(row.case), row.microseconds) for row in rows[:2]] == [
        ("small", "1x1k", 10.0),
        ("small", "2x4k", 20.0),
    ]
    assert len(rows) == 4
    assert (rows[0].gb_per_second, rows[0].memory_gb_per_second, rows[0].commit) == (10.0, 20.0, "c")
    assert "50%" in capsys.readouterr().out
    path.write_text("a,b\n")
    for options, message in (
        (["--csv", str(path)], "has other columns"),
        (["--shapes", "large"], "no shape 'large'; there are small"),
        (["--tune"], "--tune and --query-tokens are about the GPU's kernels"),
        (["--query-tokens", "8"], "--tune and --query-tokens are about the GPU's kernels"),
    ):
        with pytest.raises(SystemExit):
            kernels.main(options)
        assert message in capsys.readouterr().err


def test_a_token_of_lossless_speculation_is_timed(monkeypatch, capsys):
    """By the ends of sequences; a batch in which nothing was drafted has a row, too."""
    monkeypatch.setattr(
        lossless,
        "timed_ends",
        lambda _llm, _prompts, output: (
            [0.0] * (1 + output // 8),
            [0.5 + 0.01 * output, 0.7 + 0.01 * output],
        ),
    )
    seconds, per_step = lossless.slope(None, [{}, {}], 16, 144)
    assert seconds == pytest.approx(0.01)
    assert per_step == 8
    nothing = {"layers": {role: {"rows": 0} for role in ("full", "selection", "sparse")}}
    assert set(lossless.token_counts("this", nothing, 2048).values()) == {0}
    facts = {"kv_capacity_tokens": 10000, "peak_memory_bytes": 1 << 30}
    machine = {
        "date": "2026-01-01",
        "commit": "0" * 12,
        "machine": "M",
        "cores": 2,
        "vllm": "1",
        "torch": "1",
    }
    run = machine | {"vllm_delta": "1", "python": "3", "command": "c", "shape": "s", "dtype": "d"}
    arguments = SimpleNamespace(
        lengths=[16, 144],
        kv_cache_dtype="auto",
        budget_tokens=2048,
        positions=131072,
        ngram=0,
        platform="cuda",
        delta={"draft_tokens": 3},
    )
    rows = []
    for backend, rate, ms in (("FLASH_ATTN", None, 16.0), ("DELTA", 0.98, 8.0)):
        result = {"samples_ms": [ms], "tokens_per_step": 1.0, "counts": {}, "facts": facts}
        shared = run | {"backend": backend, "settings": "{}", "baseline": "FLASH_ATTN"}
        rows.append(lossless.to_row(Case(24, 32768), rate, result, arguments, shared))
    assert rows[1].tokens_per_second == 3000
    lines = lossless.table(rows).splitlines()
    assert lines[2].split() == ["24x32k", "DELTA", "98%", "8.00", "3000", "2.00x", "1.00", "1.00", "GiB"]
    synthetic = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [1.0, 1.0, 1.0]}
    drafts = {"num_speculative_tokens": 3}
    assert lossless.speculation(arguments, "m") == {
        "method": "draft_model",
        "model": "m",
        "draft_sample_method": "probabilistic",
        **synthetic,
        **drafts,
    }
    arguments.ngram, arguments.delta = 3, {}
    ngram = {"method": "ngram", "prompt_lookup_max": 4}
    assert lossless.speculation(arguments, "m") == ngram | synthetic | drafts
    arguments.platform = "cpu"
    assert lossless.speculation(arguments, "m") == ngram | drafts
    # With drafts for both, the speed-up is over the same rate.
    rows = [replace(row, ngram_tokens=3, acceptance=0.5) for row in rows]
    rows.append(replace(rows[0], acceptance=1.0, ms_per_token=12.0))
    assert [line.split()[5] for line in lossless.table(rows).splitlines()[1:]] == ["-", "2.00x", "-"]


def test_a_profile_has_the_time_of_every_part(monkeypatch):
    """Parts that contain one another, over the steps that are asked for."""
    module = ModuleType("vllm.v1.worker.utils")
    module.AttentionGroup = type("AttentionGroup", (), {"build_metadata": lambda self: time.sleep(0.002)})
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.utils", module)
    group = module.AttentionGroup()
    nothing = SimpleNamespace(
        schedule=lambda: None,
        update_from_output=lambda: None,
        sample_tokens=lambda: None,
        process_outputs=lambda: None,
    )
    nothing.execute_model = lambda: [group.build_metadata() for _ in range(3)]
    core = SimpleNamespace(scheduler=nothing, model_executor=nothing)
    engine = SimpleNamespace(engine_core=SimpleNamespace(engine_core=core), output_processor=nothing)
    engine.step = lambda: [nothing.schedule(), nothing.execute_model()]
    clock = profile_steps.StepClock(SimpleNamespace(llm_engine=engine))
    for _ in range(4):
        engine.step()
    assert len(clock.steps) == 5
    means = profile_steps.means(clock.steps[2:4])
    assert list(means) == list(profile_steps.PARTS)
    calls = {part: columns["calls_per_step"] for part, columns in means.items()}
    assert calls == {
        **dict.fromkeys(profile_steps.PARTS, 0),
        **{"step": 1, "schedule": 1, "execute_model": 1, "attention_metadata": 3},
    }
    wall = {part: columns["ms_per_step"] for part, columns in means.items()}
    assert 6 <= wall["attention_metadata"] <= wall["execute_model"] <= wall["step"]
    assert means["attention_metadata"]["cpu_ms_per_step"] < 6, "it sleeps"


# --- two commits ---------------------------------------------------------------------------------

STUB_SETUP = "from setuptools import setup\nsetup(name='stub', packages=['vllm_delta'])\n"
STUB_TESTS = "from vllm_delta import VALUE\n\ndef test_value():\n    assert VALUE != 13\n"
STUB_BENCH = """import csv, os, sys, time
from pathlib import Path
from vllm_delta import VALUE, COLUMN
Path(sys.argv[2]).with_suffix(".pid").write_text(str(os.getpid()))
time.sleep(float(sys.argv[3]))
with Path(sys.argv[2]).open("w") as file:
    csv.writer(file).writerows([
        ["shape", "batch", "context", COLUMN[0], COLUMN[1]],
        ["tiny", 1, 1024, "sparse", VALUE],
        ["tiny", 4, 1024, "sparse", 2 * VALUE],
    ])
"""


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits with tags, whose kernels take 10 and 5; a third one's test fails."""
    folder = tmp_path / "repository"
    for name, text in (
        ("setup.py", STUB_SETUP),
        ("tests/test_kernels.py", STUB_TESTS),
        ("benchmarks/kernels.py", STUB_BENCH),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(tmp_path, "init", "--quiet", str(folder))
    (folder / "vllm_delta").mkdir()
    for tag, value, column in (
        ("old", 10, ("layer", "us")),
        ("new", 5, ("kernel", "microseconds")),
        ("red", 13, ("kernel", "microseconds")),
    ):
        (folder / "vllm_delta" / "__init__.py").write_text(f"VALUE, COLUMN = {value}, {column}\n")
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "--message", tag)
        git(folder, "tag", tag)
    monkeypatch.setattr(compare, "REPOSITORY", folder)
    monkeypatch.setattr(compare, "find_machine", lambda: ("cpu", "Some CPU"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return folder


def run_compare(tmp_path, *commits, pause="0"):
    options = ["--rounds", "2", "--csv", str(tmp_path / "c.csv"), "--", pause]
    return compare.main([*commits, *options])


def is_clean(repository):
    """Neither a worktree nor a folder is left."""
    trees = list(repository.parent.glob("*/?/tree"))
    return git(repository, "worktree", "list").count("\n") == 1 and not trees


def test_two_commits_are_compared(tmp_path, repository, capsys):
    """Each by its own package, and by the columns that its script writes."""
    (repository / "vllm_delta" / "__init__.py").write_text("VALUE, COLUMN = 1000, None  # not committed\n")
    assert run_compare(tmp_path, "old", "new") == 0
    rows = read_csv(tmp_path / "c.csv", Comparison)
    assert [(row.case, row.round) for row in rows] == [
        (f"tiny, sparse, batch {batch}, context 1024", round_) for round_ in (1, 2) for batch in (1, 4)
    ]
    assert {(row.metric, row.ratio, row.value_a // row.value_b) for row in rows} == {("microseconds", 0.5, 2)}
    hashes = [git(repository, "rev-parse", name).strip() for name in ("old", "new")]
    assert all(row.commit_a == hashes[0][:12] and row.commit_b == hashes[1][:12] for row in rows)
    assert "0.500-0.500" in capsys.readouterr().out
    assert is_clean(repository)


def test_a_commit_whose_tests_fail_is_not_timed(tmp_path, repository, capsys):
    assert run_compare(tmp_path, "new", "red") == 1
    assert "the kernel tests of red" in (error := capsys.readouterr().err)
    assert "are red, so nothing is timed (1 failed" in error
    assert not (tmp_path / "c.csv").exists()
    assert is_clean(repository)


def test_a_commit_that_is_not_there_is_an_error(tmp_path, repository, capsys):
    with pytest.raises(SystemExit):
        run_compare(tmp_path, "new", "nowhere")
    assert f"there is no commit called nowhere in {repository}." in capsys.readouterr().err


def test_a_comparison_that_is_interrupted_leaves_nothing_behind(tmp_path, repository, capsys):
    """By Ctrl-C: neither worktrees nor the benchmark that runs then."""
    found = []

    def interrupt():
        deadline = time.monotonic() + 60
        while not found and time.monotonic() < deadline:
            time.sleep(0.1)
            found.extend(text for path in tmp_path.glob("*/a/*.pid") if (text := path.read_text()))
        os.kill(os.getpid(), signal.SIGINT)

    # A shell's background job begins with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert run_compare(tmp_path, "old", "new", pause="60") == 130
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert "interrupted" in capsys.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(int(found[0]), 0)
    assert is_clean(repository)
    assert not list(tmp_path.glob("compare-*"))
