"""The faces of what the contract is checked on: the reference, the C++ kernels, the Triton kernels."""

from __future__ import annotations

from typing import Protocol

import torch
from contract import NAN, Batch, Case, Precision, Results, keeps_all
from cpu_cache import pack_cache
from gpu_batch import GPUBatch
from torch import Tensor

from vllm_delta.kernels import limits
from vllm_delta.kernels.cpu import ops as cpu_ops
from vllm_delta.kernels.types import SelectionTable
from vllm_delta.method import reference
from vllm_delta.method.rows import DecodeRows


class Implementation(Protocol):
    """One of them."""

    precision: Precision

    def supports(self, case: Case) -> bool:
        """Whether the case is among what it supports."""

    def run(self, batch: Batch) -> Results:
        """All three layers; raises AssertionError where what it gives does not agree with itself."""


class Reference:
    """The specification, in float64."""

    precision = Precision(output=1e-9, eager=0, rounds=False, score=1e-9)

    def supports(self, case: Case) -> bool:
        """It reads plain caches, of any type and shape."""
        return case.layout == "plain"

    def run(self, batch: Batch) -> Results:
        """Row by row."""
        rows = without_padding(batch)
        arguments = (
            batch.query.double(),
            batch.kv_cache.double(),
            batch.block_table,
            rows,
            batch.parameters,
            batch.rule,
        )
        selection, scores, table = reference.selection_attention(*arguments)
        sparse = reference.sparse_attention(*arguments, table)
        tokens, attended = [], 0
        for row, pages in zip(batch.case.real_rows, table, strict=True):
            count, length = batch.case.tokens_of(row), batch.case.lengths[row]
            for index in range(count):
                tokens.append(int(batch.rows.tokens[row]) + index)
                seen = length - count + 1 + index
                attended += len(reference.kept_tokens(pages, batch.rule.page_size, seen))
        context = sum(batch.case.seen_tokens(row) for row in batch.case.real_rows)
        outputs = []
        for part in (selection, sparse):
            output = torch.full(batch.query.shape, NAN, dtype=torch.float64)
            output[tokens] = part
            outputs.append(output)
        full_counters = [len(tokens), context, context]
        return Results(
            outputs[0],
            *outputs,
            pages=spread(batch, table),
            full_counters=full_counters,
            selection_counters=full_counters,
            sparse_counters=[len(tokens), attended, context],
            scores=spread(batch, scores, of_all=True),
        )


