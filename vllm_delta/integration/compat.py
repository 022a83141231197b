"""The vLLM versions that DELTA supports, and what to check when vLLM moves.

When vLLM moves, run ``pytest tests/test_compat.py tests/test_options.py`` with the new version first: they
compare names, signatures and options that we rely on with what is installed, and say what moved. Beside
these, check:

Everywhere
- ``v1/attention/backends/registry.py``: members of `AttentionBackendEnum` still pickle by value
  (`plugin.register_backend` cures that).
- ``v1/attention/backend.py``: the meaning of the fields of `CommonAttentionMetadata` that the builders read
  and replace.
- new options that change what attention means, or when layers run: `validation.py` refuses those that DELTA
  does not support; ``tests/test_options.py`` fails for one that nobody has looked at.
- ``forward_context.py``: that a model can run without metadata, uncompiled, before graphs are captured, and
  that its layers then call `forward` with their queries, keys and values (`probe_at_start.py`).
- ``engine/arg_utils.py``: new arguments that change what a model computes, or that it needs to start:
  `auto_calibration.py` hands such arguments to a calibration's engine.

On the CPU
- ``v1/attention/backends/cpu_attn.py``: a new name in `_get_attn_isa` means a cache layout that the kernels
  do not know.
- ``platforms/cpu.py``: the order in which `check_and_update_config` and `update_block_size_for_backend` run.

On a GPU
- ``v1/attention/backends/flash_attn.py``: what `FlashAttentionMetadataBuilder.build` schedules ahead unless
  `fast_build` is set, and that the KV cache holds a token's value behind its key.
- ``v1/worker/gpu/model_runner.py`` and ``v1/worker/gpu_model_runner.py``: that the profiling run calls layers
  without metadata, before the KV cache is sized; that `build` runs before every step, also one that replays
  a graph; that padded rows have length 0.
- ``config/compilation.py``: what becomes of graphs under `UNIFORM_SINGLE_TOKEN_DECODE`.
- torch and Triton that come with it: run the GPU suite, and `benchmarks/kernels.py` before and after.

Then run the whole test suite, add the version below, and say so in the changelog. This file imports nothing
but Python's own: the set-up reads it before anything is installed.
"""

from __future__ import annotations

import re

#: The versions of vLLM that DELTA is tested with; it supports other patches of the same minor versions. The
#: set-up, the documentation and the warning at a server's start follow this line.
TESTED_VLLM = ("0.32.0", "0.33.0")

SUPPORTED_VLLM = tuple(version.rpartition(".")[0] for version in TESTED_VLLM)


def unsupported_version(version: str) -> str | None:
    """A sentence for the log if this version of vLLM is not supported, else None."""
    match = re.match(r"(\d+\.\d+)", version)
    if match and match.group(1) in SUPPORTED_VLLM:
        return None
    return (
        f"vllm-delta is made for vLLM {' and '.join(SUPPORTED_VLLM)}, and this is vLLM {version}: "
        "it may fail, at start-up or later"
    )
