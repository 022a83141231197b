"""Which layers attend to everything: a search by loss, and the rules that it is compared with. Pure Python.

A set of *passes* names the layers that read the whole cache, by their index, ascending. The first eligible
layer is always among them: a sparse layer needs a selection to read. The first passes without a sparse layer
between them are the full layers, but for the last of them; from there on, every pass is a selection layer
(`split_passes`). So the full layers are found together with the selection layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cache

Passes = tuple[int, ...]
Loss = Callable[[Passes], float]

#: candidates that a screening leaves for the whole loss
SURVIVORS = 4
#: layers by which a pass is moved in a refinement, at most
REACH = 2
#: refinements at most
MAX_REFINEMENTS = 2
#: layers that are tried as the next pass: the most sensitive ones, and the middles of sparse stretches
MOST_SENSITIVE, MIDDLES = 8, 3


def split_passes(passes: Passes, eligible: Sequence[int]) -> tuple[int, Passes]:
    """`full_layers` and `selection_layers` of these passes, as DELTA's settings want them.

    Raises:
        ValueError: the first eligible layer is not among them, or one of them is not eligible.
    """
    if not passes or passes[0] != eligible[0] or not set(passes) <= set(eligible):
        raise ValueError(f"passes must begin with layer {eligible[0]} and be eligible layers: {passes}")
    same = (layer == other for layer, other in zip(passes, eligible, strict=False))
    leading = sum(1 for _ in itertools.takewhile(bool, same))
    if leading == len(eligible):
        return leading, ()
    return leading - 1, passes[leading - 1 :]


def join_passes(full_layers: int, selection_layers: Sequence[int], eligible: Sequence[int]) -> Passes:
    """The passes of these settings; the inverse of `split_passes`."""
    return tuple(sorted({*eligible[:full_layers], *selection_layers}))


def attended_share(
    passes: Passes, eligible: Sequence[int], budget_tokens: int, lengths: Sequence[int]
) -> float:
    """Attended tokens over context tokens, of all eligible layers, for rows that see `lengths` tokens."""
    share = len(passes) / len(eligible)
    kept = sum(min(length, budget_tokens) for length in lengths) / sum(lengths)
    return share + (1 - share) * kept


def search(
    eligible: Sequence[int],
    number: int,
    loss: Loss,
    screen: Loss | None = None,
    sensitivity: Mapping[int, float] | None = None,
) -> list[Passes]:
    """The sets of 1 to `number` passes, in turn, that a greedy search with refinements finds.

    It adds the pass that lowers the loss most, one after another, then moves single passes of the last set
    as long as that lowers the loss. `screen` is a cheaper loss, of which the best `SURVIVORS` of each turn
    are compared by `loss`; without it all are. With `sensitivity`, what is lost where a layer alone is
    sparse, only `promising` layers are tried. Losses are asked for once per set.

    Raises:
        ValueError: a number that is less than one or more than the layers.
    """
    if not 1 <= number <= len(eligible):
        raise ValueError(f"the number of passes must be 1 to {len(eligible)}, not {number}")
    whole, cheap = cache(loss), cache(screen or loss)

    def best(candidates: set[Passes]) -> Passes:
        survivors = sorted(candidates, key=cheap)[:SURVIVORS] if screen else sorted(candidates)
        return min(survivors, key=whole)

    path: list[Passes] = [(eligible[0],)]
    while len(path) < number:
        chosen = path[-1]
        layers = promising(chosen, eligible, sensitivity)
        path.append(best({tuple(sorted((*chosen, layer))) for layer in layers}))
    for _ in range(MAX_REFINEMENTS if number < len(eligible) else 0):
        moved = _neighbours(path[-1], eligible)
        if not moved or whole(better := best(moved)) >= whole(path[-1]):
            break
        path[-1] = better
    return path


def promising(chosen: Passes, eligible: Sequence[int], sensitivity: Mapping[int, float] | None) -> list[int]:
    """Layers to try beside the chosen ones: the most sensitive, and those amid long sparse stretches."""
    others = [layer for layer in eligible if layer not in chosen]
    if sensitivity is None or len(others) <= MOST_SENSITIVE + MIDDLES:
        return others
    found = set(sorted(others, key=lambda layer: -sensitivity[layer])[:MOST_SENSITIVE])
    bounds = [eligible.index(layer) for layer in chosen] + [len(eligible)]
    stretches = sorted(itertools.pairwise(bounds), key=lambda pair: pair[0] - pair[1])
    found |= {eligible[(first + end) // 2] for first, end in stretches[:MIDDLES] if end - first > 1}
    return sorted(found)


def _neighbours(passes: Passes, eligible: Sequence[int]) -> set[Passes]:
    """Sets in which one pass, not the first, is another layer up to `REACH` ordinals away."""
    ordinals = {layer: ordinal for ordinal, layer in enumerate(eligible)}
    sets = set()
    for layer in passes[1:]:
        ordinal = ordinals[layer]
        for other in eligible[max(0, ordinal - REACH) : ordinal + REACH + 1]:
            if other not in passes:
                sets.add(tuple(sorted({*passes, other} - {layer})))
    return sets


def mass_rule(mass: Mapping[tuple[int, int], float], eligible: Sequence[int], number: int) -> Passes:
    """The passes that keep the most attention mass, by dynamic programming over the depth.

    The rule of Kascade (arXiv 2512.16391), for anchors whose pages all layers up to the next read: maximise
    the sum over layers of the mass that the pages of the nearest earlier pass hold, a pass itself counting 1.

    Args:
        mass: share of layer j's attention on the pages that layer i chooses, for all i < j.
        eligible: the layers.
        number: passes, the first layer's included.
    """
    depth = len(eligible)

    def segment(first: int, end: int) -> float:
        return 1 + sum(mass[eligible[first], eligible[layer]] for layer in range(first + 1, end))

    # best[k][e]: most mass of the layers before ordinal e with k passes, and where the last of them is
    best = [[(float("-inf"), 0)] * (depth + 1) for _ in range(number + 1)]
    best[0][0] = (0.0, 0)
    for count in range(1, number + 1):
        for end in range(1, depth + 1):
            best[count][end] = max(
                (best[count - 1][first][0] + segment(first, end), first) for first in range(end)
            )
    passes, end = [], depth
    for count in range(number, 0, -1):
        end = best[count][end][1]
        passes.append(eligible[end])
    return tuple(reversed(passes))


def peak_rule(
    distances: Mapping[int, float], eligible: Sequence[int], number: int, full_layers: int
) -> Passes:
    """The paper's rule (arXiv 2510.09883): where attention changes most from a layer to the next.

    The full layers, the layer after them, and the highest peaks of the distances behind it, at least a
    quarter of an even spacing apart as far as there are enough such peaks.

    Args:
        distances: 1 - cos(attention of the layer before, of the layer), for all layers but the first.
        eligible: the layers.
        number: passes in total.
        full_layers: layers that stay full, of these.
    """
    fixed = list(eligible[: min(full_layers + 1, number)])
    rest = list(eligible[len(fixed) :])
    gap = max(1, len(rest) // (4 * max(1, number - len(fixed))))
    heights = [distances[layer] for layer in eligible[1:]]
    peaks = {
        layer
        for ordinal, layer in enumerate(eligible[1:])
        if heights[ordinal] == max(heights[max(0, ordinal - 1) : ordinal + 2])
    }
    chosen = list(fixed)
    ranked = sorted(rest, key=lambda layer: (layer not in peaks, -distances[layer]))
    for least in (gap, 1):
        for layer in ranked:
            if len(chosen) < number and all(abs(layer - other) >= least for other in chosen):
                chosen.append(layer)
    return tuple(sorted(chosen))
