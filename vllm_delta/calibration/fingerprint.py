"""What tells calibrations apart: a model's weights, and whatever else they were made with. Without vLLM.

Weights are not read as a whole: of each file its name, its size, its beginning with the names and places of
its tensors, and blocks all along it. Training changes all of a tensor, so that some of these change, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Files that weights are loaded from.
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.tensors")
#: Files that say what the weights mean, and which tokens a text has; read as a whole.
DESCRIPTION = ("config.json", "params.json", "*token*", "vocab*", "merges*", "tekken*", "spiece*", "*.py")

#: Of each file of weights so many blocks are read, all along it, of so many bytes.
BLOCKS, BLOCK_BYTES = 32, 1 << 14


def fingerprint(parts: Mapping[str, Any]) -> str:
    """A name for whatever JSON holds: the same for equal parts, in any order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def identity(name: str, revision: object = None) -> str:
    """What a model or a tokenizer is, wherever it lies.

    Args:
        name: of a folder or a file on this machine, or of a model on a hub.
        revision: of a model on a hub.

    Returns:
        A digest of a folder's or file's content, or the name with the revision.

    Raises:
        OSError: a file cannot be read.
    """
    path = Path(name)
    if path.is_file():
        return _sampled(path)
    if not path.is_dir():
        return f"{name}@{revision}"
    found = {}
    for file in filter(Path.is_file, path.iterdir()):
        if any(file.match(pattern) for pattern in WEIGHTS):
            found[file.name] = _sampled(file)
        elif any(file.match(pattern) for pattern in DESCRIPTION):
            found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return fingerprint(found)


def _sampled(path: Path) -> str:
    """A digest of a file's size and of blocks all along it, the first and the last one among them."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - BLOCK_BYTES)
    with path.open("rb") as file:
        for offset in sorted({last * block // (BLOCKS - 1) for block in range(BLOCKS)}):
            file.seek(offset)
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
