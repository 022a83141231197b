"""What rows of the benchmark on real texts say together, with intervals over documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.lib.rows import TextLoss
from vllm_delta.calibration.evidence import bootstrap

#: families of a document's tokens
QUOTES, FACTS, PROSE = "quotes", "facts", "prose"
#: samples of the bootstrap
SAMPLES = 500

#: Of rows of one family.
Statistic = Callable[[Sequence[TextLoss]], float]


def by_document(rows: Sequence[TextLoss]) -> list[list[TextLoss]]:
    """The rows of each document."""
    documents: dict[tuple[str, int], list[TextLoss]] = {}
    for row in rows:
        documents.setdefault((row.text, row.part), []).append(row)
    return list(documents.values())


def interval(documents: Sequence[Sequence[TextLoss]], statistic: Statistic) -> tuple[float, float] | None:
    """Of the bootstrap over documents with something to count, 95%; None for fewer than two."""
    documents = [rows for rows in documents if sum(row.right for row in rows)]
    if len(documents) < 2:
        return None
    return bootstrap(documents, lambda drawn: statistic([row for rows in drawn for row in rows]), SAMPLES)


def kept(rows: Sequence[TextLoss]) -> float:
    """Percentage of what full attention gets right."""
    right = sum(row.right for row in rows)
    return 100 * sum(row.kept for row in rows) / right if right else float("nan")


def rise(rows: Sequence[TextLoss]) -> float:
    """Of the loss, nats per token."""
    return sum(row.loss - row.full_loss for row in rows) / max(1, sum(row.tokens for row in rows))


def divergence(rows: Sequence[TextLoss]) -> float:
    """Mean, nats."""
    return sum(row.divergence for row in rows) / max(1, sum(row.tokens for row in rows))


def attended_share(rows: Sequence[TextLoss]) -> float:
    """Tokens attended to over tokens of context, of all documents; a document's rows all have both."""
    once = {(row.text, row.part): row for row in rows}.values()
    return sum(row.attended_tokens for row in once) / sum(row.context_tokens for row in once)
