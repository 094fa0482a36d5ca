"""The user's DeepSpeed JSON, read and checked at its top level.

DeepSpeed ignores misspelt top-level keys, so they are refused here.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from qwen_ds.disk.read import read_json as read_object
from qwen_ds.errors import UserError

Json = dict[str, Any]

# Top-level keys that DeepSpeed 0.19 reads (deepspeed/runtime/config.py and the sections' own
# modules).
KNOWN_KEYS = frozenset(
    """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps
    managed_gradient_accumulation optimizer scheduler zero_optimization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer fp16 bf16 bfloat16 torch_autocast
    gradient_clipping prescale_gradients gradient_predivide_factor gradient_allreduce_op
    communication_data_type seq_parallel_communication_data_type sparse_gradients disable_allgather
    disable_python_gc steps_per_print wall_clock_breakdown memory_breakdown dump_state
    activation_checkpointing comms_logger tensorboard wandb csv_monitor comet flops_profiler
    autotuning elasticity hybrid_engine pipeline data_efficiency curriculum_learning checkpoint
    data_types aio dataloader_drop_last compile timers tensor_parallel expert_parallel
    compression_training sparse_attention nebula datastates weight_quantization eigenvalue
    progressive_layer_drop quantize_training use_data_before_expert_parallelism log_level""".split()
)

_SECTIONS = "optimizer scheduler zero_optimization fp16 bf16 bfloat16 data_types".split()


def read_deepspeed_json(path: str | None) -> Json:
    """Read a DeepSpeed JSON; None gives the built-in ZeRO-2. UserError: no such file, no JSON
    object, or a top-level key that DeepSpeed does not read."""
    if path is None:
        zero = {"stage": 2, "overlap_comm": True, "contiguous_gradients": True}
        return {"zero_optimization": zero | {"reduce_bucket_size": "auto"}}
    file = Path(path)
    if not file.exists():
        # So that ds_configs/zero2.json is found wherever the command is run from.
        file = Path(__file__).parents[2] / path
    if not file.is_file():
        example = "expected a DeepSpeed JSON such as ds_configs/zero2.json"
        raise UserError(f"deepspeed: no such file: {path}; {example}")
    config = read_object(file)
    for key, value in config.items():
        if key in _SECTIONS and not isinstance(value, dict):
            raise UserError(f"{path}: {key} is {value!r}; expected an object")
        if key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            advice = f"; the nearest is '{near[0]}'" if near else ""
            raise UserError(f"{path}: DeepSpeed has no top-level key '{key}'{advice}")
    return config
