"""What everything here knows: a job's JSON, the error for people, and the names of backends."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

DELTA = "DELTA"


class BenchmarkError(Exception):
    """Stops the benchmark; the message is for the person who started it."""


def arm_names(backends: str) -> list[str]:
    """Backends in order; a repeated one gets a number, so that it is an arm of its own."""
    names = [name.strip().upper() for name in backends.split(",")]
    return [
        name if names[:i].count(name) == 0 else f"{name}#{names[:i].count(name) + 1}"
        for i, name in enumerate(names)
    ]
