"""The DeepSpeed JSON merged with the recipe: every "auto" resolved, every contradiction named.

DeepSpeed itself knows no "auto": it drops such keys. So each is settled here, before it sees the
JSON. Pure functions without a deepspeed import.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

from qwen_ds.errors import UserError
from qwen_ds.recipe.deepspeed_json import Json, split_idle
from qwen_ds.recipe.options import Recipe

# The batch sizes of which, with the ranks, a step's rows are the product.
_BATCH_PARTS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# JSON scheduler -> our schedule. WarmupLR holds the rate after the warm-up.
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
# Parameters of theirs that our schedules fix: the JSON may only repeat the value. Where it leaves
# one out and DeepSpeed's own default is another, the run says so.
_FIXED_PARAMS: dict[str, Any] = {
    "warmup_type": "linear",
    "warmup_min_lr": 0,
    "warmup_min_ratio": 0,
    "cos_min_ratio": 0,
    "last_batch_iteration": -1,
}
_SCHEDULE_PARAMS = {"warmup_max_lr", "warmup_num_steps"}
_OPTIMIZER_PARAMS = ("lr", "betas", "eps", "weight_decay")
_PERSISTENT = "stage3_param_persistence_threshold"
_ADAM_SWITCHES = {"torch_adam", "adam_w_mode", "bias_correction", "amsgrad"}


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """The JSON for `deepspeed.initialize`, and the recipe completed from it."""

    engine_json: Json
    recipe: Recipe
    stage: int
    offload_optimizer: bool
    remarks: tuple[str, ...] = ()
    """What the JSON asks for and this project does otherwise or not at all, in words."""

    @property
    def sums_locally(self) -> bool:
        """Whether each rank sums its gradients of a step, and the ranks average the sum once.

        So they do with an adapter. Elsewhere a whole gradient on every rank would take what ZeRO-2
        and 3 save: they average after each micro-batch, and keep a share.
        """
        adapter = self.recipe.method == "lora" and not self.recipe.lora.modules_to_save
        return self.stage > 1 and adapter and not self.offload_optimizer

    def stored_json(self) -> Json:
        """The JSON that resolves to this one again: with the rows of an optimizer step in place of
        the batch sizes that the engine is told."""
        stored = {k: v for k, v in self.engine_json.items() if k not in _BATCH_PARTS}
        return stored | {"train_batch_size": self.recipe.batch.rows_per_step}


class _Merger:
    """A recipe while it is merged with the JSON, which fills what the user left unset."""

    def __init__(self, recipe: Recipe, set_keys: frozenset[str]) -> None:
        self.recipe, self.set_keys = recipe, set_keys
        self.remarks: list[str] = []

    def error(self, mistake: str) -> UserError:
        return UserError(f"{self.recipe.deepspeed or 'DeepSpeed JSON'}: {mistake}")

    def refuse(self, key: str, came: object, expected: str) -> UserError:
        return self.error(f"{key} is {came!r}; expected {expected}")

    def agree(self, json_key: str, value: Any, recipe_key: str) -> None:
        """Take the JSON's value into the recipe; UserError if the user set another one there."""
        if value is None or value == "auto":
            return
        section, _, name = recipe_key.partition(".")
        holder: Any = vars(self.recipe)[section]
        current = vars(holder)[name]
        if isinstance(current, tuple) and isinstance(value, list):
            value = tuple(value)
        # A restricted number of the recipe is a subclass of the plain one that a JSON brings.
        # Unset are whole numbers alone, such as optim.decay_steps.
        plain = next((kind for kind in (int, float) if isinstance(current, kind)), type(current))
        plain = int if current is None else plain
        if plain is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # 2e2 is whole
        kinds = int | float if plain is float else plain
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise self.refuse(json_key, value, f"a value such as {current!r}")
        if value == current:
            return
        if recipe_key in self.set_keys:
            raise self.error(
                f"{json_key} is {value!r} but the recipe's {recipe_key} is {current!r}; make them "
                'equal or write "auto"'
            )
        self.recipe = replace(self.recipe, **{section: replace(holder, **{name: value})})


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
        config: as `read_deepspeed_json` gave it; not changed.
        set_keys: recipe keys that the user wrote; a JSON value that contradicts one is an error.
        hidden_size: of the model, for ZeRO-3's "auto" bucket sizes (the rule of transformers'
            DeepSpeed integration, for which such files are written).
        world: number of ranks.
        ranks_per_machine: hpZ's "auto" partition size; None means that all ranks share a machine.
        can_quantise: whether DeepSpeed's CUDA quantiser is built, or can be compiled here.

    Raises:
        UserError: a contradiction, an optimizer or scheduler that we don't have, quantised weights
            without a quantiser; names the key.
    """
    config, idle = split_idle(copy.deepcopy(config))
    merger = _Merger(recipe, set_keys)
    _remark_keys(idle, config, merger)
    _merge_optimizer(config.pop("optimizer", None) or {}, merger)
    if (scheduler := config.pop("scheduler", None)) is not None:
        _merge_scheduler(scheduler, merger)
    merger.agree("gradient_clipping", config.get("gradient_clipping"), "optim.max_grad_norm")
    _check_batch(config, merger, world)
    _merge_precision(config, merger)
    zero = config.setdefault("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise merger.refuse("zero_optimization.stage", stage, "0, 1, 2 or 3")
    _fill_zero(zero, merger, hidden_size, ranks_per_machine or world, can_quantise)
    _check_zero(zero, merger, world, can_quantise)
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if offload:
        # Else DeepSpeed refuses torch's AdamW beside offloading, and accepts only its own, which
        # has to be compiled.
        config["zero_force_ds_cpu_optimizer"] = False
    config |= {
        # Steps differ in their number of micro-batches, and these in rows. So DeepSpeed is told 1
        # and 1, and the loop itself says where an optimizer step ends.
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": merger.recipe.optim.max_grad_norm,
        "steps_per_print": 10**9,  # never: the loop has its own lines of metrics
    }
    # It makes the CPU wait for the GPU in every micro-batch, for a line that is never printed.
    throughput = config.setdefault("timers", {}).setdefault("throughput", {})
    if throughput.get("enabled", "auto") == "auto":
        throughput["enabled"] = False
    _precision_sections(config, merger)
    if stage == 0 and config.keys() & {"fp16", "bf16"}:
        # Without ZeRO, DeepSpeed's bf16 optimizer refuses fp32 accumulation, and its fp16 one takes
        # other steps than stages 1 to 3 take (measured). Stage 1 computes the same, with the
        # optimizer's state spread over the ranks.
        stage = zero["stage"] = 1
    _drop_auto(config)
    return ResolvedConfig(config, merger.recipe, stage, offload, tuple(merger.remarks))


def _fill_zero(
    zero: Json, merger: _Merger, hidden_size: int, ranks_per_machine: int, can_quantise: bool
) -> None:
    """Replace every "auto" of the section that stands for a number or a switch of ours."""
    stage3, full = zero.get("stage", 0) == 3, merger.recipe.method == "full"
    autos = {  # stages 1 and 2 allocate fp32 buffers of reduce_bucket_size: 80 MB, or two of them
        "reduce_bucket_size": hidden_size**2 if stage3 else 20_000_000,
        "allgather_bucket_size": 200_000_000,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        _PERSISTENT: _persistent(merger.recipe, hidden_size),
        # Below stage 3 it makes the CPU wait for the GPU after every micro-batch, which costs more
        # than sending an adapter's gradients. At stage 3 it fetches weights beside the products.
        "overlap_comm": stage3 or full,
        "zero_hpz_partition_size": ranks_per_machine,
        # A gather joins many weights before they are cut into int8 groups, so an adapter's small
        # values would share a scale with the base's large ones: after six steps on the small test
        # model, with a torch stand-in for the CUDA kernels, the adapter was off by 16 %, full
        # training by 0.5 %.
        "zero_quantized_weights": can_quantise and full,
    }
    zero |= {key: value for key, value in autos.items() if zero.get(key) == "auto"}
    if stage3 and not zero.keys() & {_PERSISTENT, _PERSISTENT.removeprefix("stage3_")}:
        zero[_PERSISTENT] = autos[_PERSISTENT]


def _persistent(recipe: Recipe, hidden_size: int) -> int:
    """Elements up to which ZeRO-3 keeps a parameter whole on every rank.

    All of an adapter: gathering it costs a GPU's CPU more than it saves in memory. The widest part
    is B of c_attn, [3 hidden, r]. Of the base only norms and biases: its matrices have hidden^2
    elements at least.
    """
    norms = 10 * hidden_size
    if recipe.method == "full":
        return norms
    return max(norms, min(10**6, hidden_size**2 - 1), 3 * hidden_size * recipe.lora.r)


def _remark_keys(idle: list[str], config: Json, merger: _Merger) -> None:
    if idle:
        merger.remarks.append(f"no effect here: {', '.join(idle)}")
    names = [
        name
        for name in ("tensorboard", "wandb", "csv_monitor", "comet")
        if isinstance(config.get(name), dict) and config[name].get("enabled") is True
    ]
    if names:
        merger.remarks.append(
            f"{', '.join(names)}: DeepSpeed writes the learning rate and the loss scale, over steps"
            " x ranks; metrics.jsonl and tensorboard/ have all the rest"
        )


def _merge_optimizer(block: Json, merger: _Merger) -> None:
    if str(block.get("type", "AdamW")).lower() not in ("adam", "adamw"):
        raise merger.refuse("optimizer.type", block.get("type"), "AdamW")
    params = block.get("params") or {}
    for name in _OPTIMIZER_PARAMS:
        merger.agree(f"optimizer.params.{name}", params.get(name), f"optim.{name}")
    if unknown := sorted(set(params) - {*_OPTIMIZER_PARAMS} - _ADAM_SWITCHES):
        raise merger.error(f"optimizer.params has {unknown[0]!r}, which torch's AdamW has not")
    if params.get("adam_w_mode", True) is False or params.get("bias_correction", True) is False:
        wanted = "expected AdamW with bias correction"
        raise merger.error(f"optimizer.params asks for plain Adam; {wanted}")


def _merge_scheduler(block: Json, merger: _Merger) -> None:
    kind, params = block.get("type"), block.get("params") or {}
    if kind not in _SCHEDULES:
        raise merger.refuse("scheduler.type", kind, f"one of {', '.join(_SCHEDULES)}")
    # "auto" at a parameter that the type has not is what generators of such files write.
    total = "auto" if kind == "WarmupLR" else params.get("total_num_steps", "auto")
    known = {*_SCHEDULE_PARAMS, *_FIXED_PARAMS}
    if kind != "WarmupLR" or params.get("total_num_steps") == "auto":
        known.add("total_num_steps")
    if unknown := sorted(set(params) - known):
        raise merger.error(f"scheduler.params has {unknown[0]!r}, which {kind} has not")
    # "auto" everywhere, as in the official files, leaves the schedule to the recipe: those files
    # carry WarmupLR whatever the user trains with.
    if all(value == "auto" for value in params.values()):
        return
    merger.agree("scheduler.type", _SCHEDULES[kind], "optim.schedule")
    for name, key in (("warmup_max_lr", "optim.lr"), ("warmup_num_steps", "optim.warmup_steps")):
        merger.agree(f"scheduler.params.{name}", params.get(name), key)
    merger.agree("scheduler.params.total_num_steps", total, "optim.decay_steps")
    for name, only in _FIXED_PARAMS.items():
        if params.get(name, "auto") not in ("auto", only):
            raise merger.refuse(f"scheduler.params.{name}", params[name], repr(only))
    _remark_schedule(str(kind), params, merger)


def _remark_schedule(kind: str, params: Json, merger: _Merger) -> None:
    """Say where DeepSpeed's own defaults for what the JSON leaves out would differ."""
    optim, ours = merger.recipe.optim, []
    if optim.warmup_steps and params.get("warmup_type", "auto") == "auto":
        ours.append("the warm-up is linear (warmup_type; by itself DeepSpeed takes log)")
    if "warmup_num_steps" not in params:
        steps = optim.warmup_steps
        ours.append(f"{steps} steps of warm-up (warmup_num_steps; by itself DeepSpeed takes 1000)")
    if kind == "WarmupDecayLR" and "warmup_max_lr" not in params:
        ours.append(f"lr {optim.lr:g} (warmup_max_lr; by itself DeepSpeed takes 0.001)")
    if kind == "WarmupCosineLR" and params.get("cos_min_ratio", "auto") == "auto":
        ours.append("it ends at 0 (cos_min_ratio; by itself DeepSpeed takes 0.0001)")
    if ours:
        merger.remarks.append(f"scheduler {kind}: {', '.join(ours)}")


