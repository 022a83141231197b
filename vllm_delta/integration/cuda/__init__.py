"""DELTA on CUDA GPUs, built on the classes of vLLM's FLASH_ATTN.

Prefill tokens, full layers and layers that DELTA does not make sparse go to FlashAttention as they are.
Decode rows of selection and sparse layers go to DELTA's kernels, and those of full layers where they are few,
which the kernels take less time for. Launches depend on the number of rows alone: uniform steps, in which
each request has one token, or one and its drafts, replay full CUDA graphs; mixed steps run between piecewise
graphs.

What a step's layers need of the host is prepared in `DeltaCUDAMetadataBuilder.build`, which vLLM calls before
every step, also before it replays a graph; nothing there waits for the GPU. What the GPU can work out itself,
the first layer launches, so that a graph has it.
"""
