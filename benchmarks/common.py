"""Rows of the benchmarks' CSVs, and the decode benchmark's summary that table and picture share.

One row is what one engine process measured of one case; a CSV holds rows of one class below. In the
decode benchmark the arms (backends) alternate, so that a slow minute of the machine meets every arm;
speed-ups are therefore taken between measurements of the same round, and only then summarised.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

KIBI = 1024

Row = TypeVar("Row", bound="Run")


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


@dataclass(frozen=True, kw_only=True)
class Run:
    """The columns of every CSV: what ran, and where."""

    date: str  # ISO, start of the run; equal in all rows of a run
    commit: str  # with "+dirty" if tracked files differed from it
    machine: str  # CPU or GPU model
    cores: int
    vllm: str
    torch: str
    vllm_delta: str
    python: str
    command: str
    shape: str
    dtype: str
    backend: str
    settings: str  # DELTA's, as JSON; "{}" are the defaults

    @property
    def arm(self) -> str:
        """The backend, with DELTA's settings where they are not the defaults."""
        return self.backend if self.settings in ("", "{}") else f"{self.backend} {self.settings}"


@dataclass(frozen=True, kw_only=True)
class EngineRun(Run):
    """What an engine of this process' own says of itself, and of the tokens that it attended to.

    Token counts are over the timed steps, all layers and all sequences; None of a backend that does not
    count.
    """

    kv_cache_dtype: str  # vLLM's name; "auto" is `dtype`
    kv_capacity_tokens: int | None  # that the KV cache has room for
    peak_memory_bytes: int | None  # RSS of the largest engine process, or used device memory
    attended_tokens: int | None
    context_tokens: int | None
    sparse_attended_tokens: int | None  # sparse layers alone
    sparse_context_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class Measurement(EngineRun):
    """One case of the decode benchmark in one process."""

    baseline: str  # the backend that speed-ups refer to
    round: int
    batch: int
    context: int
    prompt_tokens: int  # the context, less what the model's positions have no room for
    output_short: int
    output_long: int
    ms_per_step: float  # median of samples_ms
    tokens_per_second: float
    samples_ms: str  # every slope of this process, separated by spaces

    @property
    def case(self) -> Case:
        """What was timed."""
        return Case(self.batch, self.context)

    @property
    def spread(self) -> float:
        """How far the process's own samples lie apart, relative to their median."""
        samples = [float(sample) for sample in self.samples_ms.split()]
        return (max(samples) - min(samples)) / self.ms_per_step


@dataclass(frozen=True, kw_only=True)
class Generation(EngineRun):
    """One part of the generation benchmark in one process.

    ======== ============================================ ================================================
    part     milliseconds                                 samples_ms
    ======== ============================================ ================================================
    generate all outputs of all requests, prompts included mean step per `bin_tokens` output tokens, in order
    ttft     median time to first token                   every time to first token
    prefill  median decode step after a real prefill,     one mean per repetition
             all requests decoding
    ======== ============================================ ================================================
    """

    part: str
    requests: int
    prompt: int
    output: int
    milliseconds: float
    tokens_per_second: float | None  # generated; None of "ttft"
    bin_tokens: int | None  # None except of "generate"
    samples_ms: str  # separated by spaces

    @property
    def samples(self) -> list[float]:
        """`samples_ms` as numbers."""
        return [float(sample) for sample in self.samples_ms.split()]


@dataclass(frozen=True, kw_only=True)
class Serving(Run):
    """One request rate of the serving benchmark; the names are those of ``vllm bench serve``."""

    request_rate: float  # per second; inf: all at once
    prompts: int
    input: int  # tokens of a prompt
    output: int  # tokens of an answer
    duration: float  # seconds
    request_throughput: float  # per second
    output_throughput: float  # tokens per second
    mean_ttft_ms: float
    median_ttft_ms: float
    p99_ttft_ms: float
    mean_tpot_ms: float
    median_tpot_ms: float
    p99_tpot_ms: float
    mean_itl_ms: float
    median_itl_ms: float
    p99_itl_ms: float
    attended_tokens: int | None  # warm-up included; None of a backend that does not count
    context_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class AnswerRun(Run):
    """What a server answered under one setting; its token counts are those of `EngineRun`.

    Of a backend that does not count, and where no answer has a second token, they are None.
    """

    setting: str  # its name
    seed: int
    generated_tokens: int | None
    attended_tokens: int | None
    context_tokens: int | None
    sparse_attended_tokens: int | None
    sparse_context_tokens: int | None
    attended_share: float | None  # of all layers
    seconds: float  # from the first question to the last answer


@dataclass(frozen=True, kw_only=True)
class Accuracy(AnswerRun):
    """Answers to the reasoner's problems of one family and length.

    Commit, machine and versions are those of the answers, joined by "/" if some are from another run.
    """

    way: str  # "asked": a server wrote the answer; "forced": the right one was judged
    weights: str  # start of the SHA-256 of the model's files; of a server elsewhere, the model's name
    family: str
    length: int  # tokens of a problem with its answer, at most
    problems: int
    exact: int  # answers that are right to the last token
    accuracy: float
    accuracy_low: float  # 95% confidence (Wilson)
    accuracy_high: float
    right_share: float  # of an answer's steps, those before the first wrong one; mean
    first_wrong_step: float | None  # from 1 on; median of the answers that are not exact


@dataclass(frozen=True, kw_only=True)
class TaskAccuracy(AnswerRun):
    """One metric of one task of lm-evaluation-harness."""

    lm_eval: str  # its version
    task: str
    task_version: str
    fewshot: int | None
    sampling: str  # what was changed of the task's own, as JSON
    metric: str
    filter: str  # how the answer was found in the text; "none": the task's own way
    value: float
    stderr: float | None
    samples: int


_READ: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "int | None": lambda s: int(s) if s else None,
    "float | None": lambda s: float(s) if s else None,
}


def append_csv(path: Path, row: Run) -> None:
    """Append `row`, after a header if the file is new; raises ValueError on a foreign header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_header(path, type(row))
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(row)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))


def check_header(path: Path, kind: type[Run]) -> None:
    """Raise ValueError if `path` holds rows of other columns than those of `kind`."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open(newline="") as file:
        if next(csv.reader(file)) != [field.name for field in fields(kind)]:
            raise ValueError(f"{path} has other columns than this version writes; use another file")


def read_csv(path: Path, kind: type[Row]) -> list[Row]:
    """All rows of `path`, in order; raises ValueError on a foreign header."""
    check_header(path, kind)
    types = {field.name: str(field.type) for field in fields(kind)}
    with path.open(newline="") as file:
        return [
            kind(**{name: _READ[types[name]](text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def align(lines: Sequence[Sequence[str]], left: Sequence[str]) -> str:
    """A table as text; the first line is the head, and the columns named in `left` are aligned left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, cell, width in zip(lines[0], line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


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
