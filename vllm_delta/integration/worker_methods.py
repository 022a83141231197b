"""What DELTA adds to a worker of vLLM's, the same on every platform."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_delta.integration import probe_at_start
from vllm_delta.integration.calibration import Calibration
from vllm_delta.integration.layers import exchange_layers, find_state, report_plan
from vllm_delta.integration.worker_state import WorkerState
from vllm_delta.method.counters import Counters


class DeltaWorkerMethods:
    """To be mixed into a worker of vLLM's."""

    vllm_config: VllmConfig
    model_runner: Any
    use_v2_model_runner: bool
    device: torch.device
    _calibration: Calibration | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then let other pipeline ranks know its layers."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        exchange_layers(self.vllm_config)

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        """Build the KV cache and the metadata builders, then let DELTA know where prompts end."""
        super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]
        state = find_state(self.vllm_config)
        if state is not None:
            state.prompt_lens = self._prompt_lens

    def compile_or_warm_up_model(self) -> Any:
        """Probe the model where its plan is a rule of thumb, report the plan, then warm up and capture."""
        state = find_state(self.vllm_config)
        if state is not None:
            if probe_at_start.is_wanted(self.vllm_config, state):
                model = self.model_runner.get_model()
                hits = probe_at_start.found(self.vllm_config, model, self.device)
                probe_at_start.adopt(self.vllm_config, state, hits)
            report_plan(state)
        return super().compile_or_warm_up_model()  # type: ignore[misc]

    def delta_counters(self) -> dict[str, Any]:
        """What DELTA did since start-up, see `vllm_delta.method.counters`; zeros where it has no layer."""
        state = find_state(self.vllm_config)
        return (Counters() if state is None else state.counters).as_dict()

    def delta_calibration(self, action: str, *args: Any, **kwargs: Any) -> Any:
        """One of the methods of `vllm_delta.integration.calibration.Calibration`, by name.

        Raises:
            RuntimeError: DELTA is not selected in this engine.
        """
        if self._calibration is None:
            model = self.model_runner.get_model()
            self._calibration = Calibration(self.vllm_config, model, self._state(), self.device)
        return self._calibration.call(action, *args, **kwargs)

    def _state(self) -> WorkerState[Any]:
        state = find_state(self.vllm_config)
        if state is None:
            raise RuntimeError("DELTA is not set up in this worker")
        return state

    def _prompt_lens(self, common: CommonAttentionMetadata) -> Tensor | None:
        """Tokens of each prompt of a batch, as vLLM's model runner knows them, V1 or V2."""
        runner = self.model_runner
        if not self.use_v2_model_runner:
            prompt_lens: Tensor = runner.input_batch.num_prompt_tokens_cpu_tensor
            return prompt_lens[: common.num_reqs]
        if common.req_idx is None:
            return None
        return torch.from_numpy(runner.req_states.prompt_len.np[common.req_idx])
