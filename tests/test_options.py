"""Every option of vLLM's that could change what attention means or when layers run: it works, or is refused.

DELTA relies on this: the layers of a worker run one after another, each on a whole step, and attention is
causal attention to the cache. Whoever adds a version of vLLM decides here about its new options.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
from conftest import in_engine_process
from demo_model import build_demo_model
from engines import start_engine

from vllm_delta.integration.validation import check_config
from vllm_delta.kernels.limits import GPU
from vllm_delta.method.config import DeltaConfig

SMALL = {"budget_tokens": 64, "recent_tokens": 32, "sink_tokens": 16}

#: Why an option changes neither.
DISTRIBUTED = "where processes run and how they find each other"
REPLICAS = "each data-parallel rank is an engine, with workers of its own"
EXPERTS = "layers other than attention"
QUEUE = "which requests wait, not what a step is"
COMPILER = "how the code between attention layers is compiled"
GRAPHS = "which steps replay graphs; the backend says of which kind, and sizes its buffers by the largest"
FUSIONS = "of operations other than attention, or offered only to backends that declare it; DELTA's does not"
OTHER_BACKENDS = "of other backends"
OTHER_MODELS = "of models that are refused, or of layers that are none of DELTA's"
MEMORY = "how large the cache is, and what is kept in it"
DERIVED = "set by vLLM, not by users"


@dataclasses.dataclass(frozen=True)
class Refused:
    """Refused before serving, with the option's name."""

    options: dict
    part: str


@dataclasses.dataclass(frozen=True)
class Works:
    """Shown to work by a test in tests/, or by the case of that name below."""

    test: str


UBATCHES = "two parts of a batch at a time"

PARALLEL = {
    "pipeline_parallel_size": Works("test_layers.py::test_pipeline_ranks_know_each_others_layers"),
    "tensor_parallel_size": Works("test_server.py::test_tensor_parallelism"),
    "prefill_context_parallel_size": Refused({"prefill_context_parallel_size": 2}, "accepted: 1"),
    "decode_context_parallel_size": Refused(
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 4}, "accepted: 1"
    ),
    "dcp_kv_cache_interleave_size": "without context parallelism, nothing",
    "cp_kv_cache_interleave_size": "without context parallelism, nothing",
    "_allow_auto_resolve_cp_interleave_size": "without context parallelism, nothing",
    "dcp_comm_backend": "without context parallelism, nothing",
    "dcp_q_replicate": "without context parallelism, nothing",
    "data_parallel_size": REPLICAS,
    "data_parallel_size_local": REPLICAS,
    "data_parallel_rank": REPLICAS,
    "data_parallel_rank_local": REPLICAS,
    "data_parallel_master_ip": REPLICAS,
    "data_parallel_rpc_port": REPLICAS,
    "dp_sync_interval": REPLICAS,
    "data_parallel_master_port": REPLICAS,
    "data_parallel_backend": REPLICAS,
    "data_parallel_external_lb": REPLICAS,
    "data_parallel_hybrid_lb": REPLICAS,
    "data_parallel_index": REPLICAS,
    "_data_parallel_master_port_list": REPLICAS,
    "disable_nccl_for_dp_synchronization": REPLICAS,
    "is_moe_model": EXPERTS,
    "enable_hc_sp": EXPERTS,
    "enable_expert_parallel": EXPERTS,
    "enable_ep_weight_filter": EXPERTS,
    "enable_eplb": EXPERTS,
    "eplb_config": EXPERTS,
    "expert_placement_strategy": EXPERTS,
    "all2all_backend": EXPERTS,
    "enable_elastic_ep": EXPERTS,
    "elastic_ep_max_dp_size": EXPERTS,
    "enable_batch_sharded_sampling": "sampling, after the layers",
    "max_parallel_loading_workers": DISTRIBUTED,
    "disable_custom_all_reduce": DISTRIBUTED,
    "enable_shm_tensor_arena": DISTRIBUTED,
    "enable_dbo": Refused({"enable_dbo": True}, UBATCHES),
    "ubatch_size": Refused({"ubatch_size": 2}, UBATCHES),
    "dbo_decode_token_threshold": "of --enable-dbo, which is refused",
    "dbo_prefill_token_threshold": "of --enable-dbo, which is refused",
    "ray_workers_use_nsight": DISTRIBUTED,
    "ray_runtime_env": DISTRIBUTED,
    "placement_group": DISTRIBUTED,
    "distributed_executor_backend": DISTRIBUTED,
    "worker_cls": Works("test_plugin.py::test_a_worker_of_the_users_stays"),
    "worker_extension_cls": "adds methods to the worker",
    "master_addr": DISTRIBUTED,
    "master_port": DISTRIBUTED,
    "node_rank": DISTRIBUTED,
    "nnodes": DISTRIBUTED,
    "numa_bind": DISTRIBUTED,
    "numa_bind_nodes": DISTRIBUTED,
    "numa_bind_cpus": DISTRIBUTED,
    "assigned_physical_gpu_ids": DISTRIBUTED,
    "distributed_timeout_seconds": DISTRIBUTED,
    "cpu_distributed_timeout_seconds": DISTRIBUTED,
    "world_size": DERIVED,
    "rank": DERIVED,
    "_coord_store_port": DERIVED,
    "_api_process_count": DISTRIBUTED,
    "_api_process_rank": DISTRIBUTED,
    "enable_fault_tolerance": "what happens after a failure",
    "fault_tolerance_config": "what happens after a failure",
}

