"""Names that vLLM knows us by, and those of vLLM's classes that ours stand in for."""

from __future__ import annotations

#: What users select with ``--attention-backend``.
BACKEND_NAME = "DELTA"

#: What vLLM's registry loads for it.
BACKEND_PATH = "vllm_delta.integration.backend.DeltaBackend"

#: The backend and the platform where vLLM runs on a CPU.
CPU_BACKEND_PATH = "vllm_delta.integration.cpu.backend.DeltaCPUBackend"
CPU_PLATFORM_PATH = "vllm_delta.integration.platform.DeltaCpuPlatform"

#: vLLM's workers, and DELTA's in their place.
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_delta.integration.cpu.worker.DeltaCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_delta.integration.cuda.worker.DeltaCUDAWorker",
}

#: The group of entry points that vLLM's platform plugins stand in.
PLATFORM_PLUGINS = "vllm.platform_plugins"
