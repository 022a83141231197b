"""What a plan loses along texts, and how sure that is. Pure Python.

A scored token belongs to a family. Of tokens that are looked up (`RETRIEVAL`) those count that full attention
gets right: *kept* is the share of them that a plan gets right, too. Of all others the divergence from full
attention's distributions counts. The loss that a search lowers is the mean over families of looked-up tokens
of their mean divergence, plus the mean divergence of all others.

Neighbouring tokens of one family, such as one quotation, are a unit. Intervals are of the bootstrap over
units: 95% of its percentiles.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TypeVar

from vllm_delta.calibration.texts import RETRIEVAL, Text

#: Samples of the bootstrap.
SAMPLES = 300

Drawn = TypeVar("Drawn")


@dataclass(frozen=True)
class Found:
    """What a plan makes of one text's scored tokens, in the order of their positions."""

    #: from full attention's distributions of these tokens, nats
    divergences: list[float]
    #: the likeliest tokens in their places
    likeliest: list[int]
    #: log-probabilities of the tokens themselves, nats; none where they were not asked for
    log_probabilities: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Unit:
    """Counted tokens of one family that are neighbours in a text."""

    family: str
    tokens: int
    #: tokens that the plan gets right; of those not looked up: where it agrees with full attention
    kept: int
    #: sum, nats
    divergence: float


def units_of(text: Text, full: Found, found: Found) -> list[Unit]:
    """The units of a text under a plan; `full` is what full attention makes of it.

    Raises:
        ValueError: as many tokens were not found as are scored.
    """
    positions = text.positions
    if not len(positions) == len(full.likeliest) == len(found.likeliest) == len(found.divergences):
        raise ValueError(f"{len(found.likeliest)} tokens were scored, not {len(positions)}")
    units: list[Unit] = []
    last = None
    for index, position in enumerate(positions):
        family, expected = text.scored[position], full.likeliest[index]
        if family in RETRIEVAL and expected != text.tokens[position]:
            continue
        this = Unit(family, 1, int(found.likeliest[index] == expected), found.divergences[index])
        if last is not None and last + 1 == position and units and units[-1].family == family:
            before = units.pop()
            this = Unit(
                family,
                before.tokens + 1,
                before.kept + this.kept,
                before.divergence + this.divergence,
            )
        units.append(this)
        last = position
    return units


@dataclass(frozen=True)
class Loss:
    """What a plan loses along some texts."""

    units: tuple[Unit, ...]

    @property
    def value(self) -> float:
        """What a search lowers, nats."""
        return _value(self.units)

    @property
    def families(self) -> list[str]:
        """Of the units, looked-up ones first."""
        return sorted({unit.family for unit in self.units}, key=lambda name: (name not in RETRIEVAL, name))

    def tokens(self, family: str | None = None) -> int:
        """Counted tokens that are looked up, or of a family."""
        return sum(unit.tokens for unit in _of(self.units, family))

    @property
    def has_retrieval(self) -> bool:
        """Whether anything is looked up."""
        return self.tokens() > 0

    def kept(self, family: str | None = None) -> float:
        """The share of looked-up tokens, or of a family, that is kept."""
        return _kept(_of(self.units, family))

    @property
    def divergence(self) -> float:
        """Mean divergence of the tokens that are not looked up, or else of all, nats."""
        return _mean(_others(self.units))

    @property
    def agreement(self) -> float:
        """Share of the same tokens where the likeliest is full attention's."""
        return _kept(_others(self.units))

    def interval(self, statistic: str) -> tuple[float, float]:
        """Of "kept" or "divergence"."""
        functions: dict[str, tuple[Callable[[Sequence[Unit]], float], Sequence[Unit]]] = {
            "kept": (_kept, _of(self.units, None)),
            "divergence": (_mean, _others(self.units)),
        }
        function, units = functions[statistic]
        return bootstrap(units, function) if units else (function(units), function(units))


def bootstrap(
    units: Sequence[Drawn], statistic: Callable[[Sequence[Drawn]], float], samples: int = SAMPLES
) -> tuple[float, float]:
    """95% of a statistic's values over as many of these units, drawn with replacement."""
    draw = random.Random(0)
    values = sorted(statistic(draw.choices(units, k=len(units))) for _ in range(samples))
    return values[samples // 40], values[-1 - samples // 40]


def _of(units: Sequence[Unit], family: str | None) -> list[Unit]:
    return [unit for unit in units if (unit.family in RETRIEVAL if family is None else unit.family == family)]


def _others(units: Sequence[Unit]) -> Sequence[Unit]:
    return [unit for unit in units if unit.family not in RETRIEVAL] or units


def _kept(units: Sequence[Unit]) -> float:
    tokens = sum(unit.tokens for unit in units)
    return sum(unit.kept for unit in units) / tokens if tokens else 1.0


def _mean(units: Sequence[Unit]) -> float:
    tokens = sum(unit.tokens for unit in units)
    return sum(unit.divergence for unit in units) / tokens if tokens else 0.0


def _value(units: Sequence[Unit]) -> float:
    families = {unit.family for unit in units} & set(RETRIEVAL)
    looked_up = fmean(_mean(_of(units, family)) for family in families) if families else 0.0
    others = [unit for unit in units if unit.family not in RETRIEVAL]
    return looked_up + _mean(others)