SCHEDULER = {
    "runner_type": DERIVED,
    "max_num_batched_tokens": Works("test_exactness.py::test_same_answer_however_it_is_scheduled"),
    "max_num_scheduled_tokens": Works("few tokens a step"),
    "max_num_seqs": Works("test_gpu_engine.py::test_more_rows_than_a_launch_takes"),
    "max_num_active_seqs": Works("few sequences"),
    "long_prefill_token_threshold": Works("long prefills in parts"),
    "long_prefill_token_threshold_adaptive": Works("long prefills in parts"),
    "max_num_queued_reqs": QUEUE,
    "max_num_queued_tokens": QUEUE,
    "enable_chunked_prefill": Works("no chunks"),
    "is_multimodal_model": DERIVED,
    "max_num_encoder_input_tokens": DERIVED,
    "encoder_cache_size": DERIVED,
    "policy": Works("priorities"),
    "disable_chunked_mm_input": QUEUE,
    "scheduler_cls": "what a step holds; split_step takes any",
    "disable_hybrid_kv_cache_manager": Works(
        "test_options.py::test_one_cache_group_for_windows_and_full_attention"
    ),
    "scheduler_reserve_full_isl": Works("few sequences"),
    "watermark": QUEUE,
    "prefill_schedule_interval": QUEUE,
    "async_scheduling": Works("test_gpu_engine.py::test_budget_of_the_context_equals_dense"),
    "stream_interval": QUEUE,
}

COMPILATION = {
    "mode": Works("compiled"),
    "debug_dump_path": COMPILER,
    "cache_dir": COMPILER,
    "compile_cache_save_format": COMPILER,
    "backend": Works("compiled"),
    "custom_ops": COMPILER,
    "ir_enable_torch_wrap": COMPILER,
    "splitting_ops": Works("compiled in one piece"),
    "compile_mm_encoder": COMPILER,
    "cudagraph_mm_encoder": COMPILER,
    "encoder_cudagraph_token_budgets": COMPILER,
    "encoder_cudagraph_max_vision_items_per_batch": COMPILER,
    "encoder_cudagraph_max_frames_per_batch": COMPILER,
    "cudagraph_decoder_replay": OTHER_MODELS,
    "decoder_replay_cudagraph_capture_sizes": OTHER_MODELS,
    "decoder_replay_trim_threshold": OTHER_MODELS,
    "compile_sizes": COMPILER,
    "compile_ranges_endpoints": COMPILER,
    "inductor_compile_config": COMPILER,
    "inductor_passes": COMPILER,
    "cudagraph_mode": Works("test_gpu_engine.py::test_same_tokens_as_without_graphs"),
    "cudagraph_num_of_warmups": GRAPHS,
    "cudagraph_capture_sizes": GRAPHS,
    "cudagraph_copy_inputs": GRAPHS,
    "cudagraph_specialize_lora": GRAPHS,
    "use_inductor_graph_partition": COMPILER,
    "pass_config": "see PassConfig",
    "max_cudagraph_capture_size": GRAPHS,
    "dynamic_shapes_config": COMPILER,
    "local_cache_dir": DERIVED,
    "fast_moe_cold_start": EXPERTS,
    "enabled_custom_ops": DERIVED,
    "disabled_custom_ops": DERIVED,
    "traced_files": DERIVED,
    "compilation_time": DERIVED,
    "encoder_compilation_time": DERIVED,
    "static_forward_context": DERIVED,
    "static_all_moe_layers": DERIVED,
}

