"""The Triton kernels compile for a Hopper GPU, on a machine without one: the interpreter checks no types."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
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

#: Launches of a step of three layers, as `compile_all` makes them: how often each kernel is compiled.
EXPECTED = {
    "schedule_kernel": 6,
    "attention_kernel": 10,
    "multi_token_kernel": 6,
    "combine_kernel": 15,
    "score_logits_kernel": 6,
    "score_keys_kernel": 2,
    "select_kernel": 6,
}


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernels_compile() -> None:
    root = Path(__file__).resolve().parent
    path = os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    environment.pop("TRITON_CACHE_DIR", None)
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    compiled = Counter(line.split()[1] for line in result.stdout.splitlines() if line.startswith("compiled"))
    assert compiled == EXPECTED


def compile_all() -> None:
    """Run the launching code with launches replaced by compilation."""
    import torch
    import triton
    from contract import Batch, Case
    from gpu_batch import GPUBatch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    from vllm_delta.kernels.gpu import device, ops, schedule, scores, workspace
    from vllm_delta.kernels.gpu.tuning import Tuning, shared_bytes

    def launch(kernel, *args, grid, warmup, **kwargs):
        names = kernel.arg_names
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        values = dict(zip(names, args, strict=False)) | kwargs
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        constants |= {name: None for name in names if values[name] is None}
        if "DISCARD" in constants:
            constants["DISCARD"] = True  # as on a GPU
        signature = {name: "constexpr" if name in constants else kind(values[name]) for name in names}
        source = ASTSource(
            kernel,
            signature,
            {(names.index(name),): constants[name] for name in constants},
            {place: [["tt.divisibility", 16]] for name in names for place in aligned(name, names, values)},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print("compiled", kernel.__name__, flush=True)
        if kernel.__name__ in ("attention_kernel", "multi_token_kernel"):
            shape, kind_of = constants["SHAPE"], constants["KIND"]
            key_bytes = shape.D_PAD * kind_of.COMPUTE.primitive_bitwidth // 8
            tuning = Tuning(constants["TILE"], options["num_warps"], options["num_stages"], 1)
            queries = shape.BAND_QUERIES if shape.TOKENS > 1 else 0
            assert compiled.metadata.shared <= shared_bytes(tuning, key_bytes, queries)

    def aligned(name, names, values):
        value, place = values[name], names.index(name)
        if isinstance(value, torch.Tensor):
            return [(place,)]
        if isinstance(value, tuple) and isinstance(value[0], torch.Tensor):
            return [(place, index) for index in range(len(value))]
        return []

    def kind(value):
        if isinstance(value, tuple):
            kinds = tuple(map(kind, value))
            return type(value)(*kinds) if hasattr(value, "_fields") else kinds
        if isinstance(value, torch.Tensor):
            return TYPES[str(value.dtype)]
        return "fp32" if isinstance(value, float) else "i32"

    plain = Case((200, 0), dtype=torch.bfloat16, head_size=128)
    several = {"query_lens": (8,), "recent_pages": 2, "head_size": 128, "dtype": torch.bfloat16}
    bands = {"query_lens": (16,), "following_pages": 2, "fp8": True, "softcap": 5.0, "logit_tokens": 0}
    fp8 = Case((200,), dtype=torch.bfloat16, head_size=96, fp8=True, softcap=5.0, sinks=True, logit_tokens=0)

    def have(multiprocessors):
        for module in (ops, schedule, scores, workspace):
            stack.enter_context(mock.patch.object(module, "multiprocessors", lambda device: multiprocessors))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(device, "has_dependent_launch", lambda device: True))
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        have(8)
        for case in (plain, fp8, Case((200,), dtype=torch.bfloat16, recent_pages=0)):
            batch = GPUBatch(Batch.random(case))
            batch.make_schedule()
            for layer in ("full", "selection", "sparse"):
                batch.run(layer, append=not case.fp8)
        have(4)  # which two rows fill without being cut
        batch = GPUBatch(Batch.random(plain))
        batch.run("sparse", append=True)
        have(132)
        stack.enter_context(mock.patch.object(schedule, "shared_memory", lambda device: 232448))
        for case in (
            Case((200,), 28, 4, **several),
            Case((200,), 32, 8, **several),
            Case((200,), 64, 8, **several | bands),
        ):
            batch = GPUBatch(Batch.random(case))
            batch.make_schedule()
            for layer in ("selection", "sparse"):
                batch.run(layer)


if __name__ == "__main__":
    compile_all()
