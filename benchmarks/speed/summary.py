"""The decode benchmark's summary, which its table, its picture and the documentation share.

The arms (backends) alternate, so that a slow minute of the machine meets every arm. Speed-ups are therefore
taken between measurements of the same round, and only then summarised.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.lib.cases import Case
from benchmarks.lib.rows import Measurement


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
    kv_capacity_tokens: int | None  # minimum over rounds
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
    capacity = [row.kv_capacity_tokens for row in rows if row.kv_capacity_tokens is not None]
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
        kv_capacity_tokens=min(capacity, default=None),
        rounds=len(rows),
    )


def _share(pairs: Iterable[tuple[int | None, int | None]]) -> float | None:
    counted = [(part, whole) for part, whole in pairs if part is not None and whole]
    return sum(p for p, _ in counted) / sum(w for _, w in counted) if counted else None
