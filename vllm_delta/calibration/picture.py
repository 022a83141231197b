"""The picture of a calibration: attention mass, each layer's sensitivity, and the choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vllm_delta.calibration.run import Result
from vllm_delta.calibration.search import Passes

_STYLE: dict[Any, Any] = {"svg.hashsalt": "calibration", "font.size": 10, "axes.axisbelow": True}
_FULL, _SPARSE = "#0072b2", "#e3e6ea"


def draw(result: Result, path: Path) -> None:
    """Write the picture, as SVG or PNG by the path's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = result.eligible
    with plt.rc_context(_STYLE):
        figure, (heat, bars, choice) = plt.subplots(
            3, 1, figsize=(7, 11), height_ratios=(3, 1.2, 0.35 * len(result.choices)), layout="constrained"
        )
        mass = np.full((len(layers), len(layers)), np.nan)
        for (first, second), share in result.observed.mass.items():
            mass[layers.index(first), layers.index(second)] = share
        image = heat.imshow(mass, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        heat.set_title(
            f"attention mass of a layer on the pages of another, {result.options.search_budget} tokens"
        )
        heat.set_ylabel("pages chosen at layer")
        figure.colorbar(image, ax=heat, label="share of the layer's attention")
        bars.bar(range(len(layers)), [result.sensitivity.get(layer, 0.0) for layer in layers], color=_FULL)
        bars.set_title("loss where this layer alone is sparse")
        bars.set_ylabel("divergence, nats")
        bars.set_xlim(-0.5, len(layers) - 0.5)
        _draw_choices(choice, result)
        for axes in (heat, bars, choice):
            axes.set_xticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
        heat.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
        choice.set_xlabel("layer")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def _draw_choices(axes: Any, result: Result) -> None:
    def row(passes: Passes) -> list[str]:
        return [_FULL if layer in passes else _SPARSE for layer in result.eligible]

    for height, choice in enumerate(result.choices):
        axes.bar(range(len(result.eligible)), 0.8, bottom=height - 0.4, width=0.9, color=row(choice.passes))
    labels = [f"{choice.name}: {choice.loss.divergence:.2g}" for choice in result.choices]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(-0.5, len(result.eligible) - 0.5)
    axes.set_title("layers that attend to everything, and the divergence in nats")
