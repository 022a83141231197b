"""A calibration from texts to the file: what is measured, in which order, and what is written."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vllm_delta.calibration.engine import Engine, Observed
from vllm_delta.calibration.evidence import Found, Loss, units_of
from vllm_delta.calibration.prompts import CalibrationError
from vllm_delta.calibration.search import (
    MAX_REFINEMENTS,
    MIDDLES,
    MOST_SENSITIVE,
    REACH,
    SURVIVORS,
    Passes,
    attended_share,
    join_passes,
    mass_rule,
    peak_rule,
    search,
    split_passes,
)
from vllm_delta.calibration.texts import RETRIEVAL, Text
from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.plan import Role, make_plan, probed_settings

#: rows of each of the first `OBSERVED_TEXTS` of which mass and distances are computed
OBSERVED_ROWS, OBSERVED_TEXTS = 16, 2
#: budgets of which the loss is reported, relative to the one that is searched with
BUDGETS = (0.5, 1, 2, 4)
#: tokens that are looked up and that full attention has to get right, among those searched and those held out
LEAST_RETRIEVED = 60
#: names of choices
CALIBRATED, THUMB, PROBE = "calibrated", "rule of thumb", "probe"
#: mean divergence of full attention from itself that is rounding, nats
ROUNDING = 0.01


@dataclass(frozen=True)
class Choice:
    """A set of passes and what it loses on texts that were not used to find it."""

    name: str
    passes: Passes
    loss: Loss


@dataclass(frozen=True)
class Options:
    """What is asked for."""

    config: DeltaConfig
    #: tokens, the budget that sets are compared with
    search_budget: int
    #: most full and selection layers together
    most_passes: int
    #: whether there shall be exactly as many
    exactly: bool
    #: share of the looked-up tokens to be kept
    keep: float


@dataclass
class Result:
    """All that a calibration found."""

    options: Options
    eligible: list[int]
    #: the best one first
    choices: list[Choice]
    #: what the best set loses, by budget in tokens, ascending
    by_budget: dict[int, Loss]
    #: what the best sets of fewer passes lose with the budget of the search, by their number
    by_number: dict[int, tuple[Passes, Loss]]
    #: the loss where this layer alone is sparse, and reads the pages of the layer before
    sensitivity: dict[int, float]
    observed: Observed
    #: contexts of the scored tokens that were held out
    lengths: list[int]
    num_texts: int
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Choice:
        """What is written."""
        return self.choices[0]

    @property
    def smallest_budget(self) -> int | None:
        """Of those measured, the smallest one with which the best set keeps enough; None: none does."""
        enough = self.options.keep
        return next((budget for budget, loss in self.by_budget.items() if loss.kept() >= enough), None)

    @property
    def fewest_passes(self) -> int | None:
        """The smallest number of passes that keeps enough with the budget of the search; None: none does."""
        enough = self.options.keep
        sets = sorted(self.by_number.items())
        return next((number for number, (_, loss) in sets if loss.kept() >= enough), None)

    def attended(self, passes: Passes, budget: int) -> float:
        """Share of the context's tokens that the held-out tokens attend to, over all layers."""
        return attended_share(passes, self.eligible, budget, self.lengths)

    def settings(self) -> dict[str, Any]:
        """What ``--additional-config`` takes: DELTA's settings, and beside them how they were found."""
        config, searched = self.options.config, self.options.search_budget
        return {
            "delta": {
                **self._layers(self.best.passes),
                "budget_tokens": config.budget_tokens,
                "recent_tokens": config.recent_tokens,
                "sink_tokens": config.sink_tokens,
                "page_size": config.page_size,
            },
            "calibration": {
                **self.notes,
                "texts": self.num_texts,
                "search_budget_tokens": searched,
                "keep": self.options.keep,
                "mean_context": round(sum(self.lengths) / len(self.lengths)),
                "chosen": self.best.name,
                "smallest_budget_tokens": self.smallest_budget,
                "fewest_passes": self.fewest_passes,
                "compared": {
                    choice.name: self._described(choice.passes, searched, choice.loss)
                    for choice in self.choices
                },
                "budgets": [
                    {"budget_tokens": budget, **self._described(self.best.passes, budget, loss)}
                    for budget, loss in self.by_budget.items()
                ],
                "passes": [
                    {"passes": number, **self._described(passes, searched, loss)}
                    for number, (passes, loss) in sorted(self.by_number.items())
                ],
                "sensitivity": {str(layer): round(value, 6) for layer, value in self.sensitivity.items()},
            },
        }

    def _layers(self, passes: Passes) -> dict[str, Any]:
        full_layers, selection_layers = split_passes(passes, self.eligible)
        return {"full_layers": full_layers, "selection_layers": list(selection_layers)}

    def _described(self, passes: Passes, budget: int, loss: Loss) -> dict[str, Any]:
        def interval(statistic: str) -> list[float]:
            return [round(bound, 6) for bound in loss.interval(statistic)]

        described = {
            **self._layers(passes),
            "attended": round(self.attended(passes, budget), 4),
            "tokens": {family: loss.tokens(family) for family in loss.families},
            "divergence": round(loss.divergence, 6),
            "divergence_interval": interval("divergence"),
            "agreement": round(loss.agreement, 6),
        }
        if loss.has_retrieval:
            described |= {"kept": round(loss.kept(), 6), "kept_interval": interval("kept")}
            described["kept_of"] = {
                family: round(loss.kept(family), 6) for family in loss.families if family in RETRIEVAL
            }
        return described


