"""What a platform's file here gives to the script: its shapes and cases, and the times of its kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from benchmarks.lib.cases import Case

#: query heads, KV heads, numbers of a head
Heads = tuple[int, int, int]


@dataclass(frozen=True)
class Timing:
    """One kernel in one case, over all rounds."""

    kernel: str
    microseconds: float  # median over rounds
    ratio: float  # of its time to the dense kernel's
    read_bytes: int  # of keys and values


class Platform(Protocol):
    """The modules `kernels_cpu` and `kernels_gpu`."""

    SHAPES: dict[str, Heads]
    CASES: str  # by default, separated by commas
    ROUNDS: int  # by default

    def prepare(self) -> float:
        """Load the kernels; returns bytes per second that the memory reaches."""

    def measure(self, case: Case, heads: Heads, dtype: str, rounds: int) -> list[Timing]:
        """Time all kernels in one case."""
