"""The tables of what the accuracy benchmarks measured, and of what calibrations found."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from benchmarks import RESULTS
from benchmarks.across.query import (
    MODELS,
    Query,
    ReportError,
    day_of,
    grouped,
    markdown,
    percent,
    provenance,
    span,
)
from benchmarks.lib import text_losses
from benchmarks.lib.base import DELTA
from benchmarks.lib.rows import Accuracy, TextLoss
from benchmarks.lib.text_losses import FACTS, PROSE, QUOTES, Statistic
from vllm_delta.method.config import DeltaConfig

#: a calibration's names of the sets that it compares
RULES = {
    "calibrated": "calibrated",
    "peaks": "the paper's peaks",
    "mass": "attention mass",
    "rule of thumb": "rule of thumb",
}


def latest(query: Query) -> list[Accuracy]:
    """The latest row of each shape, setting and family, of those like the last in what was asked."""
    rows = query.rows(Accuracy, run=day_of)  # a run may have had a process for each family
    last = rows[-1]
    same = [row for row in rows if (row.way, row.length, row.seed) == (last.way, last.length, last.seed)]
    return list({(row.shape, row.setting, row.family): row for row in same}.values())


def budgets(query: Query) -> list[str]:
    """Exact answers by family, of the dense backend and of each budget."""
    rows = latest(query)
    settings = dict.fromkeys(row.setting for row in rows)
    lines = []
    for setting in settings:
        own = [row for row in rows if row.setting == setting]
        lines.append([_name(own[0]), _attended(own), *_shares(own, rows)])
    table = markdown(["", "tokens attended", *_families(rows)], lines)
    return table if query.short else table + provenance(rows, query.name)


def layers(query: Query) -> list[str]:
    """Exact answers by model and family, with the layers that a calibration and each rule choose."""
    rows = latest(query)
    order = ["", *RULES]
    keys = list(dict.fromkeys((row.shape, row.setting) for row in rows))
    keys.sort(key=lambda key: (key[0], order.index(key[1]) if key[1] in order else 0))
    names = grouped([MODELS.get(shape, shape) for shape, _ in keys])
    lines = []
    for name, key in zip(names, keys, strict=True):
        own = [row for row in rows if (row.shape, row.setting) == key]
        lines.append([name, _layers_name(own[0]), _attended(own), *_shares(own, rows)])
    head = ["model", "layers", "tokens attended", *_families(rows)]
    return markdown(head, lines) + provenance(rows, query.name)


def divergences(query: Query) -> list[str]:
    """What a calibration and each rule lose on answers that were not searched with, in nats.

    The query's name is that of files of calibrations, its shapes are their numbers.
    """
    lines = []
    for number in query.shapes:
        path = RESULTS / f"{query.name}_{number}.json"
        if not path.is_file():
            raise ReportError(f"table {query.name}: there is no {path.name}")
        found = json.loads(path.read_text())["calibration"]
        model = found["model"]
        losses = [found["compared"][rule]["divergence"] for rule in RULES]
        lines.append([MODELS.get(model, model), *map(_nats, losses)])
    files = " and ".join(f"`{query.name}_{number}.json`" for number in query.shapes)
    return [*markdown(["model", *RULES.values()], lines), "", f"Files: {files} in `benchmarks/results`."]


def real_texts(query: Query) -> list[str]:
    """What settings keep of quotes and facts, and lose on prose, by context."""
    rows = query.rows(TextLoss, run=day_of)
    found: dict[tuple[int, str], list[TextLoss]] = {}
    for row in rows:
        found.setdefault((row.context, row.setting), []).append(row)
    order = list(dict.fromkeys(row.setting for row in rows))
    keys = sorted(found, key=lambda key: (key[0], order.index(key[1])))
    contexts = grouped([f"{context:,}" for context, _ in keys])
    lines = [[context, key[1], *_losses(found[key])] for context, key in zip(contexts, keys, strict=True)]
    head = ["tokens", "setting", "attended", "quotes, %", "facts, %", "rise, nats", "divergence, nats"]
    return markdown(head, lines) + provenance(rows, query.name)


def _losses(rows: list[TextLoss]) -> list[str]:
    def shown(family: str, statistic: Statistic) -> str:
        return _shown([row for row in rows if row.family == family], statistic)

    looked_up = [shown(family, text_losses.kept) for family in (QUOTES, FACTS)]
    prose = [shown(PROSE, statistic) for statistic in (text_losses.rise, text_losses.divergence)]
    return [percent(text_losses.attended_share(rows), 0), *looked_up, *prose]


def _shown(rows: list[TextLoss], statistic: Statistic) -> str:
    """A statistic with its interval."""
    digits = 1 if statistic is text_losses.kept else 4
    bounds = text_losses.interval(text_losses.by_document(rows), statistic)
    text = f"{statistic(rows):.{digits}f}"
    return text if bounds is None else f"{text} ({bounds[0]:.{digits}f} to {bounds[1]:.{digits}f})"


def _nats(loss: float) -> str:
    """A divergence with two digits that count, or with one behind the point."""
    digits = 1 if loss >= 1 else 1 - math.floor(math.log10(loss))
    return f"{loss:.{digits}f}"


def _families(rows: Sequence[Accuracy]) -> list[str]:
    return list(dict.fromkeys(row.family for row in rows))


def _shares(own: Sequence[Accuracy], rows: Sequence[Accuracy]) -> list[str]:
    exact = {row.family: row.accuracy for row in own}
    return [percent(exact.get(family)) for family in _families(rows)]


def _attended(own: Sequence[Accuracy]) -> str:
    shares = [100 * (1.0 if row.attended_share is None else row.attended_share) for row in own]
    return span(min(shares), max(shares), "{:.0f}") + "%"


def _name(row: Accuracy) -> str:
    if row.backend != DELTA:
        return "full attention"
    budget = json.loads(row.settings).get("budget_tokens", DeltaConfig.budget_tokens)
    return f"{DELTA}, budget {budget}"


def _layers_name(row: Accuracy) -> str:
    if row.backend != DELTA:
        return "full attention"
    settings = json.loads(row.settings)
    passes = [*range(settings["full_layers"]), *settings["selection_layers"]]
    return f"{RULES.get(row.setting, row.setting)}: {', '.join(map(str, passes))}"
