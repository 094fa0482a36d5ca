"""The adapter of lora.init_from, checked against the recipe before any weight is loaded."""

from __future__ import annotations

import math

from qwen_ds.errors import UserError
from qwen_ds.model.adapter import Adapter, check_adapter_fits, read_adapter
from qwen_ds.model.adapter_keys import PEFT_PREFIX
from qwen_ds.model.shapes import state_shapes
from qwen_ds.plan.run import Base
from qwen_ds.recipe.options import LoraOptions


def read_first_adapter(options: LoraOptions) -> Adapter:
    """Read the adapter of lora.init_from, without its tensors: a stock PEFT folder, or the original
    project's `pytorch_model.bin` if lora.allow_pickle says so. UserError if there is none."""
    assert options.init_from is not None
    try:
        return read_adapter(
            options.init_from,
            allow_pickle=options.allow_pickle,
            alpha=options.alpha,
            option="lora.allow_pickle",
        )
    except UserError as error:
        raise UserError(f"lora.init_from: {error}") from None


def trained_keys(options: LoraOptions, base: Base) -> set[str]:
    """PEFT's keys of everything that a recipe without any "auto" trains."""
    family = base.family
    magnitude = ["lora_magnitude_vector"] if options.variant == "dora" else []
    keys = {
        f"{family.blocks}.{i}.{linear.name}.{part}"
        for i in range(base.config.num_hidden_layers)
        for linear in family.matched(options.targets)
        for part in ("lora_A.weight", "lora_B.weight", *magnitude)
    }
    for module in (family.embedding, family.head):
        if module.rpartition(".")[2] in options.modules_to_save:
            keys.add(f"{module}.weight")
        elif options.special_rows == "on":
            keys.add(f"{module}.token_adapter.trainable_tokens_delta")
    return {PEFT_PREFIX + key for key in keys}


def check_first_adapter(options: LoraOptions, base: Base) -> tuple[str, ...]:
    """Check that the adapter of lora.init_from trains what the recipe trains, on this base.

    Trainable token rows and saved modules that the adapter was trained without start from the
    base. Returns what its configuration says in vain, a line each. UserError names the first of
    other modules or rows, another rank or scale, or another base's shapes.
    """
    adapter = read_first_adapter(options)
    notes = check_adapter_fits(adapter, state_shapes(base.config))
    ours = trained_keys(options, base)
    place = f"lora.init_from {options.init_from}"
    for key in sorted(ours ^ set(adapter.shapes)):
        if key in ours and ".lora_" not in key:
            continue
        side = "the recipe does not train it"
        side = "the recipe trains it and the adapter lacks it" if key in ours else side
        to_match = "lora.modules_to_save and lora.special_rows"
        to_match = "lora.targets and lora.variant" if ".lora_" in key else to_match
        raise UserError(
            f"{place}: {key}: {side}; make {to_match} match, or merge it into the base "
            "(launch/merge.py) and start from the merged model"
        )
    scaling = options.alpha / (math.sqrt(options.r) if options.variant == "rslora" else options.r)
    for module, pair in adapter.pairs.items():
        if not math.isclose(pair.scaling, scaling):
            raise UserError(
                f"{place}: {module} is scaled by {pair.scaling:g}; the recipe's lora.alpha and "
                f"lora.r say {scaling:g}; expected the same"
            )
        if pair.r != options.r:
            raise UserError(f"{place}: {module} has rank {pair.r}; expected {options.r} (lora.r)")
    wanted = sorted(base.family.stop_ids(base.encoding)) if base.encoding is not None else []
    for module, rows in adapter.token_rows.items():
        if sorted(rows.indices) != wanted:
            raise UserError(
                f"{place}: it trains the rows {sorted(rows.indices)} of {module}; expected "
                f"{wanted} (lora.special_rows)"
            )
    return notes
