"""What counts of drafts come to."""

from __future__ import annotations

from collections.abc import Sequence


def accepted_share(counts: Sequence[Sequence[int]]) -> float:
    """Of the drafts behind accepted ones only, the share that was accepted.

    `counts` has for each measurement the steps that verified drafts, and those accepted at each position.
    """
    tried = sum(sum(of_one[:-1]) for of_one in counts)
    return sum(sum(of_one[1:]) for of_one in counts) / max(1, tried)


def tokens_per_step(counts: Sequence[Sequence[int]]) -> float:
    """Of a request, in steps that verified drafts; `counts` as above."""
    return 1 + sum(sum(of_one[1:]) for of_one in counts) / max(1, sum(of_one[0] for of_one in counts))
