"""vLLM's GPU worker with DELTA in it."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_delta.integration.drafting_api import CUDA_SIGNATURES, check_drafting_api
from vllm_delta.integration.layers import find_state
from vllm_delta.integration.settings import settings_of
from vllm_delta.integration.worker_methods import DeltaWorkerMethods
from vllm_delta.method.config import DeltaConfigError


class DeltaCUDAWorker(DeltaWorkerMethods, Worker):  # type: ignore[misc]
    """The worker that is chosen where DELTA is selected."""

    def _make_model_runner(self) -> Any:
        """VLLM's model runner; one with DELTA's speculator where drafts are made."""
        if not settings_of(self.vllm_config).lossless:
            return super()._make_model_runner()
        if not self.use_v2_model_runner:
            raise DeltaConfigError(
                "delta.lossless needs vLLM's model runner V2 on a GPU, which VLLM_USE_V2_MODEL_RUNNER=0 or "
                "another option has turned off"
            )
        check_drafting_api(CUDA_SIGNATURES)
        from vllm_delta.integration.cuda.drafter import DeltaGPUModelRunner

        return DeltaGPUModelRunner(self.vllm_config, self.device)

    def compile_or_warm_up_model(self) -> Any:
        """Compile, warm up and capture; what DELTA did for that is not counted."""
        times = super().compile_or_warm_up_model()
        state = find_state(self.vllm_config)
        if state is not None:
            state.counters.reset()
        return times
