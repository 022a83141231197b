"""Proof that DELTA was at work: without it there is no row."""

from __future__ import annotations

import json

from benchmarks.lib.base import BenchmarkError, Json


def check_activity(what: str, counts: Json, longest: int, budget: int) -> Json:
    """The CSV's token counts; raises BenchmarkError if DELTA was not at work.

    Sequences of `longest` tokens that fit the budget are dense by design: then DELTA only has to have seen
    the rows. Without `counts`, of a backend that does not count, the columns are None.
    """
    if not counts:
        names = ("attended_tokens", "context_tokens")
        return dict.fromkeys([*names, *(f"sparse_{name}" for name in names)])
    sparse = counts["layers"]["sparse"]
    shown = f"{what}, counters of the timed part: {json.dumps(counts)}"
    if sum(layers["rows"] for layers in counts["layers"].values()) <= 0:
        raise BenchmarkError(f"DELTA handled no decode row. {shown}")
    if longest > budget:
        if sparse["attended_tokens"] <= 0:
            raise BenchmarkError(f"DELTA's sparse layers attended to no token. {shown}")
        if sparse["attended_tokens"] >= sparse["context_tokens"]:
            raise BenchmarkError(
                f"DELTA's sparse layers attended to every token, although the context exceeds the "
                f"budget of {budget} tokens. {shown}"
            )
    return {
        "attended_tokens": counts["attended_tokens"],
        "context_tokens": counts["context_tokens"],
        "sparse_attended_tokens": sparse["attended_tokens"],
        "sparse_context_tokens": sparse["context_tokens"],
    }
