"""vLLM's CPU worker with DELTA in it."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_delta.integration.drafting_api import (
    PROPOSER_SIGNATURES,
    SAMPLER_SIGNATURES,
    check_drafting_api,
    moved,
)
from vllm_delta.integration.settings import settings_of
from vllm_delta.integration.worker_methods import DeltaWorkerMethods
from vllm_delta.method.config import DeltaConfigError


class DeltaCPUWorker(DeltaWorkerMethods, CPUWorker):  # type: ignore[misc]
    """The worker that is chosen where DELTA is selected."""

    def init_device(self) -> None:
        """As vLLM's; where drafts are made, DELTA's proposer takes the place of a draft model's."""
        lossless = settings_of(self.vllm_config).lossless
        if lossless and self.use_v2_model_runner:
            raise DeltaConfigError(
                "delta.lossless needs vLLM's model runner V1 on a CPU; leave out VLLM_USE_V2_MODEL_RUNNER"
            )
        super().init_device()
        runner, speculative = self.model_runner, self.vllm_config.speculative_config
        if speculative is None or self.use_v2_model_runner:
            return
        if lossless:
            check_drafting_api(SAMPLER_SIGNATURES | PROPOSER_SIGNATURES)
        elif moved(SAMPLER_SIGNATURES):
            return
        # Not above: what this needs of vLLM may have moved, and the worker does without.
        from vllm_delta.integration.cpu.drafter import DeltaProposer, DeltaRejectionSampler

        runner.rejection_sampler = DeltaRejectionSampler(runner.sampler, speculative, self.device)
        if lossless:
            runner.drafter = DeltaProposer(self.vllm_config, self.device, runner)
            # vLLM would draft zeros for all where one sequence nears its end; the proposer drafts nothing.
            runner.effective_drafter_max_model_len += 2 * speculative.num_speculative_tokens + 1
