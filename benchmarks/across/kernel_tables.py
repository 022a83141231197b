"""The tables of what the kernel benchmarks measured, and what they say of the time of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.across.query import MODELS, Query, ReportError, grouped, markdown, provenance, ratio, times
from benchmarks.lib.base import DELTA
from benchmarks.lib.cases import Case
from benchmarks.lib.models import SHAPES
from benchmarks.lib.rows import EngineRun, Generation, KernelTime, Measurement
from vllm_delta.method.config import DeltaConfig

Kernels = Mapping[str, KernelTime]


def by_case(rows: Sequence[KernelTime]) -> dict[tuple[str, Case], dict[str, KernelTime]]:
    """The kernels of each shape and case, by name."""
    found: dict[tuple[str, Case], dict[str, KernelTime]] = {}
    for row in rows:
        found.setdefault((row.shape, row.case), {})[row.kernel] = row
    return found


def kernels_gpu(query: Query) -> list[str]:
    """Microseconds, with the ratio to FlashAttention 3 in brackets."""
    rows = query.rows(KernelTime)
    head = ["sequences x context", "FlashAttention 3", "full layer", "selection: attention + scores + select"]
    head += ["selection layer", "FA3, compact table", "sparse layer", "of a copy's bandwidth"]
    lines = [[times(case), *_gpu_cells(kernels)] for (_, case), kernels in by_case(rows).items()]
    return markdown(head, lines) + provenance(rows, query.name)


def _gpu_cells(kernels: Kernels) -> list[str]:
    sparse = kernels["sparse"]
    parts = [kernels[name] for name in ("selection_attention", "scores", "select")]
    return [
        f"{kernels['fa3'].microseconds:.1f}",
        _with_ratio(kernels, "full"),
        " + ".join(f"{part.microseconds:.1f}" for part in parts),
        _with_ratio(kernels, "selection"),
        f"{kernels['fa3_compact'].microseconds:.1f}",
        f"{sparse.microseconds:.1f}",
        f"{sparse.gb_per_second / sparse.memory_gb_per_second:.0%}",
    ]


def kernels_cpu(query: Query) -> list[str]:
    """Microseconds, with the ratio to vLLM's dense operator in brackets."""
    rows = query.rows(KernelTime)
    cases = by_case(rows)
    names = grouped([MODELS.get(shape, shape) for shape, _ in cases])
    lines = [
        [
            *(name, times(case), f"{kernels['dense'].microseconds:.0f}"),
            *(_with_ratio(kernels, kernel, 0) for kernel in ("full", "selection", "sparse")),
        ]
        for name, ((_, case), kernels) in zip(names, cases.items(), strict=True)
    ]
    head = ["model's shape", "sequences x context", "vLLM dense", "full", "selection", "sparse"]
    return markdown(head, lines) + provenance(rows, query.name)


def _with_ratio(kernels: Kernels, name: str, digits: int = 1) -> str:
    """Microseconds and the ratio; "-" where that kernel was not measured."""
    if name not in kernels:
        return "-"
    return f"{kernels[name].microseconds:.{digits}f} ({kernels[name].ratio:.2f})"


def limits(query: Query) -> list[str]:
    """What a step would take if DELTA's layers were as fast as the memory allows.

    What is not attention is the dense backend's step less its layers, each as long as FlashAttention 3 alone.
    """
    kernels = by_case(query.rows(KernelTime, "kernels_gpu"))
    lines = []
    for dense, delta, case, ms in _steps(query):
        found = kernels.get((dense.shape, case))
        if found and case.context > DeltaConfig.budget_tokens:
            name = f"{MODELS[dense.shape]}, {times(case)}"
            lines.append([name, *_limit_cells(found, delta, *ms)])
    if not lines:
        raise ReportError(f"table {query.name}: no step has times of its kernels")
    head = ["model, sequences x context", "not attention", "full passes", "sparse layers"]
    return markdown([*head, "sum", "speed-up there", "measured"], lines)


def _steps(query: Query) -> list[tuple[EngineRun, EngineRun, Case, tuple[float, float]]]:
    """The steps of both backends, decoded or else generated: their rows, the case, milliseconds."""
    steps: list[tuple[EngineRun, EngineRun, Case, tuple[float, float]]] = []
    for shape in query.shapes:
        one = Query(query.name, (shape,), query.filters)
        try:
            decoded = one.rows(Measurement, "decode_cuda")
        except ReportError:
            generated = [row for row in one.rows(Generation, "generate_cuda") if row.part == "prefill"]
            (dense,) = (row for row in generated if row.backend != DELTA)
            (delta,) = (row for row in generated if row.backend == DELTA)
            case = Case(dense.requests, dense.prompt)
            steps.append((dense, delta, case, (dense.milliseconds, delta.milliseconds)))
            continue
        by_arm = {(row.case, row.backend): row for row in decoded}
        for case in sorted({row.case for row in decoded}, key=lambda case: (case.context, case.batch)):
            first, second = by_arm[case, decoded[-1].baseline], by_arm[case, DELTA]
            steps.append((first, second, case, (first.ms_per_step, second.ms_per_step)))
    return steps


def _limit_cells(kernels: Kernels, delta: EngineRun, dense_ms: float, delta_ms: float) -> list[str]:
    shape = SHAPES[delta.shape]
    layers: int = shape["num_hidden_layers"]
    counted = delta.sparse_context_tokens, delta.context_tokens
    assert counted[0] is not None and counted[1]
    sparse_layers = round(layers * counted[0] / counted[1])
    fa3, sparse = kernels["fa3"], kernels["sparse"]
    rest = dense_ms - layers * fa3.microseconds / 1000
    passes = (layers - sparse_layers) * min(fa3.microseconds, kernels["full"].microseconds) / 1000
    token_bytes = 2 * 2 * shape["num_key_value_heads"] * shape["head_dim"]  # keys and values, of two bytes
    read = sparse.batch * min(sparse.context, DeltaConfig.budget_tokens) * token_bytes
    sparse_ms = sparse_layers * read / sparse.memory_gb_per_second / 1e6
    total = rest + passes + sparse_ms
    return [
        f"{rest:.1f} ms",
        f"{layers - sparse_layers}: {passes:.2f} ms",
        f"{sparse_layers}: {sparse_ms:.2f} ms",
        f"{total:.1f} ms",
        ratio(dense_ms / total),
        ratio(dense_ms / delta_ms),
    ]
