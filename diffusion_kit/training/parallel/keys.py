"""The keys of a DeepSpeed configuration (0.19). DeepSpeed itself takes no notice of one that it does not know."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

Keys = Mapping[str, Any]  # of each key: None for a value, the keys of a tree, or ... for a tree that is not looked into


def values(text: str) -> dict[str, None]:
    return dict.fromkeys(text.split())


LR_RANGE = values(
    "lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate lr_range_test_staircase last_batch_iteration"
)
ONE_CYCLE = values(
    "cycle_min_lr cycle_max_lr decay_lr_rate cycle_first_step_size cycle_second_step_size cycle_first_stair_count "
    "cycle_second_stair_count decay_step_size cycle_momentum cycle_min_mom cycle_max_mom decay_mom_rate "
    "last_batch_iteration"
)
WARMUP = values("warmup_min_lr warmup_max_lr warmup_num_steps warmup_type last_batch_iteration")
WARMUP_COSINE = values(
    "total_num_steps warmup_min_ratio warmup_num_steps cos_min_ratio warmup_type last_batch_iteration"
)
SCHEDULERS: dict[str, Keys] = {
    "LRRangeTest": LR_RANGE,
    "OneCycle": ONE_CYCLE,
    "WarmupLR": WARMUP,
    "WarmupDecayLR": WARMUP | values("total_num_steps"),
    "WarmupCosineLR": WARMUP_COSINE,
}

OFFLOAD_PARAM = values("device nvme_path buffer_count buffer_size max_in_cpu pin_memory")
OFFLOAD_OPTIMIZER = values(
    "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload "
    "cpuadam_cores_perc"
)
ZERO = values(
    "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions "
    "allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights elastic_checkpoint sub_group_size "
    "cpu_offload_param cpu_offload_use_pin_memory cpu_offload stage3_prefetch_bucket_size "
    "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
    "stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
    "stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
    "ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size "
    "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear "
    "pipeline_loading_checkpoint override_module_apply "
    "log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory"
) | {"offload_param": OFFLOAD_PARAM, "offload_optimizer": OFFLOAD_OPTIMIZER, "zenflow": ..., "leaf_module": ...}

PLAIN = values(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation "
    "gradient_clipping prescale_gradients gradient_predivide_factor gradient_allreduce_op sparse_gradients "
    "communication_data_type seq_parallel_communication_data_type disable_allgather disable_python_gc "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown memory_breakdown "
    "dump_state log_level vocabulary_size dataloader_drop_last use_data_before_expert_parallelism"
)
TREES: dict[str, Any] = {
    "optimizer": {"type": None, "params": ..., "legacy_fusion": None},
    "scheduler": {"type": None, "params": ...},
    "zero_optimization": ZERO,
    "fp16": values(
        "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
        "min_loss_scale fp16_master_weights_and_grads"
    ),
    "bf16": values(
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
    "torch_autocast": values("enabled dtype lower_precision_safe_modules"),
    "amp": ...,
    "aio": values("block_size queue_depth thread_count intra_op_parallelism single_submit overlap_events use_gds"),
    "data_types": values("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
    "checkpoint": values("tag_validation load_universal use_node_local_storage parallel_write writer"),
    "activation_checkpointing": values(
        "partition_activations cpu_checkpointing contiguous_memory_optimization number_checkpoints "
        "synchronize_checkpoint_boundary profile"
    ),
}
OTHERS = (
    "tensorboard wandb csv_monitor comet flops_profiler comms_logger autotuning compression_training data_efficiency "
    "curriculum_learning elasticity pipeline hybrid_engine compile timers tensor_parallel expert_parallel "
    "weight_quantization eigenvalue progressive_layer_drop sparse_attention monitor_config datastates_ckpt nebula "
    "sequence_parallel_size"
)
KEYS: dict[str, Any] = PLAIN | TREES | dict.fromkeys(OTHERS.split(), ...)


def check(tree: Mapping[str, Any], known: Keys = KEYS, place: str = "") -> None:
    """
    Raises:
        ValueError: a key that DeepSpeed would overlook, with the nearest that it knows; a tree that is no tree.
    """
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"deepspeed: no key {place}{key}; {hint}")
        inner = known[key]
        if inner is None or inner is ... or value is None:
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"deepspeed: {place}{key} is {value!r}: it must be a tree of keys")
        check(value, inner, f"{place}{key}.")
