"""What vLLM asks a CUDA attention backend for."""

from __future__ import annotations

from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from vllm_delta.integration.cuda.builder import DeltaCUDAMetadataBuilder
from vllm_delta.integration.cuda.layer import DeltaCUDAImpl
from vllm_delta.integration.names import BACKEND_NAME
from vllm_delta.integration.settings import settings_of
from vllm_delta.kernels.limits import GPU


class DeltaCUDABackend(FlashAttentionBackend):  # type: ignore[misc]
    """FLASH_ATTN with DELTA's classes."""

    #: decode rows of DELTA's layers are written to the cache by the kernel that reads them
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        """The registered name."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[DeltaCUDAImpl]:
        """The class of a layer's attention."""
        return DeltaCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[DeltaCUDAMetadataBuilder]:
        """The class that prepares each step."""
        return DeltaCUDAMetadataBuilder

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """A KV block holds whole pages."""
        vllm_config = get_current_vllm_config_or_none()
        page_size = 1 if vllm_config is None else settings_of(vllm_config).page_size
        return int(super().get_preferred_block_size(max(default_block_size, page_size)))

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """What both FlashAttention and DELTA's kernels run."""
        return bool(super().supports_head_size(head_size)) and head_size <= GPU.largest_head_size

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoder attention only."""
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_non_causal(cls) -> bool:
        """DELTA selects from a causal past."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """DELTA selects from a causal past."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """Not supported."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """How rows are cut into splits depends on the batch."""
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """The kernels take one scale per tensor."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """A mixed step is split on the CPU."""
        return False
