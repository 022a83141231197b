"""Live recall: how much of its attention a sparse layer keeps."""

import numpy as np
import pytest
import torch
from rival_rows import double_row, mask_row, paged_layer, random_rows

from vllm_delta.method.counters import Counters, difference, total
from vllm_delta.method.rows import ALL_PAGES
from vllm_delta.plain.recall import RecallSampler, kept_mass, table_mass


def test_recall_by_delta_table():
    """Of rows with budgets of their own; one that keeps everything is not measured."""
    torch.manual_seed(4)
    lengths, page = [130, 20, 75, 90, 88], 16
    layer, rows = paged_layer(lengths)
    rows[0] = rows[0]._replace(kept_pages=ALL_PAGES)
    rows[2] = rows[2]._replace(kept_pages=2)
    pages = torch.stack(
        [
            torch.randperm(-(-n // page))[:3].sort().values if n > 48 else torch.arange(3)
            for n in (i.length for i in rows)
        ]
    )
    expected = 0.0
    for index, kept in zip(rows[1:], pages[1:], strict=True):
        probabilities = mask_row(double_row(layer, index)).probabilities
        fits = index.length <= index.kept_pages * page
        mask = fits | np.isin(np.arange(index.length) // page, kept[: index.kept_pages].numpy())
        expected += probabilities[:, mask].sum(axis=1).mean()
    count, mass = table_mass(layer, rows, pages.int(), page)
    assert count == 4
    assert mass == pytest.approx(expected, abs=1e-5)


def test_recall_leaves_sinks_out():
    torch.manual_seed(5)
    rows = random_rows([50, 30], 4, 2, 8, 0.0, True)
    assert kept_mass(rows, rows.visible).tolist() == pytest.approx([1.0, 1.0])
    assert rows.probabilities().sum() < 2 * 4


def test_recall_is_sampled():
    sampler = RecallSampler()
    steps = []
    for every in (0, 0, 0, 3, 3, 3, 3, 1):
        sampler.next_step(every)
        steps.append(sampler.active)
    assert steps == [False, False, False, False, False, True, False, True]


def test_recall_in_counters():
    counters = Counters()
    before = counters.as_dict()
    assert "recall" not in before
    counters.add_recall(7, 2, 1.5)
    counters.add_recall(3, 1, 0.5)
    first = counters.as_dict()
    counters.add_recall(7, 1, 0.25)
    after = counters.as_dict()
    assert difference(first, before)["recall"] == {3: {"rows": 1, "mass": 0.5}, 7: {"rows": 2, "mass": 1.5}}
    assert difference(after, first)["recall"][7] == {"rows": 1, "mass": 0.25}
    assert total([first, before, after])["recall"][7] == {"rows": 5, "mass": 3.25}
    counters.reset()
    assert counters.as_dict() == before
