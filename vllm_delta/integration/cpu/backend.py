"""What vLLM asks a CPU attention backend for."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from vllm_delta.integration.cpu.builder import DeltaCPUMetadataBuilder
from vllm_delta.integration.cpu.layer import DeltaCPUImpl
from vllm_delta.integration.names import BACKEND_NAME


class DeltaCPUBackend(CPUAttentionBackend):  # type: ignore[misc]
    """CPU_ATTN with DELTA's classes."""

    @staticmethod
    def get_name() -> str:
        """The registered name."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[DeltaCPUImpl]:
        """The class of a layer's attention."""
        return DeltaCPUImpl

    @staticmethod
    def get_builder_cls() -> type[DeltaCPUMetadataBuilder]:
        """The class that prepares each step."""
        return DeltaCPUMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Also what CPU_ATTN runs in its "vec16" layout, see `platform.choose_block_size`."""
        return [MultipleOf(16)]

    @classmethod
    def supports_non_causal(cls) -> bool:
        """DELTA selects from a causal past."""
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoder attention only."""
        return bool(attn_type == AttentionType.DECODER)