class Cpp:
    """The C++ kernels; rows are given in an order of their own."""

    # Within one rounding to the output's type, and float32's error in the sums before it.
    precision = Precision(output=1e-5, eager=0, rounds=True, score=3e-5)

    def supports(self, case: Case) -> bool:
        """By the platform's limits."""
        of_size = case.head_size % limits.CPU.head_size_multiple == 0
        fits = case.head_size <= limits.CPU.largest_head_size and case.page_size in limits.CPU.page_sizes
        return case.layout in limits.CPU.layouts and of_size and fits and not case.fp8

    def run(self, batch: Batch) -> Results:
        """All layers, and the selection once with scores and once without."""
        rows = without_padding(batch)
        order = torch.randperm(len(rows))
        rows = rows[order]
        cache = pack_cache(batch)
        num_pages = -(-max(batch.case.lengths) // batch.rule.page_size)
        scores = torch.full((len(rows), num_pages), NAN)
        table, again = (SelectionTable.allocate(len(rows), batch.case.most_pages) for _ in range(2))
        for each in (table, again):
            each.pages.fill_(1 << 30)

        def run(layer, *arguments: object) -> tuple[Tensor, list[int]]:
            output = torch.full_like(batch.query, NAN)
            counters = torch.zeros(3, dtype=torch.int64)
            sizes = max(batch.case.lengths), *batch.query.shape[1:]
            workspace = cpu_ops.allocate_workspace(*sizes, max_query_len=rows.max_query_len).fill_(NAN)
            rule = () if layer is cpu_ops.full_attention else (batch.rule,)
            inputs = batch.query, cache, batch.block_table, rows, batch.parameters, *rule
            layer(*inputs, workspace, counters, output, *arguments)
            return output, counters.tolist()

        full, full_counters = run(cpu_ops.full_attention)
        selection, selection_counters = run(cpu_ops.selection_attention, table, scores)
        unscored, _ = run(cpu_ops.selection_attention, again)
        assert_same(selection, full)
        assert_same(unscored, full)
        assert torch.equal(table.pages, again.pages)
        sparse, sparse_counters = run(cpu_ops.sparse_attention, table)
        back = torch.argsort(order)
        named = rows.kept_pages[back].clamp(max=table.pages.shape[1]) + batch.rule.following_pages
        counts = [-(-length // batch.rule.page_size) for length in rows.lengths[back].tolist()]
        return Results(
            full,
            selection,
            sparse,
            pages=spread(batch, [row[:k] for row, k in zip(table.pages[back], named.tolist(), strict=True)]),
            full_counters=full_counters,
            selection_counters=selection_counters,
            sparse_counters=sparse_counters,
            scores=spread(batch, [row[:n] for row, n in zip(scores[back], counts, strict=True)], of_all=True),
        )


class Triton:
    """The Triton kernels: compiled on a GPU, else interpreted."""

    # A score may be off by 0.035% where all of a page's tokens are 2^-7 of their tile's largest.
    precision = Precision(output=2e-3, eager=2, rounds=False, score=7e-4)

    def supports(self, case: Case) -> bool:
        """By the platform's limits."""
        of_size = case.head_size % limits.GPU.head_size_multiple == 0
        fits = case.head_size <= limits.GPU.largest_head_size and case.page_size in limits.GPU.page_sizes
        return case.layout in limits.GPU.layouts and of_size and fits

    def run(self, batch: Batch) -> Results:
        """All layers, the sparse one by frames and by pages, and appending tokens where kernels do that."""
        gpu = GPUBatch(batch)
        gpu.make_schedule()
        cache, logits = gpu.kv_cache.clone(), gpu.workspace.logits.clone()
        append = not batch.case.fp8 and batch.rows.max_query_len == 1
        full, full_counters = gpu.run("full", append=append)
        assert torch.equal(gpu.workspace.logits, logits), "a full layer stored logits"
        selection, selection_counters = gpu.run("selection", append=append)
        assert_same(selection, full)
        sparse, sparse_counters = gpu.run("sparse")
        from_pages, _ = gpu.run("sparse", same_blocks=False, append=append)
        assert_same(from_pages, sparse)
        assert_same(gpu.kv_cache.float(), cache.float())
        assert not bool(gpu.workspace.arrived.any())
        case = batch.case
        everything = sum(case.tokens_of(row) for row in case.real_rows if case.budgets[row] > 1 << 30)
        within = sum(case.tokens_of(row) for row in case.real_rows if keeps_all(case, row)) - everything
        assert full_counters[3:] == selection_counters[3:] == [0, 0]
        assert sparse_counters[3:] == [everything, within]
        assert gpu.full_counters.tolist()[:3] == [2 * count for count in full_counters[:3]]
        return Results(
            full,
            selection,
            sparse,
            pages=gpu.pages(),
            full_counters=full_counters[:3],
            selection_counters=selection_counters[:3],
            sparse_counters=sparse_counters[:3],
        )


IMPLEMENTATIONS: dict[str, Implementation] = {"reference": Reference(), "cpp": Cpp(), "triton": Triton()}


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Bit by bit, NaN where NaN was expected."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def without_padding(batch: Batch) -> DecodeRows:
    """The rows that are not padding."""
    return batch.rows[torch.tensor(batch.case.real_rows)]


def spread(batch: Batch, parts: list, *, of_all: bool = False) -> list:
    """What there is of each row that is not padding, by row; None for those that keep everything."""
    result: list = [None] * len(batch.case.lengths)
    for row, part in zip(batch.case.real_rows, parts, strict=True):
        if of_all or not keeps_all(batch.case, row):
            result[row] = part
    return result
