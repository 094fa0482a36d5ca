"""The machine as all ranks see it, and the run that is decided for it."""

from __future__ import annotations

import math

import torch

from qwen_ds import dist
from qwen_ds.disk.weights import TORCH_DTYPES
from qwen_ds.errors import UserError
from qwen_ds.machine import available_memory, can_compile, has_bf16_units
from qwen_ds.model.folder import ModelFolder
from qwen_ds.model.liger import liger_version
from qwen_ds.plan.resolve import resolve
from qwen_ds.plan.run import Base, Machine, Run
from qwen_ds.plan.sources import find_sources
from qwen_ds.recipe.loading import LoadedRecipe
from qwen_ds.runlog import say
from qwen_ds.train.cpu_speed import is_bf16_faster, is_eager_faster
from qwen_ds.train.engine import start
from qwen_ds.train.survive.identity import Began, changes, other_versions


def decide(asked: LoadedRecipe, device: torch.device) -> Run:
    """Find the base model and decide the run (a collective).

    Raises UserError if an option, the DeepSpeed JSON or the base model is wrong.
    """
    # The first rank of each machine fetches a model or makes the demo's; then all find it there.
    found: list[tuple[LoadedRecipe, ModelFolder]] = []
    dist.once_per_machine(lambda: found.append(find_sources(asked)), "model")
    asked, model = found[0] if found else find_sources(asked)
    run = resolve(asked, survey(device), Base.of(model))
    start.check_config(run.deepspeed.engine_json, run.recipe.deepspeed)
    return run


def beginning(run: Run) -> Began:
    """Everything that the run begins with, the same on every machine (a collective, once).

    Raises UserError if a machine has another base or first adapter than rank 0's.
    """
    mine: list[Began] = []
    dist.once_per_machine(lambda: mine.append(Began.of(run)), "what the run begins with")
    # Of the first rank of each machine; the others pass None.
    seen = dict(enumerate(dist.gather(mine[0] if mine else None)))
    first = seen[0]
    assert first is not None
    for rank, began in seen.items():
        if began is None:
            continue
        for change in changes(first, began):
            raise UserError(
                f"{change.option}: {change.what} is {change.now} on the machine of rank {rank} and "
                f"{change.was} on that of rank 0; expected the same files on every machine"
            )
        if versions := other_versions(first, began):
            say(f"other libraries on the machine of rank {rank} than on that of rank 0: {versions}")
    return first


def survey(device: torch.device) -> Machine:
    """The machine as all ranks see it (a collective of all ranks, once)."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        free, source = float(torch.cuda.mem_get_info(device)[0]), "that are free on the GPU"
    else:
        free = available_memory() / dist.local_world_size()
        source = "of free memory for each rank"
    return Machine(
        ranks=dist.world_size(),
        # Of unequal machines: hpZ's groups of this size must not cross from one to the next.
        ranks_per_machine=math.gcd(*dist.ranks_per_machine()),
        on_gpu=on_gpu,
        # All ranks must decide alike, so the one with the least decides.
        memory=min(dist.gather(free)),
        memory_source=source,
        fast_bf16=all(dist.gather(has_bf16_units(device) if on_gpu else is_bf16_faster())),
        eager_dtypes=frozenset() if on_gpu else _eager_dtypes(),
        can_quantise=start.can_quantise_weights(device),
        can_compile=all(dist.gather(can_compile(device))),
        liger=_on_every_rank(liger_version() if on_gpu else None),
    )


def _on_every_rank(version: str | None) -> str | None:
    """The version that all ranks have (a collective); None if one has none or another."""
    seen = set(dist.gather(version))
    return version if len(seen) == 1 else None


def _eager_dtypes() -> frozenset[str]:
    """Names of the dtypes in which plain products are the faster attention on every rank."""
    found = {name for name in ("bfloat16", "float32") if is_eager_faster(TORCH_DTYPES[name])}
    return frozenset.intersection(*dist.gather(frozenset(found)))
