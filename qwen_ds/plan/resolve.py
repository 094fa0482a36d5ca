"""From what was asked to what will run: every option checked, every "auto" replaced, with reasons.

`check` needs only the files that options name and takes well under a second, so a typo is refused
before DeepSpeed is imported, a row is read or a weight is loaded. `resolve` also needs the machine
and the base model.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_ds.data.rows.token_rows import check_data
from qwen_ds.disk.adapter_folder import find_adapter
from qwen_ds.errors import UserError
from qwen_ds.model.family import FAMILIES
from qwen_ds.plan import deepspeed_json
from qwen_ds.plan.first_adapter import check_first_adapter, read_first_adapter
from qwen_ds.plan.run import Base, Machine, Note, Run
from qwen_ds.plan.shape import Shape
from qwen_ds.recipe.deepspeed_json import read_deepspeed_json
from qwen_ds.recipe.loading import LoadedRecipe, check_values
from qwen_ds.recipe.options import Recipe

# More parameters than this run on a CPU only if asked for: there a step of the 7B takes minutes.
CPU_PARAMETERS = 1_000_000_000
# save.keep. The original project's 32 checkpoints of a whole 7B would take 3 TB.
KEEP = {"lora": 32, "full": 2}
# Names of projects that a tracker takes, and the words for them.
_PROJECTS = {
    "swanlab": (r"[0-9a-zA-Z_+.-]{1,100}", "up to 100 letters, digits and _-+."),
    "wandb": (r"[^/\\#?%:]{1,128}", "up to 128 characters, none of them one of /\\#?%:"),
}


def check(asked: LoadedRecipe, rows: bool = True) -> None:
    """Check every option that can be checked without the machine and the base model. UserError
    names the first mistake by its option.

    Args:
        rows: whether data will be read; the planner only needs the lengths that it is told.
    """
    recipe = asked.recipe
    if rows and recipe.data.train and "model.path" not in asked.set_keys:
        raise UserError(
            "model.path is not set; expected the folder or hub id of a Qwen model beside data.train"
        )
    if rows and (recipe.data.train or recipe.model.path != "demo"):  # the demo brings its own rows
        check_data(recipe.data)
    read_deepspeed_json(recipe.deepspeed)
    _check_lora(recipe)
    _check_trackers(recipe)
    _check_allowed_changes(recipe)


def _check_lora(recipe: Recipe) -> None:
    """Check the module names in lora.*, of any family, and that the first adapter can be read."""
    if recipe.method != "lora":
        return
    options = recipe.lora
    targets = dict.fromkeys(name for f in FAMILIES.values() for name in f.target_names)
    unknown = [name for name in options.targets if name not in targets]
    if unknown or not options.targets:
        came = repr(unknown[0]) if unknown else "nothing"
        expected = ", ".join(targets)
        raise UserError(f"lora.targets: {came} matches no module; expected some of {expected}")
    ends = dict.fromkeys(name for f in FAMILIES.values() for name in f.ends)
    for name in options.modules_to_save:
        if name not in ends:
            expected = ", ".join(ends)
            raise UserError(f"lora.modules_to_save: {name!r} came; expected some of {expected}")
    if options.special_rows in ("on", True) and options.modules_to_save:
        raise UserError(
            f"lora.special_rows is on and lora.modules_to_save is "
            f"{', '.join(options.modules_to_save)}; expected one of them: a matrix trained whole "
            "has those rows in it"
        )
    if options.init_from is not None:
        read_first_adapter(options)


def _check_trackers(recipe: Recipe) -> None:
    """Check that the package of each tracker in log.trackers is there, which is not imported, and
    that it takes log.project."""
    project = recipe.log.project
    for name in recipe.log.trackers:
        if importlib.util.find_spec(name) is None:
            package = "mlflow-skinny" if name == "mlflow" else name
            raise UserError(
                f"log.trackers: {name} came, whose package is not installed; expected "
                f"`pip install {package}`, or no {name}"
            )
        rule, words = _PROJECTS.get(name, (r".*", ""))
        if project and not re.fullmatch(rule, project):
            raise UserError(f"log.project is {project!r}; {name} expected {words}")


def _check_allowed_changes(recipe: Recipe) -> None:
    """Check the names in resume.allow_changes: a misspelt one would allow nothing."""
    sections = dataclasses.asdict(recipe)
    inner = (f"{s}.{k}" for s, v in sections.items() if isinstance(v, dict) for k in v)
    known = {*sections, *inner}
    for name in recipe.resume.allow_changes:
        # Below deepspeed are the JSON's own keys, such as deepspeed.zero_optimization.
        if name not in known and not name.startswith("deepspeed."):
            raise UserError(
                f"resume.allow_changes: {name!r} is no key or section of a recipe; expected names "
                "such as optim.epochs or data"
            )


def resolve(asked: LoadedRecipe, machine: Machine, base: Base, *, rows: bool = True) -> Run:
    """Decide everything that can be decided before a row is read or a weight is loaded.

    Args:
        asked: the recipe as the user gave it. A DeepSpeed JSON fills what it leaves unset.
        machine: equal on every rank, so that all decide alike.
        rows: see `check`.

    Raises:
        UserError: as `check`; a contradiction between recipe and JSON; an adapter of another base;
            a large model on a CPU that nobody asked for.
    """
    check(asked, rows)
    notes: list[Note] = []
    recipe = asked.recipe
    _check_size(recipe, machine, base)
    if recipe.device == "auto":
        recipe = replace(recipe, device="cuda" if machine.on_gpu else "cpu")
    if recipe.batch.rehearse == "auto":
        recipe = _with(recipe, "batch", rehearse=machine.on_gpu)
    is_dtype_free, reason = recipe.model.dtype == "auto", ""
    if is_dtype_free:
        dtype, reason = _choose_dtype(recipe.method, machine)
        recipe = _with(recipe, "model", dtype=dtype)
    merged = deepspeed_json.resolve(
        read_deepspeed_json(recipe.deepspeed),
        recipe,
        asked.set_keys - ({"model.dtype"} if is_dtype_free else set()),
        hidden_size=base.config.hidden_size,
        world=machine.ranks,
        ranks_per_machine=machine.ranks_per_machine,
        can_quantise=machine.can_quantise,
    )
    if reason and merged.recipe.model.dtype == recipe.model.dtype:  # else the JSON chose
        notes.append(Note("model.dtype", recipe.model.dtype, reason))
    recipe = merged.recipe
    if merged.remarks:
        notes.append(Note("deepspeed", recipe.deepspeed, "; ".join(merged.remarks)))
    check_values(recipe)  # what the JSON filled in has the same ranges
    _check_schedule(recipe)
    recipe = _choose_attention(recipe, machine, notes)
    recipe = _choose_compile(recipe, machine, merged.stage, notes)
    recipe = _choose_special_rows(recipe, base, notes)
    if recipe.save.keep is None:
        recipe = _with(recipe, "save", keep=KEEP[recipe.method])
    if recipe.method == "lora" and recipe.lora.init_from is not None:
        recipe = _choose_first_adapter(recipe, base, recipe.lora.init_from, notes)
    return Run(recipe, base, machine, replace(merged, recipe=recipe), tuple(notes))


def _check_schedule(recipe: Recipe) -> None:
    """Check that the schedule comes down after its warm-up, and that it comes down at all."""
    optim = recipe.optim
    if optim.decay_steps is None:
        return
    if optim.schedule == "constant":
        raise UserError(
            f"optim.decay_steps is {optim.decay_steps} and optim.schedule constant, which never "
            "comes down; expected linear or cosine, or no decay_steps"
        )
    if optim.decay_steps <= optim.warmup_steps:
        raise UserError(
            f"optim.decay_steps is {optim.decay_steps} and optim.warmup_steps "
            f"{optim.warmup_steps}; expected more steps than those of the warm-up"
        )


def _with(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return replace(recipe, **{section: replace(vars(recipe)[section], **values)})


def _check_size(recipe: Recipe, machine: Machine, base: Base) -> None:
    total = Shape.of(base.config).parameters
    if not machine.on_gpu and recipe.device == "auto" and total > CPU_PARAMETERS:
        raise UserError(
            f"{recipe.model.path} has {total / 1e9:.1f} billion parameters and this machine no "
            "GPU; expected a GPU, or --device cpu if minutes per step are meant"
        )


def _choose_dtype(method: str, machine: Machine) -> tuple[str, str]:
    """bf16, or on CPUs the faster of bf16 and fp32, which both hold a bf16 base exactly; and the
    reason, where a user might wonder.

    Only LoRA may have its base in fp32: in full training this is also the dtype of the result.
    """
    if machine.on_gpu and not machine.fast_bf16:
        exact = "it holds the base exactly, but these GPUs emulate it"
        return "bfloat16", f"{exact}; float16 is faster from V100 on"
    if method == "lora" and not machine.fast_bf16:
        return "float32", "this CPU multiplies fp32 faster than bf16, as was measured"
    return "bfloat16", ""


def _choose_attention(recipe: Recipe, machine: Machine, notes: list[Note]) -> Recipe:
    """Take the faster kernel: on CPUs the one that was measured to be."""
    if recipe.model.attention != "auto":
        return recipe
    dtype = recipe.model.dtype
    if not machine.on_gpu and dtype in machine.eager_dtypes:
        reason = f"on this CPU plain matrix products are faster in {dtype}, as was measured"
        notes.append(Note("model.attention", "eager", reason))
        return _with(recipe, "model", attention="eager")
    return _with(recipe, "model", attention="sdpa")


def _choose_compile(recipe: Recipe, machine: Machine, stage: int, notes: list[Note]) -> Recipe:
    """Compile on GPUs, where the operations between the products take a third of a step."""
    wanted = recipe.model.compile
    missing = machine.missing_to_compile(recipe.model.dtype)
    if wanted == "auto":
        wanted, reason = False, ""
        if not machine.on_gpu:
            reason = "on a CPU only long runs get back what compiling takes at the start"
        elif missing:
            reason = f"it needs {missing}"
        elif recipe.method == "lora" and recipe.lora.variant == "dora":
            reason = "DoRA breaks the graph of a block into many"
        elif stage == 3:
            reason = "compiled blocks have not run on a GPU under ZeRO-3 yet"
            wanted = False if machine.liger else "pieces"
        else:
            wanted = True
        if reason:
            notes.append(Note("model.compile", wanted or "false", reason))
    elif wanted and missing:
        came = "true" if wanted is True else wanted
        raise UserError(f"model.compile is {came}; expected {missing}, or model.compile false")
    return _with(recipe, "model", compile=wanted)


def _choose_first_adapter(recipe: Recipe, base: Base, given: str, notes: list[Note]) -> Recipe:
    """Check the adapter to continue from, and name its own folder where a run's was given."""
    found = str(find_adapter(given))
    if Path(found) != Path(os.path.expanduser(given)):
        notes.append(Note("lora.init_from", found, f"it is the adapter in {given}"))
    for note in check_first_adapter(recipe.lora, base):
        notes.append(Note("lora.init_from", found, note))
    return _with(recipe, "lora", init_from=found)


def _choose_special_rows(recipe: Recipe, base: Base, notes: list[Note]) -> Recipe:
    """Replace "auto": on for LoRA on a base model, which is one whose folder does not say "chatml".

    Pre-training never showed such a model the rows of <|im_start|> and <|im_end|>. Where
    lora.modules_to_save trains whole matrices, they are trained already.
    """
    wanted = recipe.lora.special_rows
    if wanted == "auto":
        is_lora = recipe.method == "lora" and not recipe.lora.modules_to_save
        wanted = is_lora and base.chat_format != "chatml"
        if wanted:
            named = base.chat_format
            says = f"says chat_format {named!r}" if named else "has no chat_format"
            why = f"generation_config.json {says}, as a base model's"
            why = "Qwen-7B is a base model" if base.folder is None else why
            rows = "its rows of <|endoftext|>, <|im_start|> and <|im_end|>"
            reason = f"{why}; without {rows} trained the model would not learn to stop"
            notes.append(Note("lora.special_rows", "on", reason))
    return _with(recipe, "lora", special_rows="on" if wanted in ("on", True) else "off")
