"""What each platform's kernels support, without importing them: Triton is imported on GPUs only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one platform's kernels."""

    #: tokens of a page
    page_sizes: tuple[int, ...]
    #: what a head size is a multiple of, and at most
    head_size_multiple: int
    largest_head_size: int
    #: layouts of the KV cache, see `vllm_delta.method.attention.LAYOUTS`
    layouts: tuple[str, ...]
    #: vLLM's names of the types of a KV cache, beside "auto", the model's own
    cache_dtypes: tuple[str, ...]


CPU = Limits(
    page_sizes=(16, 32, 64, 128),
    head_size_multiple=16,
    largest_head_size=512,
    layouts=("vec", "vec16", "amx"),
    cache_dtypes=("bfloat16", "float16"),
)

GPU = Limits(
    page_sizes=(1, 8, 16, 32, 64, 128),
    head_size_multiple=8,
    largest_head_size=256,
    layouts=("plain",),
    cache_dtypes=("bfloat16", "float16", "fp8", "fp8_e4m3"),
)
