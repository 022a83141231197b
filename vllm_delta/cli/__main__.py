"""``python -m vllm_delta.cli``."""

from vllm_delta.cli.main import main

main()
