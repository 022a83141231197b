"""What a marker in a document asks for, the rows that answer it, and tables in Markdown.

A marker is a comment, ``<!-- table: NAME [SHAPE,...] [machine=TEXT] [commit=TEXT] [short] -->``. NAME is a
table's, mostly that of its CSV. Without shapes those of the latest rows count. `machine` is a part of the
machine's name, without spaces. Of what fits, the latest run is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from benchmarks import RESULTS
from benchmarks.across.catalogue import source_of
from benchmarks.lib.cases import Case
from benchmarks.lib.csv_rows import read_csv
from benchmarks.lib.rows import Provenance

Given = TypeVar("Given", bound=Provenance)

FILTERS = ("machine", "commit")
MODELS = {
    "qwen2.5-1.5b": "Qwen2.5-1.5B",
    "qwen2.5-7b": "Qwen2.5-7B",
    "qwen3-8b": "Qwen3-8B",
    "trained": "the reasoner",
    "SmolLM2-135M-Instruct": "SmolLM2-135M",
    "12-layers-seed-0": "12 layers, seed 0",
    "12-layers-seed-1": "12 layers, seed 1",
}


class ReportError(Exception):
    """A marker, or the results that it asks for, are not right; the message is for people."""


def date_of(row: Provenance) -> str:
    """When the row's run started."""
    return row.date


def day_of(row: Provenance) -> str:
    """The day of it, where a run had several processes."""
    return row.date[:10]


@dataclass(frozen=True)
class Query:
    """A marker, read."""

    name: str
    shapes: tuple[str, ...] = ()
    filters: dict[str, str] = field(default_factory=dict)
    short: bool = False  # fewer columns, and no line about where rows come from

    @classmethod
    def parse(cls, text: str) -> Query:
        """Read what stands behind "table:"; raises ReportError."""
        name, *words = text.split()
        filters = dict(word.split("=", 1) for word in words if "=" in word)
        if unknown := filters.keys() - set(FILTERS):
            raise ReportError(f"table {name}: {', '.join(unknown)} is none of {', '.join(FILTERS)}")
        plain = [word for word in words if "=" not in word]
        shapes = [shape for word in plain if word != "short" for shape in word.split(",")]
        return cls(name, tuple(shapes), filters, "short" in plain)

    def rows(self, kind: type[Given], name: str = "", run: Callable[[Given], str] = date_of) -> list[Given]:
        """The latest run's rows of each shape, from the CSV of that name, or the query's own.

        Args:
            kind: of the CSV's rows.
            name: the CSV's, without its suffix.
            run: what the rows of a run have in common, later runs having more of it.

        Raises:
            ReportError: there are no such rows.
        """
        path = RESULTS / f"{name or self.name}.csv"
        if not path.is_file() or source_of(path.name).kind is not kind:
            raise ReportError(f"table {self.name}: {path.name} is no CSV of such rows")
        rows = [row for row in read_csv(path, kind) if self._fits(row)]
        shapes = self.shapes or tuple(shape_of(row) for row in rows[-1:])
        found = []
        for shape in shapes:
            own = [row for row in rows if shape_of(row) == shape]
            if not own:
                raise ReportError(f"table {self.name}: {path.name} has no rows of {shape} that fit")
            last = max(map(run, own))
            found += [row for row in own if run(row) == last]
        if not found:
            raise ReportError(f"table {self.name}: {path.name} has no rows that fit")
        return found

    def _fits(self, row: Provenance) -> bool:
        machine = row.machine.replace(" ", "")
        return self.filters.get("machine", "") in machine and row.commit.startswith(
            self.filters.get("commit", "")
        )


def shape_of(row: Any) -> str:
    """The name of the model's shape."""
    shape: str = row.shape
    return shape


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    first, *rest = (f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (head, *lines))
    return [first, f"|{'---|' * len(head)}", *rest]


def grouped(names: Sequence[str]) -> list[str]:
    """Every name, and nothing where it is that of the line above."""
    return [name if names[i - 1 : i] != [name] else "" for i, name in enumerate(names)]


def times(case: Case) -> str:
    """A case in words: "4 x 16k"."""
    return str(case).replace("x", " x ")


def ratio(value: float) -> str:
    """A speed-up: "1.72x"."""
    return f"{value:.2f}x"


def percent(value: float | None, digits: int = 1) -> str:
    """A share: "35.4%"; "-" where nothing was counted."""
    return "-" if value is None else f"{value:.{digits}%}"


def span(low: float, high: float, text: str = "{:.2f}") -> str:
    """Both, or one where they read alike: "3.96 to 4.30"."""
    ends = [text.format(low), text.format(high)]
    return " to ".join(dict.fromkeys(ends))


def provenance(rows: Sequence[Provenance], file: str) -> list[str]:
    """A paragraph: where the rows come from, and how."""
    places: dict[str, dict[str, None]] = {}
    for row in rows:
        where = f"{row.machine}, {row.cores} cores; vLLM {row.vllm}, torch {row.torch}"
        place = f"Commit {row.commit}, {day_of(row)}; {where}"
        command = re.sub(r" --(commit|csv|out) \S+", "", row.command)
        places.setdefault(place, {})[f"`{command}`"] = None
    sentences = [
        f"{place}: {next(iter(commands)) if len(commands) == 1 else 'the rows have the commands'}."
        for place, commands in places.items()
    ]
    return ["", " ".join([*sentences, f"Rows: `benchmarks/results/{file}.csv`."])]
