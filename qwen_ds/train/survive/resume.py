"""Resuming a run: whether it is the same one, which checkpoint is whole, how it is restored.

For a LoRA run rank 0 alone reads the run folder: the other machines need not see its disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from qwen_ds import dist
from qwen_ds.errors import UserError
from qwen_ds.plan.deepspeed_json import Json
from qwen_ds.plan.run import Run
from qwen_ds.recipe.loading import LoadedRecipe, to_dict
from qwen_ds.recipe.options import Recipe
from qwen_ds.runlog import say
from qwen_ds.train import lora
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.engine.state import VALUE
from qwen_ds.train.observe.evaluation import BestLoss
from qwen_ds.train.schedule import total_steps
from qwen_ds.train.survive import checkpoint
from qwen_ds.train.survive.checkpoint import Checkpoint
from qwen_ds.train.survive.checkpoint_writer import BEGAN_WITH, COMPARED, OPTIMIZER, RNG, shard_name
from qwen_ds.train.survive.identity import Began, changes, known_later, other_versions
from qwen_ds.train.survive.run_folder import DS_CONFIG, IDENTITY, RECIPE, holds_run, is_finished

ADAPTER = "adapter/adapter_model.safetensors"
# Keys that may always differ: paths, and what changes no number by more than its rounding.
_FREE = (
    "output_dir", "dry_run", "resume", "deepspeed", "model.activation_checkpointing",
    "model.compile", "model.memory_gb", "data.cache_dir", "distributed.timeout_minutes",
    "save.before_minutes", "save.keep", "log.profile_steps", "log.trackers", "log.project",
    "log.run_name", "lora.allow_pickle", "batch.rehearse",
    # Earlier releases stored other defaults of these.
    "deepspeed.timers.throughput.enabled", "deepspeed.zero_optimization.overlap_comm",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold",
)  # fmt: skip
# Keys of the model's options whose "auto" a CPU measures (train/survey.py).
_MEASURED = ("dtype", "attention")
# Keys that decide the trained parameters and their shapes: a checkpoint fits no other choice.
_FIXED = (
    "method", "lora.r", "lora.targets", "lora.variant", "lora.special_rows", "lora.modules_to_save",
)  # fmt: skip


def identity(recipe: Recipe, ds_json: Json, data_sha256: str) -> dict[str, str]:
    """The hashes in each checkpoint: of recipe with DeepSpeed JSON, and of the token rows."""
    text = json.dumps(_comparable(to_dict(recipe), ds_json), sort_keys=True, default=str)
    return {"recipe_sha256": hashlib.sha256(text.encode()).hexdigest(), "data_sha256": data_sha256}


def with_measured(asked: LoadedRecipe, device: torch.device) -> LoadedRecipe:
    """The recipe with each "auto" that a CPU's measurement would decide replaced by what the run in
    its folder began with (a collective): on a busy machine it may come out otherwise."""
    if device.type != "cpu":
        return asked
    stored = dist.from_rank_0(_stored_model(Path(asked.recipe.output_dir)))
    model = asked.recipe.model
    known = {key: stored[key] for key in _MEASURED if vars(model)[key] == "auto" and key in stored}
    return replace(asked, recipe=replace(asked.recipe, model=replace(model, **known)))


def _stored_model(run: Path) -> dict[str, Any]:
    """The model's options in the recipe of a run on a CPU; empty where there is none."""
    try:
        stored = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
        return dict(stored["model"]) if stored["device"] == "cpu" else {}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return {}  # no run, or one whose fault `check_same_run` tells


def find_checkpoint(run: Run, now: Began) -> tuple[Checkpoint | None, Began]:
    """The checkpoint to resume from, or None: from the start; and what the run began with, which is
    `now` or what an earlier start knew better (a collective).

    Raises UserError if the folder holds a run of another recipe, base or first adapter.
    """
    if not dist.from_rank_0(holds_run(run.folder)):
        return None, now
    ds_json = run.deepspeed.stored_json()
    # All ranks, once: rank 0 compares, and all end with its error.
    dist.once(lambda: check_same_run(run.folder, run.recipe, ds_json), "compare the recipes")
    found = newest_whole(run.folder)
    if found is None:
        return None, now
    began: list[Began] = []
    dist.once(lambda: began.append(check_same_files(found, run, now)), "compare the files")
    return found, began[0] if began else now


