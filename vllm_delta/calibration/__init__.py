"""Choosing the selection layers of a model by what its answers lose: ``vllm-delta calibrate``."""
