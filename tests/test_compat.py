"""What DELTA relies on in vLLM: names, signatures, fields. When vLLM moves, this names what moved.

The list is made by hand but for the imports, which are read from the package. It says nothing about meaning:
see `vllm_delta.integration.compat` for what else to look at.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator

import pytest
from conftest import ROOT

from vllm_delta.method.config import DeltaConfigError

CPU_ATTN = "vllm.v1.attention.backends.cpu_attn"
FLASH_ATTN = "vllm.v1.attention.backends.flash_attn"
ATTENTION_FORWARD = "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
BUILDER = "self kv_cache_spec layer_names vllm_config device"
BUILD = "self common_prefix_len common_attn_metadata fast_build"

#: Functions that DELTA overrides or calls, and the names of all their parameters.
SIGNATURES: dict[str, str] = {
    # overridden
    f"{CPU_ATTN}.CPUAttentionMetadataBuilder.__init__": BUILDER,
    f"{CPU_ATTN}.CPUAttentionMetadataBuilder.build": BUILD,
    f"{CPU_ATTN}.CPUAttentionBackendImpl.forward": ATTENTION_FORWARD,
    f"{CPU_ATTN}.CPUAttentionBackend.get_supported_kernel_block_sizes": "kv_cache_spec",
    f"{FLASH_ATTN}.FlashAttentionMetadataBuilder.__init__": BUILDER,
    f"{FLASH_ATTN}.FlashAttentionMetadataBuilder.build": BUILD,
    f"{FLASH_ATTN}.FlashAttentionMetadataBuilder.get_cudagraph_support": "cls vllm_config kv_cache_spec",
    f"{FLASH_ATTN}.FlashAttentionImpl.forward": ATTENTION_FORWARD,
    f"{FLASH_ATTN}.FlashAttentionBackend.supports_head_size": "cls head_size",
    f"{FLASH_ATTN}.FlashAttentionBackend.get_preferred_block_size": "cls default_block_size",
    "vllm.v1.attention.backend.AttentionBackend.supports_attn_type": "cls attn_type",
    "vllm.platforms.cpu.CpuPlatform.check_and_update_config": "cls vllm_config",
    "vllm.platforms.cpu.CpuPlatform.update_block_size_for_backend": "cls vllm_config",
    "vllm.platforms.cpu.CpuPlatform.get_attn_backend_cls": (
        "cls selected_backend attn_selector_config num_heads"
    ),
    "vllm.platforms.cuda.CudaPlatformBase.check_and_update_config": "cls vllm_config",
    "vllm.v1.worker.gpu_worker.Worker.load_model": "self load_dummy_weights",
    "vllm.v1.worker.gpu_worker.Worker.initialize_from_config": "self kv_cache_config",
    "vllm.v1.worker.gpu_worker.Worker.compile_or_warm_up_model": "self",
    # called
    f"{FLASH_ATTN}.FlashAttentionImpl.do_kv_cache_update": "self layer key value kv_cache slot_mapping",
    "vllm.v1.attention.backends.registry.register_backend": "backend class_path is_mamba",
    "vllm.platforms.cpu_platform_plugin": "",
    "vllm.config.get_layers_from_vllm_config": "vllm_config layer_type layer_names",
    "vllm.forward_context.set_forward_context": (
        "attn_metadata vllm_config num_tokens num_tokens_across_dp cudagraph_runtime_mode batch_descriptor "
        "ubatch_slices slot_mapping skip_compiled is_padding"
    ),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.get_model": "self",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.get_model": "self",
    "vllm.model_executor.models.utils.extract_layer_index": "layer_name num_attn_module",
    "vllm.v1.kv_cache_interface.is_quantized_kv_cache": "kv_cache_dtype",
    "vllm.utils.import_utils.resolve_obj_by_qualname": "qualname",
    "vllm.config.model.ModelConfig.get_total_num_hidden_layers": "self",
}

#: Of these, vLLM's build for CPUs lacks the module.
ON_GPUS = ["vllm.platforms.cuda.CudaPlatformBase.check_and_update_config"]

#: Fields and attributes of objects that DELTA reads or replaces.
ATTRIBUTES: dict[str, str] = {
    "vllm.v1.attention.backend.CommonAttentionMetadata": (
        "query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound num_reqs num_actual_tokens "
        "max_query_len max_seq_len block_table_tensor slot_mapping is_prefilling req_idx"
    ),
    "vllm.v1.attention.backend.AttentionCGSupport": "UNIFORM_SINGLE_TOKEN_DECODE NEVER",
    "vllm.v1.attention.backend.AttentionType": "DECODER",
    "vllm.v1.attention.backend.AttentionBackend": (
        "forward_includes_kv_cache_update supports_non_causal supports_mm_prefix supports_rswa "
        "supports_batch_invariance supports_per_head_quant_scales supports_device_cpu_query_lens_mismatch"
    ),
    "vllm.v1.attention.backend.AttentionMetadataBuilder": "supports_update_block_table",
    f"{CPU_ATTN}.CPUAttentionMetadata": "num_actual_tokens block_table",
    f"{CPU_ATTN}.CPUAttentionMetadataBuilder": "isa block_size",
    f"{CPU_ATTN}.CPUAttentionBackendImpl": (
        "num_heads num_kv_heads head_size scale sinks sliding_window logits_soft_cap attn_type alibi_slopes "
        "kv_cache_dtype kv_sharing_target_layer_name"
    ),
    f"{FLASH_ATTN}.FlashAttentionMetadata": "slot_mapping block_table",
    f"{FLASH_ATTN}.FlashAttentionMetadataBuilder": "device block_size",
    f"{FLASH_ATTN}.FlashAttentionImpl": (
        "num_heads num_kv_heads head_size scale sinks sliding_window logits_soft_cap attn_type alibi_slopes "
        "kv_cache_dtype kv_sharing_target_layer_name"
    ),
    "vllm.model_executor.layers.attention.Attention": "layer_name impl",
    "vllm.model_executor.layers.attention.attention.set_default_quant_scales": "_q_scale _k_scale _v_scale",
    "vllm.config.parallel.ParallelConfig": (
        "pipeline_parallel_size prefill_context_parallel_size decode_context_parallel_size use_ubatching "
        "enable_dbo ubatch_size worker_cls tensor_parallel_size nnodes distributed_executor_backend "
        "placement_group assigned_physical_gpu_ids enable_expert_parallel disable_custom_all_reduce "
        "enable_elastic_ep data_parallel_size enable_eplb"
    ),
    "vllm.config.scheduler.SchedulerConfig": (
        "max_num_seqs max_num_batched_tokens scheduler_cls async_scheduling"
    ),
    "vllm.config.speculative.SpeculativeConfig": (
        "method model num_speculative_tokens draft_sample_method num_speculative_tokens_per_batch_size "
        "target_model_config target_parallel_config"
    ),
    "vllm.config.compilation.CompilationConfig": "static_forward_context max_cudagraph_capture_size",
    "vllm.config.cache.CacheConfig": (
        "block_size user_specified_block_size cache_dtype kv_cache_memory_bytes gpu_memory_utilization "
        "kv_sharing_fast_prefill kv_cache_dtype_skip_layers"
    ),
    "vllm.config.load.LoadConfig": (
        "load_format download_dir ignore_patterns safetensors_load_strategy model_loader_extra_config"
    ),
    "vllm.config.offload.OffloadConfig": "uva prefetch",
    "vllm.config.offload.UVAOffloadConfig": "cpu_offload_gb",
    "vllm.config.offload.PrefetchOffloadConfig": (
        "offload_group_size offload_num_in_group offload_prefetch_step"
    ),
    "vllm.config.attention.AttentionConfig": "backend backend_per_kind use_non_causal",
    "vllm.config.model.ModelConfig": (
        "model dtype max_model_len hf_text_config architectures use_mla is_encoder_decoder runner_type "
        "is_hybrid has_noops is_attention_free is_mm_prefix_lm rswa_window original_max_model_len hf_config "
        "hf_config_path hf_overrides hf_token model_weights model_impl model_class_overrides config_format "
        "tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init revision code_revision "
        "trust_remote_code quantization quantization_config allow_deprecated_quantization "
        "disable_sliding_window multimodal_config uses_mrope "
        "mrope_num_dims is_multimodal_model enable_prompt_embeds"
    ),
    "vllm.v1.worker.gpu_worker.Worker": "vllm_config model_runner use_v2_model_runner device",
    # where the model runners keep the lengths of prompts
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": "input_batch",
    "vllm.v1.worker.gpu_input_batch.InputBatch": "num_prompt_tokens_cpu_tensor",
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner": "req_states",
    "vllm.v1.worker.gpu.states.RequestState": "prompt_len",
}


def test_imports():
    """Whatever the package imports from vLLM is there."""
    missing = []
    for path in sorted((ROOT / "vllm_delta").rglob("*.py")):
        for module, name in imported_from_vllm(ast.parse(path.read_text())):
            try:
                found(f"{module}.{name}" if name else module)
            except AttributeError:
                missing.append(f"{path.relative_to(ROOT)}: {module}.{name}")
    assert not missing, "vLLM has them no more"


def imported_from_vllm(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "vllm")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.gpu) if name in ON_GPUS else name for name in SIGNATURES]
)
def test_signatures(name):
    function = inspect.unwrap(found(name))
    parameters = list(inspect.signature(getattr(function, "__func__", function)).parameters)
    assert parameters == SIGNATURES[name].split(), f"{name} has moved"


@pytest.mark.parametrize("signatures", ["PROPOSER_SIGNATURES", "SAMPLER_SIGNATURES", "CUDA_SIGNATURES"])
def test_signatures_for_lossless_speculation(signatures):
    from vllm_delta.integration import drafting_api

    assert drafting_api.moved(getattr(drafting_api, signatures)) == []


def test_lossless_speculation_is_refused_by_name_where_something_moved():
    from vllm_delta.integration.drafting_api import check_drafting_api, moved

    known = "vllm.v1.sample.ops.topk_topp_sampler.apply_top_k_top_p"
    signatures = {known: "logits k p", "vllm.v1.worker.nowhere.Some.method": "self", f"{known}.more": ""}
    assert moved(signatures) == list(signatures)[1:]
    assert moved({known: "logits k p q"}) == [known]
    assert moved({"inspect.getsource": "object", "inspect.getmembers": "object"}) == []
    assert moved({"inspect.getattr_static": "obj"}) == ["inspect.getattr_static"]
    with pytest.raises(DeltaConfigError, match=r"vllm.v1.worker.nowhere.Some.method, .* has moved; DELTA "):
        check_drafting_api(signatures)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes(name):
    missing = set(ATTRIBUTES[name].split()) - attributes(found(name))
    assert not missing, f"{name} has moved"


def found(name: str):
    """The object of a dotted name.

    Raises:
        AttributeError: there is none.
    """
    module, attributes = name, []
    while True:
        try:
            value = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            module, _, attribute = module.rpartition(".")
            if not module:
                raise AttributeError(f"no module of {name}") from error
            attributes.insert(0, attribute)
    for attribute in attributes:
        value = getattr(value, attribute)
    return value


def attributes(of: object) -> set[str]:
    """What a class has, declares or assigns to an object, or its bases; what a function assigns."""
    names = set(dir(of))
    for part in inspect.getmro(of) if isinstance(of, type) else [of]:
        names |= set(getattr(part, "__annotations__", {}))
        if part.__module__.split(".")[0] == "vllm":
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(part)))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names.add(node.attr)
                elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "register_buffer":
                    names.add(ast.literal_eval(node.args[0]))
    return names
