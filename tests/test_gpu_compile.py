"""The Triton kernels compile for a Hopper GPU, on a machine without one: the interpreter checks no types."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

TYPES = {
    "torch.float8_e4m3fn": "*fp8e4nv",
    "torch.bfloat16": "*bf16",
    "torch.float16": "*fp16",
    "torch.float32": "*fp32",
    "torch.int16": "*i16",
    "torch.int32": "*i32",
    "torch.int64": "*i64",
}
OPTIONS = ("num_warps", "num_stages", "launch_pdl")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernels_compile() -> None:
    root = Path(__file__).resolve().parent
    path = os.pathsep.join([str(root), str(root.parent)])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path, "TRITON_CACHE_DIR": ""}
    environment.pop("TRITON_CACHE_DIR")
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "compiled 20 kernels" in result.stdout


def compile_all() -> None:
    """Run the launching code with launches replaced by compilation."""
    import torch
    import triton
    from gpu_cases import Batch, Case
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    from vllm_delta.gpu import ops

    compiled = 0

    def launch(kernel, *args, grid, warmup, **kwargs):
        nonlocal compiled
        names = kernel.arg_names
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        values = dict(zip(names, args, strict=False)) | kwargs
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        if "DISCARD" in constants:
            constants["DISCARD"] = True  # as on a GPU
        signature = {name: "constexpr" if name in constants else kind(values[name]) for name in names}
        source = ASTSource(kernel, signature, {(names.index(name),): constants[name] for name in constants})
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        compiled += 1

    def kind(value):
        if isinstance(value, torch.Tensor):
            return TYPES[str(value.dtype)]
        return "fp32" if isinstance(value, float) else "i32"

    plain = Case((200, 0), dtype=torch.bfloat16, head_size=128)
    hopper = mock.patch.object(ops, "_has_dependent_launch", lambda device: True)
    few = mock.patch.object(ops, "_multiprocessors", lambda device: 4)
    with hopper, mock.patch.object(JITFunction, "run", launch):
        for case in (
            plain,
            Case(
                (200,), dtype=torch.bfloat16, head_size=96, fp8=True, softcap=5.0, sinks=True, logit_tokens=0
            ),
        ):
            batch = Batch(case)
            batch.make_schedule()
            batch.run(full=True, append=not case.fp8)
            batch.run(append=not case.fp8)
            batch.table.pages.zero_()
            batch.run(sparse=True, append=not case.fp8)
        with few:  # which two rows fill without being cut
            batch = Batch(plain)
            batch.table.pages.zero_()
            batch.run(sparse=True, append=True)
    # Nine launches for three layers, one more to score from the keys; one for a layer of whole rows.
    print(f"compiled {compiled} kernels")


if __name__ == "__main__":
    compile_all()
