"""A calibration from the prompts to the file: what is measured, in which order, and what is written."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vllm_delta.calibration.engine import Answer, Engine, Loss, Observed
from vllm_delta.calibration.prompts import CalibrationError
from vllm_delta.calibration.search import (
    Passes,
    attended_share,
    join_passes,
    mass_rule,
    peak_rule,
    search,
    split_passes,
)
from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.plan import Role, make_plan

#: rows of each answer of which mass and distances are computed
OBSERVED_ROWS = 16
#: answers that candidates are screened on: a quarter of those searched with, but no fewer than this. What one
#: answer needs, another may not, and the candidates that it cannot tell apart would survive by chance.
SCREENED = 3
#: budgets of which the loss is reported, relative to the one that is calibrated for
BUDGETS = (0.5, 1, 2)


@dataclass(frozen=True)
class Choice:
    """A set of passes and what it loses on answers that were not used to find it."""

    name: str
    passes: Passes
    loss: Loss


@dataclass
class Result:
    """All that a calibration found."""

    config: DeltaConfig
    eligible: list[int]
    #: the calibrated choice first, then the rules that it is compared with
    choices: list[Choice]
    #: the loss of the calibrated choice, by budget in tokens
    by_budget: dict[int, Loss]
    #: the divergence where this layer alone is sparse, and the layer before it selects
    sensitivity: dict[int, float]
    observed: Observed
    #: tokens that the scored rows see
    lengths: list[int]
    evaluations: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Choice:
        """The calibrated choice."""
        return self.choices[0]

    def settings(self) -> dict[str, Any]:
        """What ``--additional-config`` takes: DELTA's settings, and beside them how they were found."""
        c = self.config

        def layers(choice: Choice) -> dict[str, Any]:
            full_layers, selection_layers = split_passes(choice.passes, self.eligible)
            return {"full_layers": full_layers, "selection_layers": list(selection_layers)}

        def describe(loss: Loss) -> dict[str, float]:
            return {
                "divergence": round(loss.divergence, 6),
                "agreement": round(loss.agreement, 6),
            }

        return {
            "delta": {
                **layers(self.best),
                "budget_tokens": c.budget_tokens,
                "recent_tokens": c.recent_tokens,
                "sink_tokens": c.sink_tokens,
                "page_size": c.page_size,
            },
            "calibration": {
                **self.notes,
                "evaluations": self.evaluations,
                "scored_tokens": len(self.lengths),
                "mean_context": round(sum(self.lengths) / len(self.lengths)),
                "budgets": [
                    {
                        "budget_tokens": budget,
                        "attended": round(
                            attended_share(self.best.passes, self.eligible, budget, self.lengths), 4
                        ),
                        **describe(loss),
                    }
                    for budget, loss in self.by_budget.items()
                ],
                "compared": {
                    choice.name: {**layers(choice), **describe(choice.loss)} for choice in self.choices
                },
            },
        }


@dataclass(frozen=True)
class Options:
    """What is asked for."""

    config: DeltaConfig
    #: passes that the result may have: full and selection layers together
    passes: int
    output_tokens: int
    scored_tokens: int