def check_same_files(found: Checkpoint, run: Run, now: Began) -> Began:
    """Compare base, first adapter and libraries with those of a checkpoint; rank 0 only.

    Returns `now`, with the hashes of whole files that are still to be compared. Raises UserError
    for another base or adapter, unless resume.allow_changes names its option; other libraries are
    said.
    """
    began = Began.stored(found.state.get(BEGAN_WITH))
    if began is None:
        say(
            f"{found.folder}: of a release that did not keep what a run begins with; expecting the "
            "same base, first adapter and libraries, which cannot be compared"
        )
        return now
    if is_unsure(found):
        say(
            f"{found.folder}: saved at a stop, before all of the base was compared with that of the"
            " start; it is compared now, before the next save"
        )
    if versions := other_versions(began, now):
        say(f"{found.folder}: other libraries than it was saved with ({versions})")
    changed = False
    for change in changes(began, now):
        path = run.recipe.lora.init_from if change.option == "lora.init_from" else run.base_folder
        said = f"{path}: {change.what} was {change.was} when the run began and is {change.now} now"
        if not _allowed(change.option, run.recipe.resume.allow_changes):
            thing = "base" if change.option == "model.path" else "adapter"
            raise UserError(
                f"{said}; expected the same {thing} (or --resume.allow_changes {change.option}, or "
                "another output_dir)"
            )
        say(f"{said}, as resume.allow_changes has it")
        changed = True
    return (
        now
        if changed
        else replace(now, whole=began.whole or known_later(began, run.folder / IDENTITY))
    )


def is_unsure(found: Checkpoint) -> bool:
    """Whether nobody knows yet that a checkpoint is of the base that the run began with."""
    return found.state.get(COMPARED) is False


def nothing_is_left(found: Checkpoint, run: Run, data_sha256: str, steps_per_epoch: int) -> bool:
    """Whether the checkpoint is of a finished run (a collective).

    Raises UserError if the run began with other rows, or its pieces do not fit this world.
    """
    check_same_data(found.state, run.recipe, data_sha256)
    check_world(found, run.deepspeed.stage)
    best, steps = BestLoss(**found.state["best"]), total_steps(run.recipe.optim, steps_per_epoch)
    through = found.step >= steps or best.out_of_patience(run.recipe.eval.patience)
    return dist.from_rank_0(through and is_finished(run.folder))