class Runs:
    """Plans along kept texts, and how many tokens that is."""

    def __init__(self, engine: Engine, texts: Sequence[Text], tick: Callable[[int], object]) -> None:
        self._engine, self.texts, self._tick = engine, texts, tick
        self._full: dict[int, Found] = {}

    def keep(self, key: int, observed_rows: int) -> None:
        """Run a text under full attention."""
        self._full[key] = self._engine.keep(key, self.texts[key], observed_rows)
        self._tick(len(self.texts[key].tokens))

    def loss(self, passes: Passes, budget: int, keys: Sequence[int]) -> Loss:
        """What a plan loses along these texts."""
        units = []
        for key in keys:
            text = self.texts[key]
            units += units_of(text, self._full[key], self._engine.score(passes, budget, key))
            self._tick(len(text.tokens) - text.first_row)
        return Loss(tuple(units))


def calibrate(
    engine: Engine, texts: Sequence[Text], options: Options, tick: Callable[[int], object]
) -> Result:
    """Find the passes that lose least.

    Every second text is searched with, a few of these screen candidates; what is reported, and which set is
    written, is measured on the others.

    Args:
        engine: of the model.
        texts: two or more, longer than the budget of the search.
        options: what is asked for.
        tick: is called with the tokens that were computed, again and again; see `estimate`.

    Raises:
        CalibrationError: too little evidence, or a number of passes that the model cannot have.
    """
    eligible, budget, number = engine.eligible, options.search_budget, options.most_passes
    if not 1 <= number <= len(eligible):
        raise CalibrationError(f"full and selection layers must be 1 to {len(eligible)}, not {number}")
    keys = range(len(texts))
    searched, held_out = keys[::2], keys[1::2]
    screened = searched[: screened_texts(len(searched))]
    runs = Runs(engine, texts, tick)
    for key in keys:
        runs.keep(key, OBSERVED_ROWS if key < OBSERVED_TEXTS else 0)
    observed, hits = engine.observations(), engine.hits()
    for part in (searched, held_out):
        _check_evidence(runs.loss(tuple(eligible), budget, part))

    def value(passes: Passes, among: Sequence[int]) -> float:
        return runs.loss(passes, budget, among).value

    sensitivity = {
        layer: value(tuple(other for other in eligible if other != layer), screened) for layer in eligible[1:]
    }
    whole, screen = (partial(value, among=among) for among in (searched, screened))
    path = search(eligible, number, whole, screen if len(screened) < len(searched) else None, sensitivity)
    rules = rules_of(observed, eligible, hits, number)
    losses = {passes: runs.loss(passes, budget, held_out) for passes in sorted({*path, *rules.values()})}
    choices = _ranked(path, rules, losses, options)
    best = choices[0].passes
    by_budget = {
        other: losses[best] if other == budget else runs.loss(best, other, held_out)
        for other in budgets(options)
    }
    return Result(
        options=options,
        eligible=eligible,
        choices=choices,
        by_budget=by_budget,
        by_number={len(passes): (passes, losses[passes]) for passes in path},
        sensitivity=sensitivity,
        observed=observed,
        lengths=[position for key in held_out for position in texts[key].positions],
        num_texts=len(texts),
    )


