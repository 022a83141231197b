"""vLLM's GPU worker, which also tells DELTA where prompts end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu_worker import Worker

from vllm_delta.integration.worker_methods import DeltaWorkerMethods


class DeltaGPUWorker(DeltaWorkerMethods, Worker):  # type: ignore[misc]
    """The worker that is chosen where DELTA is selected."""

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        """Build the KV cache and the metadata builders, then connect DELTA to the batch."""
        super().initialize_from_config(*args, **kwargs)
        self._delta_state().prompt_lens = self._prompt_lens

    def compile_or_warm_up_model(self) -> Any:
        """Compile, warm up and capture; what DELTA did for that is not counted."""
        times = super().compile_or_warm_up_model()
        self._delta_state().counters.reset()
        return times

    def _prompt_lens(self, common: CommonAttentionMetadata) -> Tensor | None:
        runner = self.model_runner
        if not self.use_v2_model_runner:
            prompt_lens: Tensor = runner.input_batch.num_prompt_tokens_cpu_tensor
            return prompt_lens[: common.num_reqs]
        if common.req_idx is None:
            return None
        return torch.from_numpy(runner.req_states.prompt_len.np[common.req_idx])
