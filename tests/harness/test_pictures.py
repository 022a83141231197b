"""The pictures of the benchmarks, drawn from the rows that are committed."""

import re
from dataclasses import replace
from importlib import import_module

import pytest
from conftest import ROOT

from benchmarks import RESULTS
from benchmarks.across.catalogue import PICTURES
from benchmarks.lib.csv_rows import read_csv
from benchmarks.lib.rows import Serving

#: drawn by a calibration from what it measured
OTHER_PICTURES = {"calibration_reasoner.svg"}


def words_of(picture: str) -> list[str]:
    """Letters are drawn; the words stand in comments."""
    return re.findall("<!-- (.*?) -->", picture)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_that_of_the_results_and_the_same_each_time(tmp_path, name):
    module, results = PICTURES[name]
    plot = import_module(module)
    pictures = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for picture in pictures:
        assert plot.main([*(str(RESULTS / result) for result in results), str(picture)]) == 0
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    words = words_of(pictures[0].read_text())
    assert words == words_of((ROOT / "docs" / name).read_text())
    if name.startswith(("decode", "generate", "serve")):
        text = " ".join(words)
        assert "DELTA" in text
        assert ("CPU_ATTN" if "cpu" in name else "FLASH_ATTN") in text


def test_every_picture_can_be_drawn_again():
    assert {path.name for path in (ROOT / "docs").glob("*.svg")} == PICTURES.keys() | OTHER_PICTURES


def test_a_serving_picture_shows_rows_of_one_kind(tmp_path, capsys):
    """The latest row says of which sizes; a shape that no row has is an error."""
    plot_serve = import_module("benchmarks.speed.plot_serve")
    rows = read_csv(RESULTS / "serve_cuda.csv", Serving)
    other = replace(rows[0], prompts=rows[0].prompts + 1)
    chosen = plot_serve.choose([other, *rows], None, None)
    assert chosen == sorted(rows, key=lambda row: (row.backend == "DELTA", row.request_rate))
    with pytest.raises(SystemExit):
        plot_serve.main([str(RESULTS / "serve_cuda.csv"), str(tmp_path / "picture.svg"), "--shape", "none"])
    assert "no such rows" in capsys.readouterr().err
