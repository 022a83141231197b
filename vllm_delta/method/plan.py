"""Which layer does what: full, selection or sparse. Plain Python, without vLLM.

Layers that DELTA does not touch (sliding window, for one) have no role; the others are *eligible*. Layer
indices are the model's own, so that they mean the same in the settings, the log and the model's files;
`full_layers` counts eligible layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from itertools import groupby, pairwise

from vllm_delta.method.config import DeltaConfig, DeltaConfigError


class Role(StrEnum):
    """What a layer does for a decode row."""

    #: attends to all tokens
    FULL = "full"
    #: attends to all tokens and selects the pages (some policies: the tokens) for the sparse layers after it
    SELECTION = "selection"
    #: attends to what the nearest earlier selection layer chose, under some policies to its own choice
    SPARSE = "sparse"


#: Selection layers that the paper tuned (arXiv 2510.09883), by (model type, layers, hidden size):
#: DeepSeek-R1-Distill-Qwen-1.5B, 7B and 14B.
PRESETS: dict[tuple[str, int, int], tuple[int, ...]] = {
    ("qwen2", 28, 1536): (2, 14, 22),
    ("qwen2", 28, 3584): (2, 14, 22),
    ("qwen2", 48, 5120): (2, 6, 42),
}

#: Share of a probe's tokens at which a head of a layer that looks things up hits (`vllm_delta.plain.probe`).
LOOKS_UP = 0.6

#: Policies under which every layer after the full ones is sparse and chooses for itself.
SELF_SELECTING = ("quest", "streaming", "oracle")

#: Policies whose rule is TidalDecode's (arXiv 2410.05076): a selection layer after the full layers and one in
#: the middle.
_TWO_SELECTION_LAYERS = ("lessismore", "tidal")


@dataclass(frozen=True)
class Plan:
    """The role of each eligible layer, by the layer's index."""

    roles: dict[int, Role]
    #: how selection layers were found: "settings", "preset", "probe", "rule", or a calibration and its file
    source: str
    #: what chooses, one of `vllm_delta.method.config.POLICIES`
    policy: str = "delta"
    #: by layer that chooses pages or reads them, the layer whose own table it writes or reads; the others
    #: share one, which the nearest earlier selection layer of the same step has written
    choosers: Mapping[int, int] = field(default_factory=dict)

    def layers(self, role: Role) -> list[int]:
        """Indices of the layers with this role, ascending."""
        return sorted(layer for layer, its_role in self.roles.items() if its_role is role)

    def count(self, role: Role, among: Collection[int]) -> int:
        """How many of these layers have this role."""
        return sum(self.roles.get(layer) is role for layer in among)

    @cached_property
    def before_sparse(self) -> frozenset[int]:
        """The layers whose next eligible layer is sparse."""
        return frozenset(
            layer for layer, following in pairwise(sorted(self.roles)) if self.roles[following] is Role.SPARSE
        )

    def for_rank(self, local_layers: Sequence[int]) -> Plan:
        """The plan of a pipeline rank, which holds `local_layers` only.

        Selection tables do not travel between ranks. A rank whose first layers are sparse would have none
        to read, so its first eligible layer becomes a selection layer, unless every layer chooses for itself.
        """
        roles = {layer: self.roles[layer] for layer in sorted(local_layers) if layer in self.roles}
        first = next(iter(roles), None)
        if first is not None and roles[first] is Role.SPARSE and self.policy not in SELF_SELECTING:
            roles[first] = Role.SELECTION
        return Plan(roles, self.source, self.policy)

    def describe(self) -> str:
        """One line: the layers of each role, and the policy where it is not DELTA."""
        parts = []
        for role in Role:
            layers = self.layers(role)
            parts.append(f"{len(layers)} {role.value} {_ranges(layers)}".rstrip())
        policy = "" if self.policy == "delta" else f"policy {self.policy}, for comparison: "
        selection = (
            "each sparse layer selects for itself"
            if self.policy in SELF_SELECTING
            else f"selection layers from {self.source}"
        )
        return f"{policy}{', '.join(parts)} ({selection})"


def make_plan(
    config: DeltaConfig,
    eligible: Sequence[int],
    num_layers: int,
    model: tuple[str, int, int] | None = None,
) -> Plan:
    """Give each eligible layer its role.

    Args:
        config: the settings.
        eligible: indices of the layers that DELTA may make sparse, ascending.
        num_layers: layers of the model; only for messages and range checks.
        model: model type, number of layers and hidden size, to find a preset.

    Raises:
        DeltaConfigError: selection layers that are out of range, not eligible, among the full layers, or
            missing where sparse layers need one.
    """
    check_layer_numbers(config, num_layers)
    rest = list(eligible[config.full_layers :])
    selection_layers: tuple[int, ...]
    if config.policy in SELF_SELECTING:
        selection_layers, source = (), "rule"
    elif config.selection_layers == "auto":
        selection_layers, source = _automatic_selection(config, eligible, model)
    else:
        selection_layers = tuple(sorted(config.selection_layers))
        source = "settings" if config.calibration is None else f"calibration {config.calibration}"
        _check_selection(config, selection_layers, eligible, rest)
    roles = dict.fromkeys(eligible, Role.FULL)
    for layer in rest:
        roles[layer] = Role.SELECTION if layer in selection_layers else Role.SPARSE
    return Plan(roles, source, config.policy)