def _check_batch(config: Json, merger: _Merger, world: int) -> None:
    """Take the rows of a step from explicit batch sizes, or check that they agree with them."""

    def number(key: str) -> int | None:
        value = config.get(key)
        if value in (None, "auto"):
            return None
        if not isinstance(value, int) or value < 1:
            raise merger.refuse(key, value, 'a positive whole number or "auto"')
        return value

    parts = {key: value for key in _BATCH_PARTS if (value := number(key)) is not None}
    total = number("train_batch_size")
    merger.agree("train_batch_size", total, "batch.rows_per_step")
    if len(parts) == 2:
        product = " x ".join(f"{key} {value}" for key, value in parts.items())
        product, size = f"{product} x {world} ranks", math.prod(parts.values()) * world
        if total is None:
            merger.agree(product, size, "batch.rows_per_step")
        elif size != total:
            raise merger.error(f'{product} is not the {total} rows of a step; write "auto"')
    rows = merger.recipe.batch.rows_per_step
    for key, value in parts.items():
        if rows % (value * world):
            raise merger.error(
                f"{key} {value} x {world} ranks does not divide the recipe's batch.rows_per_step "
                f'{rows}; write "auto"'
            )


def _merge_precision(config: Json, merger: _Merger) -> None:
    if "bfloat16" in config:
        config["bf16"] = config.pop("bfloat16")
    dtypes = {"bf16": "bfloat16", "fp16": "float16"}
    enabled = [key for key in dtypes if (config.get(key) or {}).get("enabled") is True]
    if len(enabled) == 2:
        raise merger.error("bf16.enabled and fp16.enabled are both true; expected one")
    for key in enabled:
        merger.agree(f"{key}.enabled", dtypes[key], "model.dtype")
    for key, dtype in dtypes.items():
        if (config.get(key) or {}).get("enabled") is False and merger.recipe.model.dtype == dtype:
            merger.remarks.append(f"{key}.enabled is false and model.dtype {dtype}, which counts")


