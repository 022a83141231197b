"""vLLM's CPU worker with DELTA in it."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_delta.integration.worker_methods import DeltaWorkerMethods


class DeltaCPUWorker(DeltaWorkerMethods, CPUWorker):  # type: ignore[misc]
    """The worker that is chosen where DELTA is selected."""
