"""The part that knows vLLM's internals. Whoever follows vLLM's next version should touch this folder alone.

- `names`, `plugin`, `platform`, `backend`: how vLLM finds DELTA; `settings`, `validation`: what a user asks
  for and what is refused; `compat`: the supported versions, and what to check when vLLM moves.
- `layers`, `worker_state`, `worker_methods`: a worker's layers and their plan, what they share, and what
  others may ask of them.
- `cpu/` and `cuda/`, with the same files: `backend` is what vLLM asks first, `builder` prepares a step's
  `metadata`, `layer` computes attention, `state` is the platform's part of what layers share, `worker` is
  vLLM's worker with DELTA in it.
- `aside`: what stands beside the kernels, such as rivals; `calibration`: a worker's part of a calibration.
"""