PASSES = {
    "fuse_norm_quant": FUSIONS,
    "fuse_act_quant": FUSIONS,
    "fuse_attn_quant": Works("test_cuda_glue.py::test_no_operation_is_fused_into_attention"),
    "eliminate_noops": FUSIONS,
    "fuse_allreduce_rms": FUSIONS,
    "enable_qk_norm_rope_fusion": FUSIONS,
    "fuse_rope_kvcache_cat_mla": FUSIONS,
    "fuse_act_padding": FUSIONS,
    "fuse_mla_dual_rms_norm": FUSIONS,
    "fuse_rope_kvcache": Works("test_cuda_glue.py::test_no_operation_is_fused_into_attention"),
    "fuse_qk_norm_rope_kvcache": Works("test_cuda_glue.py::test_no_operation_is_fused_into_attention"),
    "rope_kvcache_fusion_max_token_num": FUSIONS,
    "fi_allreduce_fusion_max_size_mb": FUSIONS,
}

ATTENTION = {
    "backend": Works("test_plugin.py::test_command_line_forms_mean_the_same"),
    "backend_per_kind": Works("test_server.py::test_delta_for_full_attention_layers_only"),
    "minimax_m3_msa_decode_backend": OTHER_BACKENDS,
    "flash_attn_version": "the version that prefill and full layers use",
    "flash_attn_max_num_splits_for_cuda_graph": "of the calls of FlashAttention's own",
    "tokenspeed_mla_min_split_kv": OTHER_BACKENDS,
    "tq_max_kv_splits_for_cuda_graph": OTHER_BACKENDS,
    "use_trtllm_attention": OTHER_BACKENDS,
    "disable_flashinfer_q_quantization": OTHER_BACKENDS,
    "mla_prefill_backend": OTHER_BACKENDS,
    "use_prefill_query_quantization": OTHER_BACKENDS,
    "trtllm_ragged_backend": OTHER_BACKENDS,
    "indexer_kv_dtype": OTHER_BACKENDS,
    "indexer_sparse_logits": OTHER_BACKENDS,
    "indexer_tp_shard_min_rows": OTHER_BACKENDS,
    "minimax_m3_indexer_cp": OTHER_BACKENDS,
    "hisparse_config": OTHER_BACKENDS,
    "use_non_causal": Refused(
        {"attention_backend": None, "attention_config": {"backend": "DELTA", "use_non_causal": True}},
        "accepted: false",
    ),
    "sparse_mla_force_mqa": OTHER_BACKENDS,
    "sparse_mla_prefill_workspace_factor": OTHER_BACKENDS,
    "flex_attn_block_m": OTHER_BACKENDS,
    "flex_attn_block_n": OTHER_BACKENDS,
    "flex_attn_q_block_size": OTHER_BACKENDS,
    "flex_attn_kv_block_size": OTHER_BACKENDS,
}

