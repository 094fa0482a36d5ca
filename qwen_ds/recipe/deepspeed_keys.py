"""Every key that DeepSpeed 0.19 reads in its JSON: its type, and what becomes of it here.

Most keys are passed on to DeepSpeed or merged with the recipe. Those in IDLE do nothing in these
runs, so they are left out and said. Those in ONLY and OFF would break inside
`deepspeed.initialize`, or change what is trained, so they are refused unless they ask for nothing.
tests/recipe/test_deepspeed_keys.py compares this table with DeepSpeed's own classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Rule:
    """The values that a key may have, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]
    whole: bool = False
    """Whether 32.0 is to be taken as 32."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(least: int = 0, most: int = 2**63 - 1) -> Rule:
    """A whole number, also one that is written 2e8."""
    return Rule(
        f"a whole number from {least} to {most}",
        lambda value: _is_number(value) and value == int(value) and least <= value <= most,
        whole=True,
    )


def _number(least: float, most: float) -> Rule:
    holds = lambda value: _is_number(value) and least <= value <= most  # noqa: E731
    return Rule(f"a number from {least:g} to {most:g}", holds)


def _one_of(*allowed: str) -> Rule:
    return Rule(f"one of {', '.join(allowed)}", lambda value: value in allowed)


def _keys(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("text", lambda value: isinstance(value, str))
LIST = Rule("a list", lambda value: isinstance(value, list))
NUMBER = _number(0, 1e30)
COUNT = _whole(1)
SIZE = _whole()
ANY = Rule("any value", lambda _: True)
POSITIVE = Rule(
    "a number, 0 or more, or Infinity",
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value >= 0,
)
SIZE_OR_NONE = Rule("a whole number or false", lambda value: value is False or SIZE.holds(value))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
# Inner keys of what is never used here, and of what DeepSpeed has removed.
SWITCH = Rule("an object, true or false", lambda value: isinstance(value, dict | bool))
DTYPE = _one_of("fp32", "fp16", "bf16", "float32", "float16", "bfloat16")

Schema = Mapping[str, "Rule | Schema"]

_OFFLOAD: Schema = {
    "device": _one_of("cpu", "nvme", "none"),
    "nvme_path": TEXT,
    "buffer_count": SIZE,
    "pin_memory": FLAG,
}
_ZERO: Schema = {
    "stage": _whole(0, 3),
    **_keys(COUNT, "reduce_bucket_size"),
    **_keys(
        SIZE,
        """allgather_bucket_size sub_group_size zero_hpz_partition_size prefetch_bucket_size
        stage3_prefetch_bucket_size param_persistence_threshold stage3_param_persistence_threshold
        model_persistence_threshold stage3_model_persistence_threshold max_live_parameters
        stage3_max_live_parameters max_reuse_distance stage3_max_reuse_distance
        module_granularity_threshold stage3_module_granularity_threshold""",
    ),
    **_keys(
        FLAG,
        """contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions
        overlap_comm compute_grad_norm load_from_fp32_weights elastic_checkpoint cpu_offload_param
        cpu_offload_use_pin_memory cpu_offload gather_16bit_weights_on_model_save
        stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
        use_all_reduce_for_fetch_params stage3_use_all_reduce_for_fetch_params allgather_sequential
        stage3_allgather_sequential ignore_unused_parameters legacy_stage1 round_robin_gradients
        parameter_alignment zero_quantized_weights zero_quantized_nontrainable_weights
        zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint
        override_module_apply log_trace_cache_warnings enable_sanity_checks
        save_muon_momentum_buffer_in_memory mics_hierarchical_params_gather""",
    ),
    "offload_param": {**_OFFLOAD, **_keys(SIZE, "buffer_size max_in_cpu")},
    "offload_optimizer": {
        **_OFFLOAD,
        **_keys(FLAG, "pipeline_read pipeline_write fast_init super_offload"),
        **_keys(_number(0, 1), "ratio cpuadam_cores_perc"),
    },
    "leaf_module": _keys(LIST, "classes names name_suffixes"),
    "zenflow": OBJECT,
    "mics_shard_size": _whole(-1),
    "zeropp_loco_param": OBJECT,
}
_ADAM: Schema = {
    **_keys(NUMBER, "lr eps weight_decay"),
    "betas": LIST,
    **_keys(FLAG, "torch_adam adam_w_mode bias_correction amsgrad"),
}
_MONITOR: Schema = {"enabled": FLAG, "output_path": TEXT, "job_name": TEXT}
_BF16: Schema = _keys(
    FLAG,
    """enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads
    bf16_optimizer_states""",
)

SCHEMA: Schema = {
    **_keys(
        COUNT,
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"
        " sequence_parallel_size vocabulary_size",
    ),
    "steps_per_print": POSITIVE,
    **_keys(
        FLAG,
        """managed_gradient_accumulation zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
        prescale_gradients disable_allgather disable_python_gc wall_clock_breakdown
        memory_breakdown dump_state dataloader_drop_last use_data_before_expert_parallelism""",
    ),
    "gradient_clipping": _number(0, 1e9),
    "gradient_predivide_factor": _number(1e-9, 1e9),
    "gradient_allreduce_op": _one_of("mean", "sum"),
    **_keys(
        _one_of("fp32", "fp16", "bf16"),
        "communication_data_type seq_parallel_communication_data_type",
    ),
    "log_level": _one_of("debug", "info", "warning", "error", "critical"),
    "optimizer": {"type": TEXT, "params": _ADAM, "legacy_fusion": FLAG},
    # Which parameters a scheduler has depends on its type: see plan/deepspeed_json.py.
    "scheduler": {"type": TEXT, "params": OBJECT},
    "zero_optimization": _ZERO,
    "fp16": {
        **_keys(FLAG, "enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads"),
        "loss_scale": NUMBER,
        "initial_scale_power": _whole(0, 64),
        **_keys(COUNT, "loss_scale_window hysteresis min_loss_scale"),
    },
    "bf16": _BF16,
    "bfloat16": _BF16,
    "torch_autocast": {"enabled": FLAG, "dtype": TEXT, "lower_precision_safe_modules": LIST},
    "data_types": {
        **_keys(DTYPE, "grad_accum_dtype param_dtype buffer_dtype"),
        "keep_in_fp32_modules": LIST,
    },
    "tensorboard": _MONITOR,
    "csv_monitor": _MONITOR,
    "wandb": {"enabled": FLAG, **_keys(TEXT, "group team project")},
    "comet": {
        **_keys(FLAG, "enabled online"),
        "samples_log_interval": COUNT,
        **_keys(TEXT, "project workspace api_key experiment_name experiment_key mode"),
    },
    "timers": {"throughput": _keys(FLAG, "enabled synchronized")},
    "activation_checkpointing": {
        **_keys(
            FLAG,
            """partition_activations contiguous_memory_optimization cpu_checkpointing
            synchronize_checkpoint_boundary profile""",
        ),
        "number_checkpoints": SIZE_OR_NONE,
    },
    "comms_logger": {**_keys(FLAG, "enabled prof_all verbose debug"), "prof_ops": LIST},
    "flops_profiler": {
        **_keys(FLAG, "enabled detailed"),
        "recompute_fwd_factor": NUMBER,
        **_keys(_whole(-1), "profile_step module_depth top_modules"),
        "output_file": TEXT,
    },
    "checkpoint": {
        **_keys(FLAG, "load_universal use_node_local_storage checkpoint_serialization"),
        "tag_validation": TEXT,
        "parallel_write": {"pipeline_stage": FLAG},
        "writer": OBJECT,
    },
    "aio": {
        **_keys(COUNT, "block_size queue_depth thread_count intra_op_parallelism"),
        **_keys(FLAG, "single_submit overlap_events use_gds"),
    },
    "pipeline": {
        "stages": ANY,
        "partition": TEXT,
        "activation_checkpoint_interval": SIZE,
        **_keys(FLAG, "seed_layers pipe_partitioned grad_partitioned use_reentrant"),
    },
    "compile": {
        **_keys(
            FLAG,
            """deepcompile autoep_non_moe free_activation offload_activation
            offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory
            debug_log offload_parameters sync_before_reduce sync_after_reduce sync_before_allgather
            sync_after_allgather keep_int_input_tensors keep_all_input_tensors""",
        ),
        "free_activation_threshold": SIZE,
        "passes": LIST,
    },
    "tensor_parallel": {
        "autotp_size": SIZE,
        "dtype": TEXT,
        **_keys(
            FLAG,
            """tp_overlap_comm vocab_parallel_lm_head keep_module_on_host kernel_inject
            replace_with_kernel_inject""",
        ),
        **_keys(ANY, "partition_config injection_policy_tuple"),
        **_keys(TEXT, "preset_model vocab_parallel_ce_backend"),
        **_keys(OBJECT, "tensor_parallel tp"),
    },
    "hybrid_engine": {
        **_keys(FLAG, "enabled release_inference_cache pin_parameters enable_cuda_graph"),
        **_keys(COUNT, "max_out_tokens inference_tp_size tp_gather_partition_size"),
    },
    "data_efficiency": {
        "enabled": FLAG,
        "seed": SIZE,
        "data_sampling": OBJECT,
        "data_routing": OBJECT,
    },
    "autotuning": _keys(FLAG, "enabled fast overwrite")
    | _keys(
        ANY,
        """results_dir exps_dir start_profile_step end_profile_step metric metric_path tuner_type
        tuner_early_stopping tuner_num_trials arg_mappings max_train_batch_size
        min_train_batch_size max_train_micro_batch_size_per_gpu min_train_micro_batch_size_per_gpu
        num_tuning_micro_batch_sizes mp_size model_info model_info_path""",
    ),
    **_keys(OBJECT, "weight_quantization expert_parallel datastates datastates_ckpt"),
    # DeepSpeed 0.19 has removed these, and takes not even a disabled one.
    **_keys(
        SWITCH,
        """amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting
        nebula progressive_layer_drop quantize_training sparse_attention sparse_gradients""",
    ),
    # No version has read these, but LLaMA-Factory's and others' files carry them.
    **_keys(ANY, "comms_config monitor_config"),
}

_NO_CHECKPOINT = "checkpoints are this project's own"
_NO_PARALLEL = "each rank holds every layer"
# Keys that change nothing here: left out of what DeepSpeed gets, and said with the reason.
IDLE: Mapping[str, str] = {
    "steps_per_print": "log.every_steps",
    "activation_checkpointing": "model.activation_checkpointing",
    "comms_logger": "log.profile_steps",
    "flops_profiler": "log.profile_steps",
    "checkpoint": _NO_CHECKPOINT,
    "datastates": _NO_CHECKPOINT,
    "datastates_ckpt": _NO_CHECKPOINT,
    "zero_optimization.load_from_fp32_weights": _NO_CHECKPOINT,
    "zero_optimization.elastic_checkpoint": _NO_CHECKPOINT,
    "zero_optimization.pipeline_loading_checkpoint": _NO_CHECKPOINT,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
    "zero_optimization.cpu_offload_use_pin_memory": "offload_optimizer.pin_memory",
    "zero_force_ds_cpu_optimizer": "offloading on a GPU machine always takes DeepSpeed's Adam",
    "optimizer.legacy_fusion": "the optimizer is torch's AdamW",
    "aio": "nothing goes to NVMe",
    "pipeline": _NO_PARALLEL,
    "compile": "model.compile",
    "tensor_parallel": _NO_PARALLEL,
    "sequence_parallel_size": _NO_PARALLEL,
    "seq_parallel_communication_data_type": _NO_PARALLEL,
    "use_data_before_expert_parallelism": _NO_PARALLEL,
    "expert_parallel": _NO_PARALLEL,
    "dataloader_drop_last": "every row is drawn",
    "disable_allgather": "DeepSpeed no longer reads it",
    "vocabulary_size": "the model has its own",
    **{
        f"{section}.{key}": why
        for section in ("bf16", "bfloat16")
        for key, why in (
            ("immediate_grad_update", "gradients are accumulated in fp32"),
            ("check_grad_overflow", "a gradient that is not finite never reaches the weights"),
        )
    },
    "comms_config": "DeepSpeed has no such key",
    "monitor_config": "DeepSpeed has no such key",
}
# About saving only, which this project does by itself, and about what it never does: no word.
SILENT = frozenset(
    "zero_optimization." + key
    for key in """cpu_offload cpu_offload_param mics_shard_size mics_hierarchical_params_gather
    zeropp_loco_param zenflow stage3_gather_fp16_weights_on_model_save""".split()
)

_PARTS = "expected 0 or 1: every rank holds every layer"
_MASTERS = "expected false: masters, gradients and moments are fp32"
_SUM = "expected a loss that is a mean over all ranks, that is"
# Keys that may have these values alone, and the words for them.
ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "managed_gradient_accumulation": ((True,), "expected true: steps differ in micro-batches"),
    "gradient_allreduce_op": (("mean",), f"{_SUM} 'mean'"),
    "sequence_parallel_size": ((1,), "expected 1: there is no sequence parallelism here"),
    "tensor_parallel.autotp_size": ((0, 1), _PARTS),
    "compile.deepcompile": ((False,), "expected false, and --model.compile true instead"),
    "torch_autocast.enabled": ((False,), "expected false, and model.dtype instead"),
    "fp16.auto_cast": ((False,), "expected false: the model casts by itself"),
    "fp16.fp16_master_weights_and_grads": ((False,), _MASTERS),
    "optimizer.params.amsgrad": ((False,), "expected false: the optimizer is AdamW"),
    "data_types.grad_accum_dtype": (("fp32", "float32"), "expected fp32, as gradients are summed"),
    "data_types.param_dtype": ((), 'expected "auto", and model.dtype instead'),
    "data_types.buffer_dtype": ((), 'expected "auto": the model decides'),
    "data_types.keep_in_fp32_modules": (([],), 'expected "auto": the model decides'),
    "zero_optimization.compute_grad_norm": ((True,), "expected true: every step reports the norm"),
    "zero_optimization.legacy_stage1": ((False,), "expected false: DeepSpeed has removed it"),
    "zero_optimization.cpu_offload": (
        (False,), 'expected "offload_optimizer": {"device": "cpu"}, which took its place',
    ),
    "zero_optimization.cpu_offload_param": (
        (False,), 'expected "offload_param": {"device": "cpu"}, which took its place',
    ),
    "zero_optimization.mics_shard_size": ((-1,), "expected none: DeepSpeed has removed MiCS"),
    "zero_optimization.mics_hierarchical_params_gather": (
        (False,), "expected none: DeepSpeed has removed MiCS",
    ),
    "zero_optimization.zenflow": (({},), "expected none: it has an optimizer of its own"),
    "zero_optimization.zeropp_loco_param": (({},), "expected none: DeepSpeed has removed it"),
    "zero_optimization.offload_optimizer.super_offload": (
        (False,), "expected false: it has an optimizer of its own",
    ),
    **{
        f"{section}.{key}": ((False,), _MASTERS)
        for section in ("bf16", "bfloat16")
        for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states")
    },
}  # fmt: skip
_REMOVED = "DeepSpeed has removed it"
# Sections that must be switched off, why, and whether DeepSpeed takes one without "enabled" as on.
OFF: Mapping[str, tuple[str, bool]] = {
    "autotuning": ("it would end the run after a few steps; launch/plan.py plans", False),
    "hybrid_engine": ("there is no generation in training", False),
    "data_efficiency": ("every epoch draws every row, and every layer sees every token", False),
    "expert_parallel": ("the model has no experts", False),
    "weight_quantization": ("the base is trained as it is stored", True),
    **dict.fromkeys(
        """amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting
        nebula progressive_layer_drop quantize_training sparse_attention
        sparse_gradients""".split(),
        (_REMOVED, True),
    ),
}
