"""The vLLM versions that DELTA supports, and what to check when vLLM moves.

When vLLM moves, check in its source:

- ``v1/attention/backends/registry.py``: `register_backend` still adds members to `AttentionBackendEnum`,
  and these still pickle by value (`plugin.register_backend` cures that).
- ``v1/attention/backends/cpu_attn.py``: the signatures of `CPUAttentionBackendImpl.forward` and
  `CPUAttentionMetadataBuilder.build`, the fields of `CPUAttentionMetadata`, and `_get_attn_isa`: a new name
  there means a cache layout that the kernels do not know.
- ``v1/attention/backend.py``: the fields of `CommonAttentionMetadata` that `cpu.py` reads and replaces.
- ``platforms/cpu.py``: `get_attn_backend_cls`, `check_and_update_config`, `update_block_size_for_backend`,
  and the name of the worker class.
- ``v1/worker/gpu_model_runner.py``: `input_batch.num_prompt_tokens_cpu_tensor`, in the batch's order.
- new options that change what attention means: `validation.py` refuses those that DELTA does not serve.

Then run the whole test suite, add the version below, and say so in the changelog.
"""

from __future__ import annotations

import re

#: Minor versions of vLLM that DELTA is made for. 0.32 is tested; 0.33 by reading its source.
SUPPORTED_VLLM = ("0.32", "0.33")


def unsupported_version(version: str) -> str | None:
    """A sentence for the log if this version of vLLM is not supported, else None."""
    match = re.match(r"(\d+\.\d+)", version)
    if match and match.group(1) in SUPPORTED_VLLM:
        return None
    return (
        f"vllm-delta is made for vLLM {' and '.join(SUPPORTED_VLLM)}, and this is vLLM {version}: "
        "it may fail, at start-up or later"
    )
