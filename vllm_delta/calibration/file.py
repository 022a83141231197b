"""The file that ``vllm-delta calibrate`` writes, and how a server finds and reads it. Without vLLM."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_delta.method.config import DeltaConfig, DeltaConfigError

#: its name in a model's folder
CALIBRATION_FILE = "delta_calibration.json"

#: What models differ in, as their configurations name it.
SHAPE = ("model_type", "hidden_size", "num_attention_heads", "vocab_size")

#: Bytes of a calibration, at most; a real one has a few thousand.
MOST_BYTES = 1 << 22


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that shall appear at `path` whole or not at all; of the same suffix.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    other = unfinished(path)
    try:
        yield other
        other.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        other.unlink(missing_ok=True)


def unfinished(path: Path) -> Path:
    """Where this process writes a file before it is whole."""
    return path.with_name(f".{os.getpid()}.{path.name}")


def write_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Write what ``--additional-config`` and ``"selection_layers": "auto"`` take; raises as `whole`."""
    with whole(path) as other:
        other.write_text(json.dumps(settings, indent=1) + "\n")


def shape_of(config: object) -> dict[str, Any]:
    """What tells models apart, of a configuration as transformers has it: type and sizes."""
    return {name: getattr(config, name) for name in SHAPE if getattr(config, name, None) is not None}


def with_calibrated_layers(
    settings: Mapping[str, Any],
    model: str,
    num_layers: int | None = None,
    shape: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings, in which a calibration's layers stand in place of ``"selection_layers": "auto"``.

    They come from the file (or from the file in the folder) that the setting `calibration` names, or else
    from `CALIBRATION_FILE` in the model's folder. Where the settings ask for another number of full layers
    than the file in the model's folder was made for, it is left alone.

    Args:
        settings: what stands under ``"delta"``.
        model: name or folder of the model, as vLLM has it.
        num_layers: of the model; None where it is not known.
        shape: of the model, as `shape_of` has it.

    Returns:
        The settings, as they are where no file counts; else with `calibration` as the file's path.

    Raises:
        DeltaConfigError: a file that is named and not there, contradicts `full_layers`, cannot be read, is
            not a calibration, or is one of a model with another number of layers or another shape.
    """
    config = DeltaConfig.from_additional_config({"delta": settings})
    if config.selection_layers != "auto" or config.policy != "delta":
        return dict(settings)
    named = config.calibration is not None
    path = Path(config.calibration if config.calibration is not None else model)
    try:
        if path.is_dir():
            path /= CALIBRATION_FILE
        if not path.is_file():
            if named:
                raise DeltaConfigError(f"delta.calibration: there is no file {path}")
            return dict(settings)
        layers = _read_layers(path, {"num_layers": num_layers, **(shape or {})})
    except OSError as error:
        raise DeltaConfigError(f"delta.calibration: {path}: {error.strerror}") from error
    if settings.get("full_layers", layers["full_layers"]) != layers["full_layers"]:
        if named:
            raise DeltaConfigError(
                f"delta.full_layers is {settings['full_layers']}, but {path} was made for "
                f"{layers['full_layers']}; leave one of them out"
            )
        return dict(settings)
    return {**settings, **layers, "calibration": str(path)}


def _read_layers(path: Path, shape: Mapping[str, Any]) -> dict[str, Any]:
    if path.stat().st_size > MOST_BYTES:
        raise DeltaConfigError(f"{path} is no calibration: it has more than {MOST_BYTES} bytes")
    try:
        content = json.loads(path.read_text())
        layers = {name: content["delta"][name] for name in ("full_layers", "selection_layers")}
        DeltaConfig.from_additional_config({"delta": layers})
        made_for = content.get("calibration", {})
        made_for = {name: made_for.get(name) for name in shape}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DeltaConfigError(
            f'{path} is no calibration: it needs full_layers and selection_layers under "delta" ({error!r})'
        ) from error
    for name, value in shape.items():
        if None not in (value, made_for[name]) and value != made_for[name]:
            raise DeltaConfigError(
                f"{path} was made for another model: its {name} is {made_for[name]}, this one's is {value}"
            )
    return layers
