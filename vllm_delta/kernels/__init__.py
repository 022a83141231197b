"""DELTA's kernels: tensors in, tensors out. They know no vLLM and no settings.

`types` is what both platforms' functions take, `limits` what each platform supports. `cpu` and `gpu` know
nothing of each other. Both meet the same specification, `vllm_delta.method.reference`, in the tests.
"""