def screened_texts(searched: int) -> int:
    """Texts that screen candidates, of those that are searched with."""
    return max(1, searched // 3)


def _ranked(
    path: list[Passes], rules: dict[str, Passes], losses: dict[Passes, Loss], options: Options
) -> list[Choice]:
    """The calibrated set and the rules, that first which is to be written: what loses least.

    Unless a number of passes was told, that is the calibrated set of the fewest passes that keep enough and
    are no worse than the rule of thumb on what is not looked up, if there is one.
    """
    thumb = losses[rules[THUMB]]

    def is_enough(passes: Passes) -> bool:
        loss = losses[passes]
        return loss.has_retrieval and loss.kept() >= options.keep and loss.divergence <= thumb.divergence

    few = None if options.exactly else next(filter(is_enough, path), None)
    named = {CALIBRATED: few or path[-1], **rules}
    choices = [Choice(name, passes, losses[passes]) for name, passes in named.items()]
    return sorted(choices, key=lambda choice: (few is None or choice.name != CALIBRATED, choice.loss.value))


def _check_evidence(loss: Loss) -> None:
    """Of full attention along some texts: enough is looked up, and full attention is equal to itself."""
    if loss.has_retrieval or all(unit.family in RETRIEVAL for unit in loss.units):
        right = loss.tokens()
        if right < LEAST_RETRIEVED:
            raise CalibrationError(
                f"full attention looks up only {right} tokens right, where {LEAST_RETRIEVED} are needed: the "
                "built-in texts say nothing of this model; give texts of its own by --prompts FILE"
            )
    if loss.value > ROUNDING:
        raise CalibrationError(
            f"full attention differs from itself by {loss.value:.3g} nats when it runs again; models with "
            "other state than a KV cache are not supported"
        )


def rules_of(
    observed: Observed, eligible: Sequence[int], hits: Mapping[int, float], number: int
) -> dict[str, Passes]:
    """The passes of the rule of thumb, the paper's peaks, the attention mass, and a probe that found some.

    They are as many as are asked for. The rule of thumb gives three selection layers; with another number of
    passes it has as many full layers as that leaves.
    """
    full_layers = max(0, number - 3)
    config = DeltaConfig(full_layers=full_layers)
    thumb = make_plan(config, eligible, eligible[-1] + 1)
    passes = join_passes(full_layers, thumb.layers(Role.SELECTION), eligible)
    probed = probed_settings(DeltaConfig(), hits, number, keeps_full_layers=False)
    layers = () if probed is None or probed.selection_layers == "auto" else probed.selection_layers
    found = {PROBE: layers[:number]} if layers else {}
    return {
        THUMB: passes[:number],
        **found,
        "peaks": peak_rule(observed.distances, eligible, number, min(2, number - 1)),
        "mass": mass_rule(observed.mass, eligible, number),
    }


def search_budget(config: DeltaConfig, context: int) -> int:
    """The budget that sets are compared with: an eighth of the context, but no more than what will be used.

    Where nearly all is kept, all sets look alike; what keeps enough with little keeps more with more.
    """
    least = config.recent_tokens + config.sink_tokens + 4 * config.page_size
    tokens = max(least, context // 8) // config.page_size * config.page_size
    return min(config.budget_tokens, tokens)


def budgets(options: Options) -> list[int]:
    """Budgets of which the loss is reported, in tokens, ascending."""
    config, searched = options.config, options.search_budget
    least = max(1, config.recent_tokens + config.sink_tokens)
    tokens = {int(searched * factor) // config.page_size * config.page_size for factor in BUDGETS}
    return sorted(budget for budget in tokens | {searched, config.budget_tokens} if budget >= least)


def estimate(texts: Sequence[Text], options: Options, depth: int) -> int:
    """Tokens that a calibration computes, at most about."""
    rows = max(len(text.tokens) - text.first_row for text in texts)
    searched = len(texts[::2])
    screened, held_out, number = screened_texts(searched), len(texts) - searched, options.most_passes
    tried = min(depth, MOST_SENSITIVE + MIDDLES)
    sets = len(texts) + (depth - 1) * screened
    sets += (number - 1) * (tried * screened + SURVIVORS * searched)
    sets += MAX_REFINEMENTS * (2 * REACH * (number - 1) * screened + SURVIVORS * searched)
    sets += (number + 3 + len(budgets(options))) * held_out
    return sum(len(text.tokens) for text in texts) + sets * rows


def describe_run(model: str, texts: str) -> dict[str, Any]:
    """What the file says of where it comes from."""
    return {
        "model": Path(model).resolve().name if Path(model).is_dir() else model,
        "prompts": texts,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "vllm": importlib.metadata.version("vllm"),
        "vllm_delta": importlib.metadata.version("vllm-delta"),
    }


def table(result: Result) -> str:
    """The choices, and the losses by budget and number of passes, as text."""
    searched = result.options.search_budget

    def row(name: str, passes: Passes, budget: int, loss: Loss) -> str:
        full_layers, selection = split_passes(passes, result.eligible)
        low, high = loss.interval("kept")
        kept = f"{loss.kept():.1%} ({low:.1%} to {high:.1%})" if loss.has_retrieval else ""
        names = ", ".join(map(str, selection))
        low, high = loss.interval("divergence")
        divergence = f"{loss.divergence:.4f} ({low:.4f} to {high:.4f})"
        share = result.attended(passes, budget)
        return f"{name:15}{full_layers:>5}  {names:22}{share:>9.1%}  {kept:26}{divergence:27}"

    counted = result.best.loss
    tokens = ", ".join(f"{counted.tokens(family)} {family}" for family in counted.families)
    head = f"{'':15}{'full':>5}  {'selection':22}{'attended':>9}  {'kept':26}{'divergence, nats':27}"
    lines = [f"{result.num_texts} texts; tokens that count, on those held out: {tokens}", ""]
    lines += [f"budget {searched}", head]
    lines += [row(choice.name, choice.passes, searched, choice.loss) for choice in result.choices]
    lines += ["", f"{result.best.name}, by budget", head]
    lines += [row(f"{budget}", result.best.passes, budget, loss) for budget, loss in result.by_budget.items()]
    lines += ["", f"by full and selection layers together, budget {searched}", head]
    sets = sorted(result.by_number.items())
    lines += [row(f"{number}", passes, searched, loss) for number, (passes, loss) in sets]
    sensitive = sorted(result.sensitivity.items(), key=lambda pair: -pair[1])
    lines += ["", "most sensitive layers: " + ", ".join(f"{layer} ({v:.3f})" for layer, v in sensitive[:8])]
    if counted.has_retrieval:
        lines += ["", _advice(result)]
    return "\n".join(line.rstrip() for line in lines)


def _advice(result: Result) -> str:
    keep = f"{result.options.keep:.0%}"
    budget, number = result.smallest_budget, result.fewest_passes
    if budget is None:
        return f"no budget that was measured keeps {keep} of what full attention looks up"
    text = f"{keep} of what full attention looks up is kept from a budget of {budget} tokens on"
    return text if number is None else f"{text}, and with {number} full and selection layers or more"