CACHE = {
    "block_size": Works("test_gpu_engine.py::test_same_tokens_as_without_graphs"),
    "user_specified_block_size": DERIVED,
    "kv_cache_layout": DERIVED,
    "prefix_match_unit": MEMORY,
    "gpu_memory_utilization": MEMORY,
    "cache_dtype": Refused({"kv_cache_dtype": "fp8"}, "accepted: auto"),
    "kv_cache_dtype_skip_layers": "each layer's own type is read",
    "is_attention_free": DERIVED,
    "num_gpu_blocks_override": Works("test_gpu_engine.py::test_first_decode_step_is_the_same"),
    "sliding_window": DERIVED,
    "enable_prefix_caching": Works("test_exactness.py::test_same_answer_however_it_is_scheduled"),
    "prefix_caching_hash_algo": MEMORY,
    "prefix_cache_retention_interval": MEMORY,
    "mamba_page_size_padded": OTHER_MODELS,
    "skip_page_size_padded": DERIVED,
    "mamba_block_size": OTHER_MODELS,
    "mamba_cache_dtype": OTHER_MODELS,
    "mamba_ssm_cache_dtype": OTHER_MODELS,
    "mamba_cache_mode": OTHER_MODELS,
    "enable_mamba_shared_prefix_checkpoint": OTHER_MODELS,
    "replayssm_buffer_len": OTHER_MODELS,
    "use_replayssm": OTHER_MODELS,
    "use_kda_recoverssm": DERIVED,
    "num_gpu_blocks": DERIVED,
    "num_cpu_blocks": DERIVED,
    "effective_attention_block_size": DERIVED,
    "kv_cache_size_tokens": DERIVED,
    "kv_cache_max_concurrency": DERIVED,
    "hash_block_size": DERIVED,
    "cache_hit_alignment_tokens": DERIVED,
    "simple_cpu_offload_num_blocks": DERIVED,
    "kv_sharing_fast_prefill": Refused({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    "swa_bounded_replay": OTHER_MODELS,
    "kv_cache_memory_bytes": MEMORY,
    "kv_offloading_size": MEMORY,
    "kv_offloading_backend": MEMORY,
    "_block_size_resolved": DERIVED,
}

TABLES = {
    "ParallelConfig": PARALLEL,
    "SchedulerConfig": SCHEDULER,
    "CompilationConfig": COMPILATION,
    "PassConfig": PASSES,
    "AttentionConfig": ATTENTION,
    "CacheConfig": CACHE,
}

#: Options that work, by what they do.
CASES = {
    "few tokens a step": {"max_num_scheduled_tokens": 64},
    "few sequences": {"max_num_active_seqs": 2, "scheduler_reserve_full_isl": False},
    "long prefills in parts": {
        "long_prefill_token_threshold": 50,
        "long_prefill_token_threshold_adaptive": True,
    },
    "no chunks": {"enable_chunked_prefill": False},
    "priorities": {"scheduling_policy": "priority"},
    "compiled": {"enforce_eager": False, "compilation_config": {"mode": 3, "backend": "eager"}},
    "compiled in one piece": {
        "enforce_eager": False,
        "compilation_config": {"mode": 3, "backend": "eager", "splitting_ops": []},
    },
}


def fields_of(name):
    import vllm.config

    return {field.name for field in dataclasses.fields(getattr(vllm.config, name))}


@pytest.mark.parametrize("name", TABLES)
def test_every_option_is_decided_about(name):
    new = fields_of(name) - set(TABLES[name])
    assert not new, (
        f"{name} has options that nobody has looked at: decide about them in {Path(__file__).name}"
    )


@pytest.mark.parametrize("name", TABLES)
def test_options_that_work_are_shown_to(name):
    missing = []
    for option, verdict in TABLES[name].items():
        if isinstance(verdict, Works) and verdict.test not in CASES:
            file, _, test = verdict.test.partition("::")
            tree = ast.parse((Path(__file__).parent / file).read_text())
            if test not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
                missing.append(f"{option}: {verdict.test}")
    assert not missing


REFUSED = {
    f"{table}.{option}": verdict
    for table, options in TABLES.items()
    for option, verdict in options.items()
    if isinstance(verdict, Refused)
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_are_refused(engine_config, tiny_model, name):
    """On CPUs vLLM itself leaves one of them out, so the check of GPUs is asked."""
    with pytest.raises(ValueError, match=REFUSED[name].part):
        config = engine_config(tiny_model, **REFUSED[name].options)
        if name == "ParallelConfig.enable_dbo":
            config.parallel_config.enable_dbo = True
        check_config(DeltaConfig(), config, GPU)


def answers(model, backend, delta, options):
    prompts = [[(7 * i * i + length) % 250 + 5 for i in range(length)] for length in (16, 97, 300, 150)]
    with start_engine(model, backend, delta, **options) as engine:
        return [answer.tokens for answer in engine.generate(prompts, 12)]


@pytest.fixture(scope="module")
def usual_answers(tiny_model):
    return in_engine_process(answers, tiny_model, "DELTA", SMALL, {})


@pytest.mark.parametrize("name", CASES)
def test_answers_are_the_same_with_options_that_work(tiny_model, usual_answers, name):
    assert in_engine_process(answers, tiny_model, "DELTA", SMALL, CASES[name]) == usual_answers


def test_one_cache_group_for_windows_and_full_attention(tmp_path):
    """Layers of two kinds then have one builder."""
    model = build_demo_model(tmp_path / "windows", num_layers=8, sliding_window=64)
    options = {"disable_hybrid_kv_cache_manager": True}
    expected = in_engine_process(answers, model, "CPU_ATTN", None, options)
    assert in_engine_process(answers, model, "DELTA", {}, options) == expected
    two_groups = in_engine_process(answers, model, "DELTA", SMALL, {})
    assert in_engine_process(answers, model, "DELTA", SMALL, options) == two_groups
