"""The pictures of the benchmarks, drawn from the rows that are committed."""

from dataclasses import replace
from importlib import import_module

import pytest

from benchmarks import RESULTS
from benchmarks.lib.csv_rows import read_csv
from benchmarks.lib.rows import Serving


@pytest.mark.parametrize("name", ["decode_cpu", "decode_cuda", "generate_cuda", "serve_cuda"])
def test_a_picture_shows_every_backend_and_is_the_same_each_time(tmp_path, name):
    pytest.importorskip("matplotlib")
    plot = import_module(f"benchmarks.speed.plot_{name.partition('_')[0]}")
    pictures = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for picture in pictures:
        assert plot.main([str(RESULTS / f"{name}.csv"), str(picture)]) == 0
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    text = pictures[0].read_text()  # letters are drawn; the words stand in comments
    assert "DELTA" in text
    assert ("CPU_ATTN" if name.endswith("cpu") else "FLASH_ATTN") in text


def test_a_serving_picture_shows_rows_of_one_kind(tmp_path, capsys):
    """The latest row says of which sizes; a shape that no row has is an error."""
    pytest.importorskip("matplotlib")
    plot_serve = import_module("benchmarks.speed.plot_serve")
    rows = read_csv(RESULTS / "serve_cuda.csv", Serving)
    other = replace(rows[0], prompts=rows[0].prompts + 1)
    chosen = plot_serve.choose([other, *rows], None, None)
    assert chosen == sorted(rows, key=lambda row: (row.backend == "DELTA", row.request_rate))
    with pytest.raises(SystemExit):
        plot_serve.main([str(RESULTS / "serve_cuda.csv"), str(tmp_path / "picture.svg"), "--shape", "none"])
    assert "no such rows" in capsys.readouterr().err
