"""What is timed: so many sequences, with so many tokens in the cache."""

from __future__ import annotations

from dataclasses import dataclass

KIBI = 1024


@dataclass(frozen=True, order=True)
class Case:
    """`batch` sequences that decode together, each with `context` tokens in the KV cache."""

    batch: int
    context: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read "4x16k" (k = 1024) or "4x1000"; raises ValueError."""
        batch, _, context = text.strip().lower().partition("x")
        unit = KIBI if context.endswith("k") else 1
        case = cls(int(batch), int(context.removesuffix("k")) * unit)
        if case.batch < 1 or case.context < 1:
            raise ValueError(f"batch and context must be positive: {text!r}")
        return case

    def __str__(self) -> str:
        whole = self.context % KIBI == 0
        return f"{self.batch}x{self.context // KIBI}k" if whole else f"{self.batch}x{self.context}"
