"""The settings that an accuracy benchmark compares, and the sweeps that make them.

A setting is a backend with a name and, for DELTA, the settings that the server gets. They are not checked
here: what is wrong with them, the server reports.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.lib.base import DELTA, Json

#: options of a sweep, in the order in which they vary, the last one fastest: (key, its name in short)
SWEEPS = {
    "policies": ("policy", ""),
    "selection_layers": ("selection_layers", "layers"),
    "page_sizes": ("page_size", "page"),
    "recent_tokens": ("recent_tokens", "recent"),
    "sink_tokens": ("sink_tokens", "sinks"),
    "budgets": ("budget_tokens", "budget"),
}


@dataclass(frozen=True)
class Setting:
    """What one server runs."""

    name: str
    backend: str
    delta: Json = field(default_factory=dict)

    @property
    def is_delta(self) -> bool:
        """Whether the server has DELTA's counters."""
        return self.backend == DELTA

    @property
    def columns(self) -> Json:
        """The CSV's columns that distinguish settings."""
        settings = json.dumps(self.delta, sort_keys=True)
        return {"setting": self.name, "backend": self.backend, "settings": settings}


def label(delta: Mapping[str, Any]) -> str:
    """Settings in a few words: "quest layers=2-6-9 budget=512", or "DELTA budget=512" without a policy."""
    short = dict(SWEEPS.values())
    words = [str(delta.get("policy", DELTA))]
    for key, value in delta.items():
        if key != "policy":
            shown = "-".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"{short.get(key, key)}={shown}")
    return " ".join(words)


def parse_numbers(text: str) -> list[int]:
    """Read "512,1024"; raises ValueError."""
    return [int(word) for word in text.split(",")]


def parse_words(text: str) -> list[str]:
    """Read "delta,quest"."""
    return [word.strip() for word in text.split(",")]


def parse_layers(text: str) -> list[list[int] | str]:
    """Read "2,6,9;3,5;auto"; raises ValueError."""
    return ["auto" if part.strip() == "auto" else parse_numbers(part) for part in text.split(";")]


def read_settings(path: Path) -> list[Setting]:
    """A list of {"name": ..., "backend": ..., "delta": {...}}, the last two optional; raises ValueError.

    From what ``vllm-delta calibrate`` wrote, come the layers that it compared, with its other settings.
    """
    entries = json.loads(path.read_text())
    if isinstance(entries, dict) and "calibration" in entries:
        try:
            entries = _compared(entries)
        except KeyError as error:
            raise ValueError(f"{path} lacks what a calibration compared: it has no {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list of settings")
    settings = []
    for entry in entries:
        keys = entry.keys() if isinstance(entry, dict) else set()
        if "name" not in keys or not keys <= {"name", "backend", "delta"}:
            raise ValueError(f'{path}: a setting has "name", "backend" and "delta", not {json.dumps(entry)}')
        settings.append(Setting(**{"backend": DELTA, **entry}))
    return settings


def _compared(calibration: Json) -> list[Json]:
    names = ("full_layers", "selection_layers")
    return [
        {"name": name, "delta": calibration["delta"] | {key: found[key] for key in names}}
        for name, found in calibration["calibration"]["compared"].items()
    ]


def expand(args: argparse.Namespace, dense: str) -> list[Setting]:
    """The settings that `add_arguments`' options mean: dense ones, a file's, a sweep's; raises ValueError."""
    swept = {key: values for option, (key, _) in SWEEPS.items() if (values := getattr(args, option))}
    backends = [name.upper() for name in args.backends or ()]
    if args.url:
        if args.settings or swept or len(backends) > 1:
            raise ValueError("a server that runs already has one setting, which --url cannot change")
        return [Setting(args.name or "unnamed", (backends or ["unknown"])[0], args.delta)]
    listed = read_settings(args.settings) if args.settings else []
    if not backends:
        backends = ([DELTA] if swept or args.delta else []) if listed else [dense, DELTA]
    settings = [Setting(backend, backend) for backend in backends if backend != DELTA] + listed
    for values in product(*swept.values()) if DELTA in backends else ():
        changes = dict(zip(swept, values, strict=True))
        settings.append(Setting(label(changes), DELTA, args.delta | changes))
    names = [setting.name for setting in settings]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"every setting needs a name of its own; several have: {', '.join(sorted(twice))}")
    return settings
