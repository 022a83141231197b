"""Build a small language model with random weights, entirely from what is in this repository.

The tests need a model that vLLM serves like any other, with no model hub to fetch one
from. The architecture is real (llama, qwen2 or qwen3, any grouping of query heads), the weights
are drawn from a fixed seed and the tokenizer is a byte-level BPE trained on the repository's own
text. What it writes is gibberish; what its attention does is not trivial:

* the query and key projections are scaled so that attention scores have a chosen standard
  deviation (``score_std``), whatever the sizes: attention then favours a small part of a long
  context, as in a trained model, where a small uniform initialisation would average over all of it;
* embeddings are small beside what the layers add, and input and output embeddings are not tied, so
  that greedy decoding follows the context and does not repeat one token.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
STAMP = "demo_model.json"
FORMAT = 1  # raise it when the same parameters come to mean another model
ARCHITECTURES = ("llama", "qwen2", "qwen3")
TEXT_PATTERNS = ("LICENSE", "NOTICE", "README.md", "CONTRIBUTING.md", "docs/**/*.md")

BOS, EOS, PAD, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (PAD, BOS, EOS, END, *ROLES)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def repository_texts() -> Iterator[str]:
    """The repository's own texts, in an order that does not depend on the file system."""
    for pattern in TEXT_PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                yield path.read_text(encoding="utf-8", errors="replace")


def build_demo_model(
    path: Path,
    *,
    architecture: str = "llama",
    dtype: str = "float32",
    num_layers: int = 12,
    hidden_size: int = 192,
    intermediate_size: int | None = None,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    max_position_embeddings: int = 16384,
    num_merges: int = 1000,
    score_std: float = 2.5,
    sliding_window: int | None = None,
    seed: int = 0,
) -> Path:
    """Write the model to ``path`` unless it is there already, and return ``path``.

    A model built with other parameters, or from other text, is replaced. ``head_dim`` is
    independent of the other sizes, except that qwen2 fixes it to ``hidden_size / num_heads``.
    ``intermediate_size`` is three times the hidden size if not given. ``sliding_window`` makes
    every second layer a sliding-window layer, from the second on; of the three architectures vLLM
    can do that for llama only (and transformers for none of them).
    """
    names = inspect.signature(build_demo_model).parameters
    given = locals()
    parameters: dict[str, Any] = {name: given[name] for name in names if name != "path"}
    parameters["intermediate_size"] = intermediate_size or 3 * hidden_size
    _check(parameters)

    digest = hashlib.sha256("\0".join(repository_texts()).encode()).hexdigest()
    stamp = {"format": FORMAT, "text": digest, **parameters}
    path = Path(path)
    if _read_stamp(path) == stamp:
        return path

    path.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and moved there whole: what is at ``path`` is always complete.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as work:
        folder = Path(work) / "model"
        tokenizer = _train_tokenizer(num_merges, max_position_embeddings)
        tokenizer.save_pretrained(folder)
        _build_weights(folder, tokenizer, parameters)
        (folder / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
        if path.exists():
            path.rename(Path(work) / "replaced")
        folder.rename(path)
    return path


def _check(parameters: dict[str, Any]) -> None:
    architecture, heads = parameters["architecture"], parameters["num_heads"]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {ARCHITECTURES}, not {architecture!r}")
    if heads % parameters["num_kv_heads"]:
        raise ValueError("num_heads must be a multiple of num_kv_heads")
    if parameters["head_dim"] % 2:
        raise ValueError("head_dim must be even (rotary embeddings turn pairs)")
    if architecture == "qwen2" and parameters["head_dim"] * heads != parameters["hidden_size"]:
        raise ValueError("qwen2 has head_dim = hidden_size / num_heads")
    if architecture != "llama" and parameters["sliding_window"] is not None:
        raise ValueError(f"{architecture} cannot have some sliding-window layers in vLLM")


def _read_stamp(path: Path) -> Any:
    try:
        return json.loads((path / STAMP).read_text())
    except (OSError, ValueError):
        return None


def _train_tokenizer(num_merges: int, max_length: int) -> PreTrainedTokenizerFast:
    # The imports that take seconds wait until there is something to build.
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # All 256 bytes are in the alphabet, so there is no text it cannot encode.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL_TOKENS) + len(alphabet) + num_merges,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(repository_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[END, *ROLES],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _build_weights(folder: Path, tokenizer: PreTrainedTokenizerFast, parameters: dict[str, Any]) -> None:
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationConfig,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    num_layers = parameters["num_layers"]
    special = {
        "bos_token_id": tokenizer.convert_tokens_to_ids(BOS),
        "eos_token_id": tokenizer.convert_tokens_to_ids([EOS, END]),
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
    }
    extra: dict[str, Any] = {}
    if parameters["architecture"] != "qwen2":
        extra["head_dim"] = parameters["head_dim"]
    if parameters["sliding_window"] is not None:
        kinds = ("full_attention", "sliding_attention")
        extra["sliding_window"] = parameters["sliding_window"]
        extra["layer_types"] = [kinds[layer % 2] for layer in range(num_layers)]
    config = AutoConfig.for_model(
        parameters["architecture"],
        vocab_size=len(tokenizer),
        hidden_size=parameters["hidden_size"],
        intermediate_size=parameters["intermediate_size"],
        num_hidden_layers=num_layers,
        num_attention_heads=parameters["num_heads"],
        num_key_value_heads=parameters["num_kv_heads"],
        max_position_embeddings=parameters["max_position_embeddings"],
        tie_word_embeddings=False,
        **special,
        **extra,
    )
    dtype: torch.dtype = getattr(torch, parameters["dtype"])
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(parameters["seed"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _initialise(name, parameter, generator, parameters["score_std"], num_layers)
        # Zero is never the highest of many random scores. So greedy text goes on until it is told
        # to stop, and consists of characters that a terminal shows.
        model.get_output_embeddings().weight[_unwritable_ids(tokenizer)] = 0.0
    model.generation_config = GenerationConfig(**special)  # type: ignore[no-untyped-call]
    model.to(dtype).save_pretrained(folder)


def _unwritable_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Special tokens, and tokens that are not plain visible text by themselves."""
    special = set(tokenizer.all_special_ids)
    texts = {token: str(tokenizer.decode([token])) for token in range(len(tokenizer))}
    return [
        token
        for token, text in texts.items()
        if token in special or not (text.isascii() and text.isprintable() and text.strip())
    ]


def _initialise(
    name: str,
    parameter: torch.Tensor,
    generator: torch.Generator,
    score_std: float,
    num_layers: int,
) -> None:
    """Draw one parameter so that activations keep about unit variance from layer to layer."""
    sharpness = score_std**0.5
    if "q_norm" in name or "k_norm" in name:
        parameter.fill_(sharpness)  # qwen3 normalises queries and keys: the scale is set here
    elif name.endswith("norm.weight"):
        parameter.fill_(1.0)
    elif name.endswith("bias"):  # the value bias is small, for the values average to little
        parameter.normal_(0.0, 0.02 if "v_proj" in name else 0.2, generator=generator)
    elif "embed_tokens" in name:
        parameter.normal_(0.0, 0.5, generator=generator)
    else:
        std = parameter.shape[1] ** -0.5
        if "q_proj" in name or "k_proj" in name:
            std *= sharpness
        elif "o_proj" in name:
            std *= 3.0 * num_layers**-0.5  # attention averages values: make up for it
        elif "down_proj" in name:
            std *= 2.0 * num_layers**-0.5
        parameter.normal_(0.0, std, generator=generator)
