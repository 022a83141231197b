"""vLLM's CPU worker, which also tells DELTA where prompts end."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_delta.integration.layers import find_state
from vllm_delta.integration.worker_methods import DeltaWorkerMethods


class DeltaCPUWorker(DeltaWorkerMethods, CPUWorker):  # type: ignore[misc]
    """The worker that the platform chooses where DELTA is selected."""

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        """Build the KV cache and the metadata builders, then connect DELTA to the batch."""
        super().initialize_from_config(*args, **kwargs)
        state = find_state(self.vllm_config)
        if state is not None:
            state.prompt_lens = self._prompt_lens

    def _prompt_lens(self, num_requests: int) -> Tensor:
        prompt_lens: Tensor = self.model_runner.input_batch.num_prompt_tokens_cpu_tensor
        return prompt_lens[:num_requests]
