"""What DELTA did, counted where it was done: by the kernels and by the code that runs a layer dense."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vllm_delta.plan import Role

#: Why a row ran dense. A row is one query token in one layer.
DENSE_REASONS = {
    "prefill": "tokens of a prompt, in every layer",
    "sliding_window": "a layer with a sliding window, which reads few tokens anyway",
    "not_eligible": "a layer of another kind that DELTA does not make sparse",
    "within_budget": "a sparse layer, and a sequence that fits the budget",
}

_COLUMNS = ("rows", "attended_tokens", "context_tokens")


class Counters:
    """The counts of one worker since it started; tensor parallel ranks all count the same tokens."""

    def __init__(self) -> None:
        self._by_role = {role: torch.zeros(len(_COLUMNS), dtype=torch.int64) for role in Role}
        self._dense_rows = dict.fromkeys(DENSE_REASONS, 0)

    def of(self, role: Role) -> Tensor:
        """int64 ``[3]`` for the kernels to add to: rows, attended tokens, context tokens."""
        return self._by_role[role]

    def add_dense_rows(self, reason: str, rows: int) -> None:
        """Count rows that ran dense; `reason` is a key of `DENSE_REASONS`."""
        self._dense_rows[reason] += rows

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain numbers; the totals are over the decode rows of all eligible layers."""
        layers = {
            role.value: dict(zip(_COLUMNS, counts.tolist(), strict=True))
            for role, counts in self._by_role.items()
        }
        return {
            "attended_tokens": sum(counts["attended_tokens"] for counts in layers.values()),
            "context_tokens": sum(counts["context_tokens"] for counts in layers.values()),
            "layers": layers,
            "dense_rows": dict(self._dense_rows),
        }


def difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What was counted between two results of `Counters.as_dict`."""
    return {
        key: difference(value, before[key]) if isinstance(value, dict) else value - before[key]
        for key, value in after.items()
    }


def total(workers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sum over workers, as ``collective_rpc("delta_counters")`` returns them."""
    result: dict[str, Any] = {}
    for counts in workers:
        for key, value in counts.items():
            if isinstance(value, dict):
                result[key] = total([result[key], value]) if key in result else value
            else:
                result[key] = result.get(key, 0) + value
    return result