def probed_settings(
    config: DeltaConfig, hits: Mapping[int, float], number: int, keeps_full_layers: bool
) -> DeltaConfig | None:
    """The settings with the layers that a probe found to look things up as selection layers.

    The first and the third eligible layer select, as early layers gather what later ones look up. Of layers
    that look things up one after another, one selects for all, since they want the same pages: of the first
    such run its first layer, before which nobody has chosen such pages, of others the one that hits most. A
    run is cut where it is longer than a sixth of the depth. If that makes fewer full and selection layers
    than `number`, early layers are added; if it makes more, the first count, since later layers can read the
    pages of earlier ones.

    Args:
        config: whose selection layers are "auto".
        hits: by eligible layer, the best share of its heads; see `vllm_delta.plain.probe`.
        number: full and selection layers together; more where `full_layers` stay and leave no room.
        keeps_full_layers: whether `full_layers` stays as it is, because somebody chose it.

    Returns:
        None where no layer behind the first ones looks things up.
    """
    eligible = sorted(hits)
    hits = {layer: round(share, 2) for layer, share in hits.items()}  # so that a start is like the last one
    fixed = eligible[: config.full_layers + 1] if keeps_full_layers else eligible[:3:2]
    longest = max(1, len(eligible) // 6)
    behind = eligible[eligible.index(fixed[-1]) + 1 :] if fixed else []
    runs: list[list[int]] = []
    for looks_up, layers in groupby(behind, lambda layer: hits[layer] >= LOOKS_UP):
        run = list(layers) if looks_up else []
        runs += [run[begin : begin + longest] for begin in range(0, len(run), longest)]
    if not runs:
        return None
    found = [runs[0][0], *(max(run, key=lambda layer: hits[layer]) for run in runs[1:])]
    passes = [*fixed, *found[: max(1, number - len(fixed))]]
    others = [layer for layer in eligible if layer not in passes]
    passes = sorted(passes + others[: max(0, number - len(passes))])
    full_layers = config.full_layers if keeps_full_layers else 0
    selection_layers = tuple(layer for layer in passes if layer not in eligible[:full_layers])
    return replace(config, full_layers=full_layers, selection_layers=selection_layers)


def check_layer_numbers(config: DeltaConfig, num_layers: int) -> None:
    """Check what needs no more than the number of the model's layers.

    Raises:
        DeltaConfigError: more full layers than the model has layers, or selection layers out of range.
    """
    # The default suits models of one layer too; a number that somebody chose has to make sense.
    if config.full_layers > max(num_layers, DeltaConfig.full_layers):
        raise DeltaConfigError(
            f"{_named(config, 'full_layers')} must be at most the model's {num_layers} layers, "
            f"not {config.full_layers}"
        )
    if config.selection_layers == "auto" or config.policy in SELF_SELECTING:
        return
    for layer in config.selection_layers:
        if not 0 <= layer < num_layers:
            raise DeltaConfigError(
                f"{_named(config, 'selection_layers')}: {layer} is out of range; "
                f"the model's layers are 0 to {num_layers - 1}"
            )


def preset_of(model: tuple[str, int, int] | None, depth: int) -> tuple[int, ...] | None:
    """The paper's selection layers of a model; None for another model.

    Args:
        model: model type, number of layers and hidden size; None where they are not known.
        depth: number of eligible layers, which have to be all.
    """
    if model is None or depth != model[1]:
        return None
    return PRESETS.get(model)


def _automatic_selection(
    config: DeltaConfig, eligible: Sequence[int], model: tuple[str, int, int] | None
) -> tuple[tuple[int, ...], str]:
    """The preset of a known model, else the first layer after the full ones, 1/2 and 4/5 of the depth.

    Policies with two selection layers have no presets, and leave out the last of these.

    A selection layer without a sparse layer after it costs its selection and yields nothing: the rule
    leaves out one that directly follows another, and the last layer.
    """
    depth = len(eligible)
    first = config.full_layers
    if first >= depth:
        return (), "rule"
    two = config.policy in _TWO_SELECTION_LAYERS
    preset = None if two else preset_of(model, depth)
    if preset is not None:
        return (first, *(layer for layer in preset[1:] if layer > first)), "preset"
    chosen = [first]
    for candidate in (depth // 2,) if two else (depth // 2, round(depth * 4 / 5)):
        if chosen[-1] + 1 < candidate < depth - 1:
            chosen.append(candidate)
    return tuple(eligible[ordinal] for ordinal in chosen), "rule"


def _check_selection(
    config: DeltaConfig, selection_layers: tuple[int, ...], eligible: Sequence[int], rest: Sequence[int]
) -> None:
    key = _named(config, "selection_layers")
    for layer in selection_layers:
        if layer not in eligible:
            raise DeltaConfigError(
                f"{key}: layer {layer} does not run full attention; accepted: {_ranges(rest)}"
            )
        if layer not in rest:
            raise DeltaConfigError(
                f"{key}: layer {layer} is one of the first delta.full_layers "
                f"layers, which select nothing; accepted: {_ranges(rest)}"
            )
    if rest and rest[0] not in selection_layers:
        raise DeltaConfigError(
            f"{key} must include layer {rest[0]}, the first one after the full "
            f"layers: layer {rest[0]} would be sparse with no selection to read"
        )


def _named(config: DeltaConfig, key: str) -> str:
    """The setting, or the calibration file that it comes from."""
    return f"delta.{key}" if config.calibration is None else f"{key} of the calibration {config.calibration}"


def _ranges(layers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] + 1 == layer:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