def check_same_run(run: Path, recipe: Recipe, ds_json: Json) -> None:
    """Raise UserError if the recipe differs from the run folder's in a key that
    resume.allow_changes does not name; rank 0 only.
    """
    file = run / RECIPE
    try:
        stored = yaml.safe_load(file.read_text(encoding="utf-8"))
        stored_json = json.loads((run / DS_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{run}: its {RECIPE} or {DS_CONFIG} cannot be read ({reason}); expected a run folder"
        ) from None
    old, new = _comparable(stored, stored_json), _comparable(to_dict(recipe), ds_json)
    defaults = _comparable(to_dict(Recipe()), {})
    # Named first: other keys of the JSON follow from it.
    stage = "deepspeed.zero_optimization.stage"
    for key in sorted({*old, *new}, key=lambda key: (key != stage, key)):
        was, now = old.get(key, defaults.get(key)), new.get(key)
        if key == "device" and was == "auto":  # as earlier releases stored it
            was = now
        if was == now or (key not in _FIXED and _allowed(key, recipe.resume.allow_changes)):
            continue
        allow = key.split(".")[0] if key.startswith("deepspeed.") else key
        way = "" if key in _FIXED else f"--resume.allow_changes {allow}, or "
        raise UserError(
            f"{file}: {key} was {was!r} when the run began and is {now!r} now; expected the same "
            f"recipe (or {way}another output_dir)"
        )


def check_same_data(state: dict[str, Any], recipe: Recipe, data_sha256: str) -> None:
    """Raise UserError if the token rows are not those of the checkpoint."""
    if state["data_sha256"] != data_sha256 and not _allowed("data", recipe.resume.allow_changes):
        raise UserError(
            f"data.train {' '.join(recipe.data.train)}: the rows are not those that the run began "
            f"with; expected the same files (or --resume.allow_changes data, or another output_dir)"
        )


def _allowed(key: str, allow: list[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in allow)


def _comparable(recipe: dict[str, Any], ds_json: Json) -> dict[str, Any]:
    """Flat keys and plain values of what decides a run's numbers."""
    kept = {key: value for key, value in recipe.items() if key not in _FREE}
    plain = json.loads(json.dumps(kept | {"deepspeed": ds_json}))
    return {key: value for key, value in _flat(plain, "") if key not in _FREE}


def _flat(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, inner


def newest_whole(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint, the same on every rank (a collective).

    Says which ones are passed over, and why.
    """
    before: int | None = None
    while True:
        state = _newest_state(run, before)
        if state is None:
            return None
        found = Checkpoint(checkpoint.step_folder(run, state["step"]), state)
        if not state["sharded"] or state["ranks"] != dist.world_size():
            return found
        # All ranks, once a candidate: each reads its own shard. That may take minutes, so they meet
        # before the collective, which has a time-out. One damaged shard makes all pass on.
        damage = checkpoint.damaged(found, [shard_name(dist.rank(), dist.world_size())])
        dist.meet("shards read")
        damage = next((text for text in dist.gather(damage) if text), None)
        if damage is None:
            return found
        say(f"{found.folder} is passed over: {damage}")
        before = found.step


def _newest_state(run: Path, before: int | None) -> dict[str, Any] | None:
    # Rank 0 reads every byte, seconds for an adapter and minutes for a model: too long for a
    # collective.
    found: list[Checkpoint | None] = []
    dist.once(lambda: found.append(checkpoint.newest(run, before)), "the newest checkpoint")
    return dist.from_rank_0(found[0].state if found and found[0] else None)


def check_world(found: Checkpoint, stage: int) -> None:
    """Raise UserError if the pieces of a full-training checkpoint don't fit these ranks."""
    state = found.state
    if state["sharded"] and (state["ranks"], state["zero_stage"]) != (dist.world_size(), stage):
        way = " (its model/ can begin a new run)" if "model/config.json" in state["files"] else ""
        raise UserError(
            f"{found.folder}: full training's state of {state['ranks']} ranks under "
            f"ZeRO-{state['zero_stage']}; expected the same now, not {dist.world_size()} under "
            f"ZeRO-{stage}{way}"
        )


def restore(engine: TrainingEngine, found: Checkpoint) -> None:
    """Restore weights, moments, loss scale and random states of a checkpoint (a collective)."""
    state = found.state
    if state["sharded"]:
        file = found.folder / shard_name(dist.rank(), dist.world_size())
        with safe_open(file, framework="pt") as shard:
            engine.state.restore_pieces(shard.get_tensor, state["optimizer_steps"])
    elif dist.rank() == 0:
        in_adapter = ADAPTER in state["files"]
        values = found.folder / (ADAPTER if in_adapter else OPTIMIZER)
        with (
            safe_open(values, framework="pt") as adapter,
            safe_open(found.folder / OPTIMIZER, framework="pt") as held,
        ):

            def read(name: str, kind: str) -> Tensor:
                if kind == VALUE and in_adapter:
                    return adapter.get_tensor(lora.plain_name(name))
                return held.get_tensor(f"{name}.{kind}")

            engine.state.restore(read, state["optimizer_steps"])
    else:
        engine.state.restore(lambda name, kind: torch.empty(0), state["optimizer_steps"])
    engine.state.restore_loss_scaler(state["loss_scaler"])
    engine.overflows = state["overflows"]
    _restore_rng(found)


def _restore_rng(found: Checkpoint) -> None:
    states: dict[str, Tensor] = {}
    if dist.rank() == 0:
        with safe_open(found.folder / RNG, framework="pt") as file:
            states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # All ranks, once. A rank that the saved run did not have keeps the states that it has.
    states = dist.from_rank_0(states)
    cpu, cuda = (states.get(f"rank_{dist.rank()}.{kind}") for kind in ("cpu", "cuda"))
    if cpu is not None:
        torch.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(cuda)
