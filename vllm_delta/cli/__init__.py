"""The command ``vllm-delta``, with a file for each of its commands."""

from vllm_delta.cli.main import main

__all__ = ["main"]