def calibrate(
    engine: Engine, prompts: Sequence[Any], options: Options, progress: Callable[[str], Callable[[], object]]
) -> Result:
    """Find the passes that lose least.

    Half of the answers are searched with, a few of these screen candidates; what is reported of the result,
    and of the rules beside it, is measured on the other half.

    Args:
        engine: of the model.
        prompts: as `Engine.answer` takes them; at least two answers have to exceed the budget.
        options: what is asked for.
        progress: is called with a part's name; what it returns is called whenever a bit of it is done.

    Raises:
        CalibrationError: too few answers beyond the budget, or a number of passes that the model cannot have.
    """
    config, eligible = options.config, engine.eligible
    answers = _answers(engine, prompts, options, progress("answers"))
    observed = engine.record(answers, OBSERVED_ROWS, progress("full attention"))
    keys = range(len(answers))
    held_out, searched = keys[1::2], keys[::2]
    screened = searched[: max(SCREENED, len(searched) // 4)]
    losses = _Losses(engine, config.budget_tokens)
    tick = progress("sensitivity")
    sensitivity = {
        layer: losses.of(tuple(other for other in eligible if other != layer), screened, tick).divergence
        for layer in eligible[1:]
    }
    tick = progress("search")

    def divergence(passes: Passes, among: range) -> float:
        return losses.of(passes, among, tick).divergence

    whole, screen = (partial(divergence, among=among) for among in (searched, screened))
    best = search(eligible, options.passes, whole, screen if len(screened) < len(searched) else None)
    tick = progress("comparison")
    compared = {"calibrated": best, **rules(observed, eligible, options)}
    choices = [Choice(name, passes, losses.of(passes, held_out, tick)) for name, passes in compared.items()]
    by_budget = {budget: _Losses(engine, budget).of(best, held_out, tick) for budget in budgets(config)}
    return Result(
        config=config,
        eligible=eligible,
        choices=choices,
        by_budget=by_budget,
        sensitivity=sensitivity,
        observed=observed,
        lengths=[length for key in held_out for length in _lengths(answers[key])],
        evaluations=len(losses.measured),
    )


@dataclass
class _Losses:
    """What sets of passes lose along some answers, and which were measured."""

    engine: Engine
    budget_tokens: int
    measured: set[tuple[Passes, range]] = field(default_factory=set)

    def of(self, passes: Passes, among: range, tick: Callable[[], object]) -> Loss:
        found = self.engine.loss(passes, self.budget_tokens, among)
        self.measured.add((passes, among))
        tick()
        return found


def _answers(
    engine: Engine, prompts: Sequence[Any], options: Options, tick: Callable[[], object]
) -> list[Answer]:
    """Full attention's answers that exceed the budget; raises `CalibrationError` where they are too few."""
    most, budget = len(engine.eligible), options.config.budget_tokens
    if not 1 <= options.passes <= most:
        raise CalibrationError(f"full and selection layers must be 1 to {most}, not {options.passes}")
    tick()
    found = engine.answer(prompts, options.output_tokens, options.scored_tokens)
    answers = [answer for answer in found if len(answer.tokens) > budget]
    if len(answers) < 2:
        raise CalibrationError(
            f"{len(answers)} of {len(prompts)} sequences exceed the budget of {budget} tokens, where at "
            "least 2 are needed: longer prompts, more output tokens or a smaller budget"
        )
    return answers


def rules(observed: Observed, eligible: Sequence[int], options: Options) -> dict[str, Passes]:
    """The passes of the rule of thumb, the paper's peaks and the attention mass, as many as are asked for.

    The rule of thumb gives three selection layers; with another number of passes it has as many full layers
    as that leaves.
    """
    number = options.passes
    full_layers = max(0, number - 3)
    config = DeltaConfig(full_layers=full_layers)
    thumb = make_plan(config, eligible, eligible[-1] + 1)
    passes = join_passes(full_layers, thumb.layers(Role.SELECTION), eligible)
    return {
        "rule of thumb": passes[:number],
        "peaks": peak_rule(observed.distances, eligible, number, min(2, number - 1)),
        "mass": mass_rule(observed.mass, eligible, number),
    }


def budgets(config: DeltaConfig) -> list[int]:
    """Budgets of which the loss is reported, in tokens, ascending; the last is the largest."""
    least = max(1, config.recent_tokens + config.sink_tokens)
    tokens = [int(config.budget_pages * factor) * config.page_size for factor in BUDGETS]
    return [budget for budget in tokens if budget >= least]


def _lengths(answer: Answer) -> range:
    return range(answer.first_row + 1, len(answer.tokens) + 1)


def describe_run(model: str, prompts: str) -> dict[str, Any]:
    """What the file says of where it comes from."""
    return {
        "model": Path(model).resolve().name if Path(model).is_dir() else model,
        "prompts": prompts,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "vllm": importlib.metadata.version("vllm"),
        "vllm_delta": importlib.metadata.version("vllm-delta"),
    }


def table(result: Result) -> str:
    """The choices, and the losses by budget, as text."""
    lines = [f"{'layers':15}{'full':>5}  {'selection':24}{'divergence':>12}{'agreement':>11}"]
    for choice in result.choices:
        full_layers, selection = split_passes(choice.passes, result.eligible)
        names = ", ".join(map(str, selection))
        lines.append(
            f"{choice.name:15}{full_layers:>5}  {names:24}{choice.loss.divergence:>12.6f}"
            f"{choice.loss.agreement:>11.2%}"
        )
    lines.append(f"\n{'budget':>8}{'attended':>10}{'divergence':>12}{'agreement':>11}")
    for budget, loss in result.by_budget.items():
        share = attended_share(result.best.passes, result.eligible, budget, result.lengths)
        lines.append(f"{budget:>8}{share:>10.1%}{loss.divergence:>12.6f}{loss.agreement:>11.2%}")
    return "\n".join(lines)
