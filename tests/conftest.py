"""Shared by all tests."""

import os
import sys
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter, which has to be asked for before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Operations on tiny models are too small for two threads, which mostly wait for each other.
ONE_THREAD = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # each worker has one core

# Tokens of the demo models that are one ASCII character each. After a prompt that ends within a character,
# vLLM's detokenizer returns the prompt's text with the answer's.
PRINTABLE = (7, 101)


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need a CUDA device; those marked `triton` run on one where there is one."""
    for item in items:
        if torch.cuda.is_available() and item.get_closest_marker("triton"):
            item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A model of eight layers in float32, for whatever does not depend on the architecture."""
    from demo_model import build_demo_model

    return build_demo_model(
        tmp_path_factory.mktemp("models") / "tiny",
        num_layers=8,
        hidden_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        num_merges=300,
    )


@pytest.fixture
def engine_config(monkeypatch):
    """Builds vLLM's configuration, which also sets environment variables; they are put back."""
    environment = dict(os.environ)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def build(model, **options):
        from vllm import EngineArgs

        defaults = {"attention_backend": "DELTA", "dtype": "float32", "skip_tokenizer_init": True}
        return EngineArgs(str(model), **{**defaults, **options}).create_engine_config()

    yield build
    os.environ.clear()
    os.environ.update(environment)


def in_fresh_process(function, *args, **env):
    """What the function returns in a process of its own, with these environment variables from the start.

    vLLM decides on platform and plugins once per process.
    """
    with _process(env) as pool:
        return pool.submit(function, *args).result()


def in_engine_process(function, *args):
    """What the function returns in the process where engines are started, one after another.

    It lives as long as the tests' own, so that vLLM is imported once. Engines run in it, not in processes of
    theirs: whole servers are tested elsewhere. They are not started in the tests' process, which vLLM would
    change for all tests.
    """
    if not _engine_process:
        _engine_process.append(_process({**ONE_THREAD, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}))
    try:
        return _engine_process[0].submit(function, *args).result()
    except BrokenExecutor:
        _engine_process.clear()
        raise


_engine_process = []


def pytest_sessionfinish():
    """The engines' process ends with the tests."""
    while _engine_process:
        _engine_process.pop().shutdown()


def _process(env):
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **env}
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_set_environment, initargs=(environment,))


def _set_environment(environment):
    os.environ.update(environment)
