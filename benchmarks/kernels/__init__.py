"""Time of one attention layer, DELTA's kernels beside vLLM's."""
