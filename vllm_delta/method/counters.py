"""What DELTA did, counted where it was done: by the kernels and by the code that runs a layer dense."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vllm_delta.method.plan import Role

#: Why a query token ran dense at a layer; it counts once in each layer where it did.
DENSE_REASONS = {
    "prefill": "tokens of a prompt, in every layer",
    "sliding_window": "a layer with a sliding window, which reads few tokens anyway",
    "not_eligible": "a layer of another kind that DELTA does not make sparse",
    "within_budget": "a sparse layer, and a decode row that fits its budget",
}

_COLUMNS = ("rows", "attended_tokens", "context_tokens")

#: What GPU kernels count beside them, in sparse layers: reasons to run dense that only they see in a graph.
_DEVICE_REASONS = ("prefill", "within_budget")


class Counters:
    """The counts of one worker since it started; tensor parallel ranks all count the same tokens."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        on_cpu = torch.device(device).type == "cpu"
        columns = len(_COLUMNS) + (0 if on_cpu else len(_DEVICE_REASONS))
        self._by_role = {role: torch.zeros(columns, dtype=torch.int64, device=device) for role in Role}
        self._dense_rows = dict.fromkeys(DENSE_REASONS, 0)
        self._recall: dict[int, dict[str, float]] = {}

    def of(self, role: Role) -> Tensor:
        """int64 for the kernels to add to: rows, attended tokens, context tokens.

        On a GPU two more: rows for which a sparse layer attends to all because they belong to a prompt, and
        because they fit the budget.
        """
        return self._by_role[role]

    def reset(self) -> None:
        """Forget what was counted so far: the runs that warm an engine up."""
        for counts in self._by_role.values():
            counts.zero_()
        self._dense_rows = dict.fromkeys(DENSE_REASONS, 0)
        self._recall = {}

    def add_dense_rows(self, reason: str, rows: int) -> None:
        """Count query tokens that ran dense; `reason` is a key of `DENSE_REASONS`."""
        self._dense_rows[reason] += rows

    def add_rows(self, role: Role, rows: int, attended_tokens: int, context_tokens: int) -> None:
        """Count decode rows that no kernel has counted."""
        counts = self._by_role[role]
        counts[: len(_COLUMNS)] += torch.tensor([rows, attended_tokens, context_tokens]).to(counts.device)

    def add_recall(self, layer: int, rows: int, mass: float) -> None:
        """Add rows of a sparse layer and the attention that they kept, see `vllm_delta.plain.recall`."""
        counts = self._recall.setdefault(layer, {"rows": 0, "mass": 0.0})
        counts["rows"] += rows
        counts["mass"] += mass

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain numbers; the totals are over the decode rows of all eligible layers.

        ``"recall"`` is there where recall has been measured.
        """
        by_role = {role: counts.tolist() for role, counts in self._by_role.items()}
        layers = {
            role.value: dict(zip(_COLUMNS, counts[: len(_COLUMNS)], strict=True))
            for role, counts in by_role.items()
        }
        dense_rows = dict(self._dense_rows)
        for counts in by_role.values():
            for reason, rows in zip(_DEVICE_REASONS, counts[len(_COLUMNS) :], strict=False):
                dense_rows[reason] += rows
        result = {
            "attended_tokens": sum(counts["attended_tokens"] for counts in layers.values()),
            "context_tokens": sum(counts["context_tokens"] for counts in layers.values()),
            "layers": layers,
            "dense_rows": dense_rows,
        }
        if self._recall:
            result["recall"] = {layer: dict(counts) for layer, counts in sorted(self._recall.items())}
        return result


def difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What was counted between two results of `Counters.as_dict`; what `before` does not have counts as 0."""
    return {
        key: difference(value, before.get(key, {})) if isinstance(value, dict) else value - before.get(key, 0)
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
