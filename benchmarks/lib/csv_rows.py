"""Rows to CSVs, and back."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")

_READ: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "int | None": lambda s: int(s) if s else None,
    "float | None": lambda s: float(s) if s else None,
}


def append_csv(path: Path, row: DataclassInstance) -> None:
    """Append `row`, after a header if the file is new; raises ValueError on a foreign header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_header(path, type(row))
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(row)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))


def check_header(path: Path, kind: type[DataclassInstance]) -> None:
    """Raise ValueError if `path` holds rows of other columns than those of `kind`."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open(newline="") as file:
        if next(csv.reader(file)) != [field.name for field in fields(kind)]:
            raise ValueError(f"{path} has other columns than this version writes; use another file")


def read_csv(path: Path, kind: type[Row]) -> list[Row]:
    """All rows of `path`, in order; raises ValueError on a foreign header."""
    check_header(path, kind)
    types = {field.name: str(field.type) for field in fields(kind)}
    with path.open(newline="") as file:
        return [
            kind(**{name: _READ[types[name]](text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]
