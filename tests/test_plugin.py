"""Registration: DELTA is found however it is asked for, and nothing changes for those who do not ask."""

import os
import pickle
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest
from conftest import ONE_THREAD, ROOT, in_fresh_process

from vllm_delta.integration import compat, plugin

DELTA_WORKER = "vllm_delta.integration.cpu.worker.DeltaCPUWorker"

NO_PLUGINS = {"VLLM_PLUGINS": ""}


def configure(model, **options):
    from vllm import EngineArgs

    return EngineArgs(str(model), max_model_len=1024, **options).create_engine_config()


def attention_path(config):
    """The attention backend that vLLM gives a decoder layer."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    with set_current_vllm_config(config):
        backend = get_attn_backend(head_size=32, dtype=torch.float32, kv_cache_dtype="auto")
    return f"{backend.__module__}.{backend.__qualname__}"


def selection(config):
    backend = config.attention_config.backend
    return {
        "backend": backend and backend.name,
        "worker": config.parallel_config.worker_cls,
        "attention": attention_path(config),
    }


DELTA_SELECTED = {
    "backend": "DELTA",
    "worker": DELTA_WORKER,
    "attention": "vllm_delta.integration.cpu.backend.DeltaCPUBackend",
}


def test_registering_twice_is_harmless():
    plugin.register()
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member, platform = AttentionBackendEnum["DELTA"], type(current_platform)
    plugin.register()
    assert AttentionBackendEnum["DELTA"] is member
    assert type(current_platform) is platform


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_member_survives_pickling_into_a_process_without_plugins(pickler):
    """A spawned engine unpickles its configuration before it loads plugins."""
    program = """
import pickle, sys
member = pickle.load(sys.stdin.buffer)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
assert member is AttentionBackendEnum["DELTA"], member
print(member.get_path())
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        input=pickler.dumps(plugin.restore_backend()),
        env={**os.environ, **NO_PLUGINS},
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.split()[-1] == b"vllm_delta.integration.backend.DeltaBackend"


def parse_command_lines(model, command_lines):
    """As `vllm serve` does it, without a server."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    results = []
    for arguments in command_lines:
        options = parser.parse_args(["--model", str(model), "--max-model-len", "1024", *arguments])
        results.append(selection(AsyncEngineArgs.from_cli_args(options).create_engine_config()))
    return results


def test_command_line_forms_mean_the_same(tiny_model):
    forms = [
        ["--attention-backend", "DELTA"],
        ["--attention-backend", "delta"],
        ["--attention-backend=Delta"],
        ["-ac.backend", "DELTA"],
        ["-ac", '{"backend": "DELTA"}'],
        ["--attention-config", '{"backend": "DELTA"}'],
    ]
    for form, selected in zip(forms, in_fresh_process(parse_command_lines, tiny_model, forms), strict=True):
        assert selected == DELTA_SELECTED, form


def answer_offline(model, options):
    from vllm import LLM, SamplingParams

    llm = LLM(str(model), dtype="float32", max_model_len=1024, enforce_eager=True, **options)
    llm.generate(["a prompt"], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    return llm.collective_rpc("delta_counters")[0]["layers"]["full"]["rows"]


def test_a_worker_of_the_users_stays(tiny_model, engine_config):
    """It may be built on DELTA's; without, vLLM's metadata says which rows are prompts'."""
    config = engine_config(tiny_model, worker_cls="vllm.v1.worker.worker_base.WorkerBase")
    assert config.parallel_config.worker_cls == "vllm.v1.worker.worker_base.WorkerBase"
    assert engine_config(tiny_model).parallel_config.worker_cls == DELTA_WORKER


