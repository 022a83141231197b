"""Measurements of the decode benchmark: the CSV row, and the summary that table and picture share.

One `Measurement` is one case (batch x context) timed in one fresh engine process. Within a run the
arms (backends) alternate, so that a slow minute of the machine meets every arm; speed-ups are
therefore taken between measurements of the same round, and only then summarised.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

KIBI = 1024


@dataclass(frozen=True, order=True)
class Case:
    """`batch` sequences that decode together, each with `context` tokens in the KV cache."""

    batch: int
    context: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read "4x16k" (k = 1024) or "4x1000"; raises ValueError."""
        batch, _, context = text.strip().lower().partition("x")
        unit = KIBI if context.endswith("k") else 1
        case = cls(int(batch), int(context.removesuffix("k")) * unit)
        if case.batch < 1 or case.context < 1:
            raise ValueError(f"batch and context must be positive: {text!r}")
        return case

    def __str__(self) -> str:
        whole = self.context % KIBI == 0
        return f"{self.batch}x{self.context // KIBI}k" if whole else f"{self.batch}x{self.context}"


@dataclass(frozen=True)
class Measurement:
    """One row of the CSV. Token counts are over the timed steps, all layers and all sequences."""

    date: str  # ISO, start of the run; equal in all rows of a run
    round: int
    commit: str  # with "+dirty" if tracked files differed from it
    machine: str  # CPU or GPU model
    cores: int
    vllm: str
    torch: str
    vllm_delta: str
    python: str
    backend: str
    baseline: str  # the backend that speed-ups refer to
    shape: str
    dtype: str
    batch: int
    context: int
    output_short: int
    output_long: int
    settings: str  # DELTA's, as JSON; "{}" are the defaults
    ms_per_step: float  # median of samples_ms
    tokens_per_second: float
    samples_ms: str  # every slope of this process, separated by spaces
    attended_tokens: int | None  # None: a backend that does not count
    context_tokens: int | None
    sparse_attended_tokens: int | None  # sparse layers alone
    sparse_context_tokens: int | None
    peak_memory_bytes: int | None  # RSS of the largest engine process, or used device memory
    command: str

    @property
    def case(self) -> Case:
        """What was timed."""
        return Case(self.batch, self.context)

    @property
    def spread(self) -> float:
        """How far the process's own samples lie apart, relative to their median."""
        samples = [float(sample) for sample in self.samples_ms.split()]
        return (max(samples) - min(samples)) / self.ms_per_step

    @property
    def arm(self) -> str:
        """The backend, with DELTA's settings where they are not the defaults."""
        return self.backend if self.settings in ("", "{}") else f"{self.backend} {self.settings}"


FIELDS = tuple(field.name for field in fields(Measurement))
_TYPES = {field.name: str(field.type) for field in fields(Measurement)}
_READ: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "int | None": lambda s: int(s) if s else None,
}


def append_csv(path: Path, row: Measurement) -> None:
    """Append `row`, after a header if the file is new; raises ValueError on a foreign header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_header(path)
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))


def check_header(path: Path) -> None:
    """Raise ValueError if `path` holds rows of other columns than ours."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open(newline="") as file:
        if tuple(next(csv.reader(file))) != FIELDS:
            raise ValueError(f"{path} has other columns than this version writes; use another file")


def read_csv(path: Path) -> list[Measurement]:
    """All rows of `path`, in order; raises ValueError on a foreign header."""
    check_header(path)
    with path.open(newline="") as file:
        return [
            Measurement(**{name: _READ[_TYPES[name]](text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


@dataclass(frozen=True)
class Summary:
    """One case of one arm over all rounds; the speed-up is baseline time / this arm's time."""

    case: Case
    arm: str
    ms_per_step: float  # median over rounds
    spread: float  # (largest - smallest sample) / median, in a process; median over rounds
    tokens_per_second: float  # median over rounds
    speedups: tuple[float, ...]  # one per round; empty for the baseline
    attended_share: float | None  # of all layers
    sparse_share: float | None  # of the sparse layers
    peak_memory_bytes: int | None  # maximum over rounds
    rounds: int

    @property
    def speedup(self) -> float | None:
        """Median over rounds; None for the baseline."""
        return median(self.speedups) if self.speedups else None


def summarise(rows: Iterable[Measurement]) -> list[Summary]:
    """Group by case and arm: cases in ascending order of context, arms in order of appearance."""
    groups: dict[tuple[Case, str], list[Measurement]] = {}
    baseline_ms: dict[tuple[str, int, Case], float] = {}
    for row in rows:
        groups.setdefault((row.case, row.arm), []).append(row)
        if row.backend == row.baseline:
            baseline_ms[row.date, row.round, row.case] = row.ms_per_step
    arms = list(dict.fromkeys(arm for _, arm in groups))
    order = sorted(groups, key=lambda key: (key[0].context, key[0].batch, arms.index(key[1])))
    return [_summarise_group(key[0], key[1], groups[key], baseline_ms) for key in order]


def _summarise_group(
    case: Case,
    arm: str,
    rows: Sequence[Measurement],
    baseline_ms: dict[tuple[str, int, Case], float],
) -> Summary:
    speedups = [
        baseline_ms[key] / row.ms_per_step
        for row in rows
        if row.backend != row.baseline and (key := (row.date, row.round, case)) in baseline_ms
    ]
    memory = [row.peak_memory_bytes for row in rows if row.peak_memory_bytes is not None]
    return Summary(
        case=case,
        arm=arm,
        ms_per_step=median(row.ms_per_step for row in rows),
        spread=median(row.spread for row in rows),
        tokens_per_second=median(row.tokens_per_second for row in rows),
        speedups=tuple(speedups),
        attended_share=_share((row.attended_tokens, row.context_tokens) for row in rows),
        sparse_share=_share((row.sparse_attended_tokens, row.sparse_context_tokens) for row in rows),
        peak_memory_bytes=max(memory, default=None),
        rounds=len(rows),
    )


def _share(pairs: Iterable[tuple[int | None, int | None]]) -> float | None:
    counted = [(part, whole) for part, whole in pairs if part is not None and whole]
    return sum(p for p, _ in counted) / sum(w for _, w in counted) if counted else None
