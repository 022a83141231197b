"""DELTA for vLLM: decoding that reads the part of the KV cache that matters.

``vllm serve MODEL --attention-backend DELTA``; docs/ has the rest. This package imports neither torch nor
vLLM by itself: vLLM loads it in every process, whether DELTA is used or not.
"""

__version__ = "0.1.0"