def _precision_sections(config: Json, merger: _Merger) -> None:
    """Write the precision sections that training needs, whatever the JSON had.

    LoRA on a bf16 or fp32 base has none: its trainable parameters are fp32 and their own masters.
    An fp16 base takes DeepSpeed's fp16 section, for its loss scaling (masters fp32). Full training
    in bf16 takes DeepSpeed's bf16 with accumulation and communication in fp32; either alone loses
    three digits of the gradient.
    """
    recipe, fp16 = merger.recipe, config.pop("fp16", None) or {}
    config.pop("bf16", None)
    if recipe.model.dtype == "float16":
        config["fp16"] = {k: v for k, v in fp16.items() if v != "auto"} | {"enabled": True}
    elif recipe.method == "full" and recipe.model.dtype == "bfloat16":
        if config.get("communication_data_type", "fp32") not in ("fp32", "auto"):
            merger.remarks.append("communication_data_type: fp32, as in all full training in bf16")
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"


def _check_zero(zero: Json, merger: _Merger, world: int, can_quantise: bool) -> None:
    """Check ZeRO++ (Wang et al. 2023), that is hpZ's second copy of the weights within each machine
    and weights sent as int8; and where offloading goes."""
    key = "zero_hpz_partition_size"
    size = zero.get(key, 1)
    if isinstance(size, int) and size > 1 and world % min(size, world):
        raise merger.refuse(key, size, f"a divisor of the {world} ranks")
    for kind in ("weights", "nontrainable_weights", "gradients"):
        if zero.get(f"zero_quantized_{kind}") is True and not can_quantise:
            raise merger.error(
                f"zero_quantized_{kind} is true and DeepSpeed's CUDA quantiser cannot be had here; "
                "expected an NVIDIA GPU with nvcc and ninja on every machine, or false"
            )
    for section in ("offload_optimizer", "offload_param"):
        if (zero.get(section) or {}).get("device") == "nvme":
            key = f"zero_optimization.{section}.device"
            raise merger.refuse(key, "nvme", "'cpu' or 'none': no checkpoint could be made of it")


def _drop_auto(config: Json) -> None:
    """Remove every "auto" left: the recipe has no counterpart, so DeepSpeed's default applies."""
    for key, value in list(config.items()):
        if value == "auto":
            del config[key]
        elif isinstance(value, dict):
            _drop_auto(value)
