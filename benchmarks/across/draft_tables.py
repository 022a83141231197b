"""The tables of what was measured of drafts: their acceptance, and the speed of tokens."""

from __future__ import annotations

import json

from benchmarks.across.query import (
    MODELS,
    Query,
    day_of,
    grouped,
    markdown,
    provenance,
    ratio,
    times,
)
from benchmarks.lib.drafts import accepted_share, tokens_per_step
from benchmarks.lib.rows import Acceptance, Drafted
from vllm_delta.method.config import DeltaConfig


def speed(query: Query) -> list[str]:
    """Time of a token in lossless speculation, by the acceptance that was given."""
    rows = [row for row in query.rows(Drafted, run=day_of) if not row.ngram_tokens]
    lines = []
    for row in rows:
        if row.backend == row.baseline:
            continue
        dense = next(
            other
            for other in rows
            if other.backend == row.baseline and (other.shape, other.case) == (row.shape, row.case)
        )
        accepted = "nothing drafted" if row.acceptance is None else f"{row.acceptance:g}"
        times_ms = [f"{either.ms_per_token:.2f}" for either in (dense, row)]
        gain = ratio(dense.ms_per_token / row.ms_per_token)
        cells = [accepted, f"{row.tokens_per_step:.2f}", *times_ms, gain]
        lines.append([f"{MODELS.get(row.shape, row.shape)}, {times(row.case)}", *cells])
    names = grouped([line[0] for line in lines])
    head = ["shape, sequences x context", "acceptance", "tokens per verification"]
    head += [f"{rows[0].baseline}, ms per token", "DELTA, ms per token", "speed-up"]
    lines = [[name, *line[1:]] for name, line in zip(names, lines, strict=True)]
    return markdown(head, lines) + provenance(rows, query.name)


def acceptance(query: Query) -> list[str]:
    """What was accepted of greedy answers' drafts, over all texts of a model."""
    rows = [row for row in query.rows(Acceptance, run=day_of) if not row.temperature]
    groups: dict[tuple[str, str], list[Acceptance]] = {}
    for row in rows:
        groups.setdefault((MODELS.get(row.shape, row.shape), _words(row)), []).append(row)
    names = grouped([f"{model}, {of[0].context} tokens" for (model, _), of in groups.items()])
    lines = [
        [name, words, f"{accepted_share(counts):.3f}", f"{tokens_per_step(counts):.2f}"]
        for name, ((_, words), of) in zip(names, groups.items(), strict=True)
        for counts in [[[row.drafts, *map(int, row.accepted.split())] for row in of]]
    ]
    head = ["model, prompts of", "drafts", "acceptance", "tokens per verification"]
    return markdown(head, lines) + provenance(rows, query.name)


def _words(row: Acceptance) -> str:
    """What drafts, in words."""
    if row.ngram_tokens:
        return f"{row.ngram_tokens} by n-grams, {row.backend}"
    config = DeltaConfig.from_additional_config({"delta": json.loads(row.settings)})
    return f"{config.draft_tokens}, {config.draft_pages} pages, budget {config.budget_tokens}"
