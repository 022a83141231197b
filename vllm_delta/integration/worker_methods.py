"""What ``collective_rpc`` may ask of a worker that runs DELTA, the same on every platform."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig

from vllm_delta.integration.calibration import Calibration
from vllm_delta.integration.layers import find_state


class DeltaWorkerMethods:
    """To be mixed into a worker of vLLM's."""

    vllm_config: VllmConfig
    model_runner: Any
    _calibration: Calibration | None = None

    def delta_counters(self) -> dict[str, Any]:
        """What DELTA did since start-up, see `vllm_delta.counters`."""
        counts: dict[str, Any] = self._delta_state().counters.as_dict()
        return counts

    def delta_calibration(self, action: str, *args: Any, **kwargs: Any) -> Any:
        """One of the methods of `vllm_delta.integration.calibration.Calibration`, by name."""
        if self._calibration is None:
            model = self.model_runner.get_model()
            self._calibration = Calibration(self.vllm_config, model, self._delta_state())
        return self._calibration.call(action, *args, **kwargs)

    def _delta_state(self) -> Any:
        state = find_state(self.vllm_config)
        if state is None:
            raise RuntimeError("DELTA is not set up in this worker")
        return state
