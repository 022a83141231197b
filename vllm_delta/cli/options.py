"""Types of options that commands share."""

from __future__ import annotations

import json
from typing import Any


def json_object(text: str) -> dict[str, Any]:
    """An option's value; raises ValueError for other JSON than an object."""
    value: Any = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value
