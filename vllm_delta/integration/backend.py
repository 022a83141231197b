"""The class that vLLM's registry names: DELTA on the platform that vLLM runs on."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from vllm_delta.integration.names import BACKEND_NAME

if current_platform.is_cpu():
    from vllm_delta.integration.cpu.backend import DeltaCPUBackend as DeltaBackend
elif current_platform.is_cuda():
    from vllm_delta.integration.cuda.backend import DeltaCUDABackend as DeltaBackend
else:
    from vllm.v1.attention.backend import AttentionBackend

    class DeltaBackend(AttentionBackend):  # type: ignore[misc,no-redef]
        """Stands in where DELTA has no kernels, and says so when it is selected."""

        @staticmethod
        def get_name() -> str:
            """The registered name."""
            return BACKEND_NAME

        @classmethod
        def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
            """Reasons why DELTA cannot be selected, which vLLM puts into its error."""
            return [f"DELTA has kernels for CPUs and CUDA GPUs, not for {current_platform.device_name}"]


__all__ = ["DeltaBackend"]
