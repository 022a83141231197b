"""DELTA on CPUs, built on the classes of vLLM's CPU_ATTN.

Prefill tokens, and layers that DELTA does not make sparse, go to CPU_ATTN as they are. Decode rows of the
other layers go to DELTA's kernels, by the layer's role.
"""