def test_llm_takes_an_attention_config(tiny_model):
    """`LLM` turns this form into an object before it loads general plugins."""
    env = {**ONE_THREAD, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    options = {"attention_config": {"backend": "DELTA"}}
    assert in_fresh_process(answer_offline, tiny_model, options, **env) == 3 * 2  # steps, full layers


def test_settings_in_the_wrong_place_are_named(tiny_model, engine_config, monkeypatch):
    """They stand beside "delta", where they do nothing; what another plugin's may be is not."""
    from vllm_delta.integration import settings

    warnings = []
    monkeypatch.setattr(settings.logger, "warning", lambda text, *args: warnings.append(text % args))
    additional = {"budget_tokens": 512, "DELTA": {"sink_tokens": 0}, "of another plugin": 1}
    engine_config(tiny_model, additional_config=additional)
    assert "DELTA: budget_tokens, DELTA in --additional-config stands outside" in warnings[0]
    warnings.clear()
    engine_config(tiny_model, additional_config={"delta": {"budget_tokens": 512}, "of another plugin": 1})
    assert not warnings


def test_a_draft_models_configuration_is_left_alone(tiny_model, engine_config):
    """vLLM runs the platform's check for it, too: it is not DELTA's, and takes no calibration."""
    from vllm.platforms import current_platform

    from vllm_delta.method.config import DeltaConfigError

    config = engine_config(tiny_model)
    config.model_config.runner_type = "draft"
    config.parallel_config.worker_cls = "auto"
    config.additional_config = {"delta": {"calibration": "no/such/file"}}
    current_platform.check_and_update_config(config)
    assert config.parallel_config.worker_cls != DELTA_WORKER
    config.model_config.runner_type = "generate"
    with pytest.raises(DeltaConfigError, match="no/such/file"):
        current_platform.check_and_update_config(config)


def describe(model):
    """What a user can notice of the platform, and what is loaded."""
    from vllm.platforms import current_platform
    from vllm.platforms.cpu import CpuPlatform

    config = configure(model)
    names = [name for name in dir(current_platform) if not name.startswith("__")]
    values = {name: getattr(current_platform, name) for name in names if not name.startswith("_abc")}
    maps = Path("/proc/self/maps").read_text().splitlines()
    return SimpleNamespace(
        platform_is_cpu=isinstance(current_platform, CpuPlatform),
        attributes={name: "callable" if callable(value) else repr(value) for name, value in values.items()},
        selection=selection(config),
        compile_hash=config.compute_hash(),
        modules=sorted(name for name in sys.modules if name.startswith("vllm_delta")),
        libraries=[line for line in maps if "vllm_delta" in line],
    )


def test_installing_changes_nothing_unless_selected(tiny_model):
    without = in_fresh_process(describe, tiny_model, **NO_PLUGINS)
    with_plugin = in_fresh_process(describe, tiny_model)
    # Else there is nothing to compare.
    assert "vllm_delta.integration.platform" not in without.modules
    assert "vllm_delta.integration.platform" in with_plugin.modules

    assert with_plugin.platform_is_cpu
    assert with_plugin.attributes == without.attributes
    assert with_plugin.selection == without.selection
    assert with_plugin.compile_hash == without.compile_hash
    assert "vllm_delta.integration.cpu.backend" not in with_plugin.modules
    assert not with_plugin.libraries


def describe_selection(model):
    from vllm.platforms import current_platform

    return selection(configure(model, attention_backend="DELTA")), [
        base.__name__ for base in type(current_platform).__mro__
    ]


def test_explicit_target_device(tiny_model):
    """vLLM then leaves platform plugins out."""
    selected, _ = in_fresh_process(describe_selection, tiny_model, VLLM_TARGET_DEVICE="cpu")
    assert selected == DELTA_SELECTED


def test_another_platform_plugin(tiny_model, tmp_path, monkeypatch):
    """vLLM accepts one active platform plugin only, so DELTA has to leave it the place and adapt it."""
    (tmp_path / "other_platform.py").write_text(
        "from vllm.platforms.cpu import CpuPlatform\nclass OtherPlatform(CpuPlatform): pass\n"
    )
    (tmp_path / "other_plugin.py").write_text("def platform(): return 'other_platform.OtherPlatform'\n")
    metadata = tmp_path / "other-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[vllm.platform_plugins]\nother = other_plugin:platform\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    selected, bases = in_fresh_process(describe_selection, tiny_model)
    assert selected == DELTA_SELECTED
    assert "OtherPlatform" in bases


@pytest.mark.parametrize("supported", ["0.32.0", "0.32.0+cpu", "0.33.1", "0.33.0rc1"])
def test_supported_versions(supported):
    assert compat.unsupported_version(supported) is None


@pytest.mark.parametrize("unsupported", ["0.26.0", "0.34.0", "0.320.0", "1.0", "dev"])
def test_unsupported_versions_are_named_with_the_supported_ones(unsupported):
    warning = compat.unsupported_version(unsupported)
    assert f"vLLM {unsupported}" in warning
    assert all(name in warning for name in compat.SUPPORTED_VLLM)


def test_the_tested_version_is_supported():
    assert compat.unsupported_version(version("vllm")) is None


def test_on_other_hardware_the_backend_says_why_it_cannot_be_selected(monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    path = ROOT / "vllm_delta" / "integration" / "backend.py"
    backend = runpy.run_path(str(path))["DeltaBackend"]
    (reason,) = backend.validate_configuration()
    assert backend.get_name() == "DELTA"
    assert "CPUs and CUDA GPUs, not for" in reason
