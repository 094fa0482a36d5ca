"""The user's DeepSpeed JSON and the recipe, made one: every "auto" resolved, every contradiction named.

DeepSpeed itself knows no "auto" (it drops such keys) and ignores misspelt top-level keys, so both are settled here,
before it sees the file. Pure functions: no deepspeed import, no file but the JSON.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ds.errors import UserError
from qwen_ds.recipe.options import Recipe

Json = dict[str, Any]

DEFAULT_JSON: Json = {
    "zero_optimization": {
        "stage": 2, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": "auto",
    }
}  # fmt: skip

# Top-level keys that DeepSpeed 0.19 reads (deepspeed/runtime/config.py and the sections' own modules).
KNOWN_KEYS = frozenset(
    """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation
    optimizer scheduler zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer fp16 bf16 bfloat16
    torch_autocast gradient_clipping prescale_gradients gradient_predivide_factor gradient_allreduce_op
    communication_data_type seq_parallel_communication_data_type sparse_gradients disable_allgather disable_python_gc
    steps_per_print wall_clock_breakdown memory_breakdown dump_state activation_checkpointing comms_logger
    tensorboard wandb csv_monitor comet flops_profiler autotuning elasticity hybrid_engine pipeline data_efficiency
    curriculum_learning checkpoint data_types aio dataloader_drop_last compile timers tensor_parallel expert_parallel
    compression_training sparse_attention nebula datastates weight_quantization eigenvalue progressive_layer_drop
    quantize_training use_data_before_expert_parallelism log_level""".split()
)

_SECTIONS = frozenset(
    {"optimizer", "scheduler", "zero_optimization", "fp16", "bf16", "bfloat16", "data_types"}
)

# JSON scheduler -> our schedule. WarmupLR holds the rate after the warm-up.
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_SCHEDULE_PARAMS = frozenset(
    """warmup_min_lr warmup_max_lr warmup_num_steps warmup_type total_num_steps last_batch_iteration warmup_min_ratio
    cos_min_ratio""".split()
)
_OPTIMIZERS = ("adam", "adamw")


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """What `deepspeed.initialize` gets, and the recipe after the JSON filled what the user left unset."""

    engine_json: Json
    recipe: Recipe
    stage: int
    offload_optimizer: bool

    def stored_json(self) -> Json:
        """The JSON that resolves to this one again: the step's rows in place of the engine's own 1 / 1 / world."""
        engine_only = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        stored = {k: v for k, v in self.engine_json.items() if k not in engine_only}
        return stored | {"train_batch_size": self.recipe.batch.rows_per_step}


def read_json(path: str | None) -> Json:
    """Read a DeepSpeed JSON; None gives the built-in ZeRO-2.

    Raises:
        UserError: missing file, broken JSON, not an object, or a top-level key that DeepSpeed does not read.
    """
    if path is None:
        return copy.deepcopy(DEFAULT_JSON)
    file = Path(path)
    if not file.is_absolute() and not file.exists():
        # ds_configs/zero2.json is the project's own wherever the command is run from.
        file = Path(__file__).parents[2] / path
    if not file.is_file():
        raise UserError(
            f"deepspeed: no such file: {path}; expected a DeepSpeed JSON such as ds_configs/zero2.json"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error}); expected a DeepSpeed configuration") from None
    if not isinstance(config, dict):
        raise UserError(
            f"{path}: a JSON {type(config).__name__} came; expected an object, a DeepSpeed configuration"
        )
    for key, value in config.items():
        if key in _SECTIONS and not isinstance(value, dict):
            raise UserError(f"{path}: {key} is {value!r}; expected an object")
        if key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            raise UserError(
                f"{path}: DeepSpeed has no top-level key '{key}'"
                + (f"; the nearest is '{near[0]}'" if near else "")
            )
    return config


class _Merger:
    """Makes a JSON value and a recipe key agree: the recipe fills "auto", the JSON what the user left unset."""

    def __init__(self, recipe: Recipe, set_keys: frozenset[str], origin: str) -> None:
        self.recipe, self.set_keys, self.origin = recipe, set_keys, origin

    def agree(self, json_key: str, value: Any, recipe_key: str) -> None:
        if value is None or value == "auto":
            return
        section, _, name = recipe_key.partition(".")
        holder: Any = getattr(self.recipe, section)
        current = getattr(holder, name)
        if isinstance(current, tuple) and isinstance(value, list):
            value = tuple(value)
        kinds = (int, float) if isinstance(current, float) else type(current)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(
                f"{self.origin}: {json_key} is {value!r}; expected the like of {current!r}"
            )
        if value == current:
            return
        if recipe_key in self.set_keys:
            raise UserError(
                f"{self.origin}: {json_key} is {value!r} but the recipe's {recipe_key} is {current!r}; "
                f'make them equal or write "auto"'
            )
        changed: dict[str, Any] = {section: dataclasses.replace(holder, **{name: value})}
        self.recipe = dataclasses.replace(self.recipe, **changed)


def resolve(
    config: Json,
    recipe: Recipe,
    set_keys: frozenset[str],
    *,
    hidden_size: int,
    world: int,
    ranks_per_machine: int | None = None,
    can_quantise: bool = False,
) -> ResolvedConfig:
    """Resolve the JSON against the recipe.

    Args:
        config: as `read_json` gave it; not changed.
        set_keys: recipe keys that the user wrote; a JSON value that contradicts one of them is an error.
        hidden_size: of the model, for ZeRO-3's "auto" bucket sizes (hidden^2, 0.9 hidden^2, 10 hidden: the rule of
            transformers' DeepSpeed integration, for which such files are written).
        world: number of ranks.
        ranks_per_machine: hpZ's "auto" partition size; None means that all ranks share one machine.
        can_quantise: DeepSpeed's CUDA quantiser is there, or can be compiled here.

    Raises:
        UserError: a contradiction, an optimizer or scheduler that we don't have, quantised weights where there is no
            quantiser; names the key.
    """
    config = copy.deepcopy(config)
    merger = _Merger(recipe, set_keys, recipe.deepspeed or "DeepSpeed JSON")
    _merge_optimizer(config.pop("optimizer", None), merger)
    _merge_scheduler(config.pop("scheduler", None), merger)
    merger.agree("gradient_clipping", config.get("gradient_clipping"), "optim.max_grad_norm")
    _check_batch(config, merger, world)
    _merge_precision(config, merger)
    zero = config.setdefault("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(
            f"{merger.origin}: zero_optimization.stage is {stage!r}; expected 0, 1, 2 or 3"
        )
    _resolve_zero(zero, stage, hidden_size)
    _resolve_zeropp(zero, merger, world, ranks_per_machine or world, can_quantise)
    for section in ("offload_optimizer", "offload_param"):
        if (zero.get(section) or {}).get("device") == "nvme":
            raise UserError(
                f"{merger.origin}: zero_optimization.{section}.device is 'nvme', from which no checkpoint can be made "
                f"here; expected 'cpu' or 'none'"
            )
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if offload:
        # torch's AdamW serves where DeepSpeed's compiled CPU optimizer is not to be had (see engine.make_optimizer).
        config["zero_force_ds_cpu_optimizer"] = False
    config |= {
        # Micro-batches differ in rows and in number per step, so DeepSpeed's own bookkeeping is switched to one and
        # the loop says itself where a step ends.
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": merger.recipe.optim.max_grad_norm,
        "steps_per_print": 10**9,
    }
    _precision_sections(config, merger.recipe)
    if stage == 0 and config.keys() & {"fp16", "bf16"}:
        # Without ZeRO, DeepSpeed's bf16 optimizer refuses fp32 accumulation and its fp16 one takes other steps than
        # stages 1 to 3 take (measured). Stage 1 computes the same with the optimizer's state spread over the ranks.
        stage = zero["stage"] = 1
    _drop_auto(config)
    return ResolvedConfig(config, merger.recipe, stage, offload)


def _merge_optimizer(block: Json | None, merger: _Merger) -> None:
    if block is None:
        return
    if str(block.get("type", "AdamW")).lower() not in _OPTIMIZERS:
        raise UserError(f"{merger.origin}: optimizer.type is {block.get('type')!r}; expected AdamW")
    params = block.get("params") or {}
    for name in ("lr", "betas", "eps", "weight_decay"):
        merger.agree(f"optimizer.params.{name}", params.get(name), f"optim.{name}")
    unknown = set(params) - {
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "torch_adam",
        "adam_w_mode",
        "bias_correction",
    }
    if unknown:
        raise UserError(
            f"{merger.origin}: optimizer.params has {sorted(unknown)[0]!r}, which torch's AdamW has not"
        )
    if params.get("adam_w_mode", True) is False or params.get("bias_correction", True) is False:
        raise UserError(
            f"{merger.origin}: optimizer.params asks for plain Adam; expected AdamW with bias correction"
        )


def _merge_scheduler(block: Json | None, merger: _Merger) -> None:
    if block is None:
        return
    kind, params = block.get("type"), block.get("params") or {}
    if kind not in _SCHEDULES:
        raise UserError(
            f"{merger.origin}: scheduler.type is {kind!r}; expected one of {', '.join(_SCHEDULES)}"
        )
    unknown = set(params) - _SCHEDULE_PARAMS
    if unknown:
        raise UserError(
            f"{merger.origin}: scheduler.params has {sorted(unknown)[0]!r}, which {kind} has not"
        )
    if params.get("warmup_type", "linear") not in ("auto", "linear"):
        raise UserError(
            f"{merger.origin}: scheduler.params.warmup_type is {params['warmup_type']!r}; expected 'linear'"
        )
    # "auto" everywhere, as in the official files, leaves the schedule to the recipe: those files carry WarmupLR
    # whatever the user trains with.
    if all(value == "auto" for value in params.values()):
        return
    merger.agree("scheduler.type", _SCHEDULES[kind], "optim.schedule")
    merger.agree("scheduler.params.warmup_max_lr", params.get("warmup_max_lr"), "optim.lr")
    merger.agree(
        "scheduler.params.warmup_num_steps", params.get("warmup_num_steps"), "optim.warmup_steps"
    )
    for name, only in (
        ("warmup_min_lr", 0),
        ("warmup_min_ratio", 0),
        ("cos_min_ratio", 0),
        ("last_batch_iteration", -1),
    ):
        if params.get(name, "auto") not in ("auto", only):
            raise UserError(
                f"{merger.origin}: scheduler.params.{name} is {params[name]!r}; expected {only}"
            )


def _check_batch(config: Json, merger: _Merger, world: int) -> None:
    """Explicit numbers say, or must agree with, how many rows a step has."""

    def number(key: str) -> int | None:
        value = config.get(key)
        if value in (None, "auto"):
            return None
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f'{merger.origin}: {key} is {value!r}; expected a positive whole number or "auto"'
            )
        return value

    micro, steps = number("train_micro_batch_size_per_gpu"), number("gradient_accumulation_steps")
    merger.agree("train_batch_size", number("train_batch_size"), "batch.rows_per_step")
    if micro is not None and steps is not None:
        product = f"train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps {steps} x {world} ranks"
        if config.get("train_batch_size") in (None, "auto"):
            merger.agree(product, micro * steps * world, "batch.rows_per_step")
        rows = merger.recipe.batch.rows_per_step
        if micro * steps * world != rows:
            raise UserError(
                f'{merger.origin}: {product} is not the {rows} rows of a step; write "auto"'
            )
    for key, value in (
        ("train_micro_batch_size_per_gpu", micro),
        ("gradient_accumulation_steps", steps),
    ):
        if value is not None and merger.recipe.batch.rows_per_step % (value * world):
            raise UserError(
                f"{merger.origin}: {key} {value} x {world} ranks does not divide the recipe's batch.rows_per_step "
                f'{merger.recipe.batch.rows_per_step}; write "auto"'
            )


def _merge_precision(config: Json, merger: _Merger) -> None:
    if "bfloat16" in config:
        config["bf16"] = config.pop("bfloat16")
    wanted = [
        dtype
        for key, dtype in (("bf16", "bfloat16"), ("fp16", "float16"))
        if (config.get(key) or {}).get("enabled", False) is True
    ]
    if len(wanted) == 2:
        raise UserError(
            f"{merger.origin}: bf16.enabled and fp16.enabled are both true; expected one"
        )
    if wanted:
        merger.agree(
            "bf16.enabled" if wanted[0] == "bfloat16" else "fp16.enabled", wanted[0], "model.dtype"
        )


def _precision_sections(config: Json, recipe: Recipe) -> None:
    """LoRA on bf16 or fp32: no section at all, trainables are fp32 and their own masters. LoRA or full training on
    fp16: DeepSpeed's fp16 section, for its loss scaling (masters fp32). Full training in bf16: DeepSpeed's bf16 with
    accumulation and communication in fp32; either alone loses three digits of the gradient."""
    fp16 = config.pop("fp16", None) or {}
    config.pop("bf16", None)
    if recipe.model.dtype == "float16":
        config["fp16"] = {k: v for k, v in fp16.items() if v != "auto"} | {"enabled": True}
    elif recipe.method == "full" and recipe.model.dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"


def _resolve_zero(zero: Json, stage: int, hidden_size: int) -> None:
    autos = {
        # Stages 1 and 2 allocate two fp32 buffers of this many elements: 160 MB.
        "reduce_bucket_size": hidden_size * hidden_size if stage == 3 else 2e7,
        "allgather_bucket_size": 2e8,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, value in autos.items():
        if zero.get(key) == "auto":
            zero[key] = int(value)


def _resolve_zeropp(
    zero: Json, merger: _Merger, world: int, ranks_per_machine: int, can_quantise: bool
) -> None:
    """ZeRO++ (Wang et al. 2023): hpZ keeps a second copy of the weights within each machine, and weights may travel
    as int8.

    "auto" quantises full training only. A gather joins many weights before they are cut into int8 groups, and an
    adapter's small values would share a scale with the base's large ones: in six steps on the small test model with a
    torch stand-in for the CUDA kernels the adapter was off by 16 %, full training by 0.5 %.
    """
    key = "zero_hpz_partition_size"
    if zero.get(key) == "auto":
        zero[key] = ranks_per_machine
    size = zero.get(key, 1)
    if isinstance(size, int) and size > 1 and world % min(size, world):
        raise UserError(
            f"{merger.origin}: {key} is {size}; expected a divisor of the {world} ranks"
        )
    key = "zero_quantized_weights"
    if zero.get(key) == "auto":
        zero[key] = can_quantise and merger.recipe.method == "full"
    for key in (
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients",
    ):
        if zero.get(key) is True and not can_quantise:
            raise UserError(
                f"{merger.origin}: {key} is true and DeepSpeed's CUDA quantiser cannot be had here; expected an NVIDIA "
                f"GPU with nvcc and ninja on every machine, or false"
            )


def _drop_auto(config: Json) -> None:
    """What is still "auto" has no counterpart in the recipe: DeepSpeed's default holds, and the file says no "auto"."""
    for key, value in list(config.items()):
        if value == "auto":
            del config[key]
        elif isinstance(value, dict):
            _drop_auto(value)
