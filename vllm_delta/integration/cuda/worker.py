"""vLLM's GPU worker with DELTA in it."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_delta.integration.layers import find_state
from vllm_delta.integration.worker_methods import DeltaWorkerMethods


class DeltaCUDAWorker(DeltaWorkerMethods, Worker):  # type: ignore[misc]
    """The worker that is chosen where DELTA is selected."""

    def compile_or_warm_up_model(self) -> Any:
        """Compile, warm up and capture; what DELTA did for that is not counted."""
        times = super().compile_or_warm_up_model()
        state = find_state(self.vllm_config)
        if state is not None:
            state.counters.reset()
        return times
