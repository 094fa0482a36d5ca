"""Predicted times and what ZeRO sends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.family import QWEN
from qwen_ds.plan import deepspeed_json
from qwen_ds.plan.activations import Saving
from qwen_ds.plan.gpus import gpu_named
from qwen_ds.plan.seconds import Cluster, Work, launching_seconds, step_seconds
from qwen_ds.plan.shape import Shape
from qwen_ds.plan.step import Workload, split
from qwen_ds.plan.traffic import Collective, Links, Zero, traffic
from qwen_ds.recipe.options import BatchOptions, LoraOptions, ModelOptions, Recipe

QWEN_7B = Shape.of(QWenConfig())
BF16 = ModelOptions(dtype="bfloat16")
OFF = LoraOptions(special_rows="off")
HOW = Saving.of(Recipe(model=BF16, lora=OFF), on_gpu=True, family=QWEN)


def test_time_grows_linearly_with_the_tokens() -> None:
    gpu = gpu_named("h100")
    assert gpu is not None
    cluster = Cluster(gpu, Links(8, gpu.link))
    work = Work(QWEN_7B, HOW, Zero(2, 8, 4096**2, overlap=True))

    def seconds(rows: int) -> float:
        parts = split(Workload.like(rows, 157, 0.66, 508), 8, BatchOptions(rows))
        return step_seconds(work, cluster, parts, 0.66, 0).total

    assert seconds(2048) / seconds(512) == pytest.approx(4, rel=0.05)


def test_collectives_move_what_ring_algorithms_move() -> None:
    """Hand-made: 100 bytes over 4 ranks, 75 received at a gather, 150 at an all-reduce; and the
    slower link counts."""
    assert Collective("gather", 100, 1, 4).moved == 75
    assert Collective("reduce", 100, 1, 4, rounds=2).moved == 150
    links = Links(per_machine=4, inside=100e9, between=10e9)
    one, two = (links.seconds(Collective("gather", 1e12, 1, n)) for n in (4, 8))
    assert one == pytest.approx(7.5, rel=1e-4)  # 3/4 of it over 100 GB/s
    # Half of it comes from the other machine, over 4 adapters.
    assert two == pytest.approx(12.5, rel=1e-4)


def test_zero_3_gathers_the_weights_twice_a_micro_batch_and_hpz_within_the_machine() -> None:
    zero = Zero(3, 16, 4096**2, small=40960)
    blocks, ends = 2 * QWEN_7B.block_matrices, 2 * 2 * QWEN_7B.head
    far, gradients, _ = traffic(QWEN_7B, HOW, zero, 5)
    assert far.size == pytest.approx(5 * (2 * blocks + ends), rel=0.01) and far.ranks == 16
    assert gradients.size == 4 * 10_158_080, "an adapter's are averaged once a step"
    adapter, near, *_ = traffic(QWEN_7B, HOW, replace(zero, hpz=8), 5)
    assert (adapter.ranks, near.ranks) == (16, 8) and adapter.size < 4 * 10_158_080
    assert adapter.size + near.size == pytest.approx(far.size)
    full = Saving.of(Recipe(method="full", model=BF16, lora=OFF), on_gpu=True, family=QWEN)
    changed, *_ = traffic(QWEN_7B, full, replace(zero, hpz=8), 5)
    assert changed.size == pytest.approx(blocks + ends)
    assert traffic(QWEN_7B, HOW, Zero(3, 1), 5) == []


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_2_and_3_average_after_each_micro_batch_and_an_adapter_once(stage: int) -> None:
    def averaged(how: Saving, stage: int, **zero: bool) -> Collective:
        found = traffic(QWEN_7B, how, Zero(stage, 8, **zero), 5)  # type: ignore[arg-type]
        return next(each for each in found if "gradients" in each.name)

    full = Saving.of(Recipe(method="full", model=BF16, lora=OFF), on_gpu=True, family=QWEN)
    once, often = averaged(full, 1), averaged(full, stage)
    assert (often.size, often.count) == (5 * once.size, 5 * once.count)
    of_adapter = averaged(HOW, stage)
    assert (of_adapter.size, of_adapter.count) == (4 * 10_158_080, averaged(HOW, 1).count)
    assert averaged(HOW, stage, offload_optimizer=True).size == 5 * of_adapter.size


@pytest.mark.parametrize("trained", ["lora", "ends", "full"])
@pytest.mark.parametrize("device", ["none", "cpu"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_engine_sums_locally_where_the_plan_says_so(
    trained: str, device: str, stage: int
) -> None:
    ends = ["wte", "lm_head"] if trained == "ends" else []
    lora = LoraOptions(special_rows="off", modules_to_save=ends)
    recipe = Recipe(method="full" if trained == "full" else "lora", model=BF16, lora=lora)
    config = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": device}}}
    resolved = deepspeed_json.resolve(config, recipe, frozenset(), hidden_size=4096, world=8)
    how = Saving.of(recipe, on_gpu=True, family=QWEN)
    expected = trained == "lora" and stage > 1 and device == "none"
    assert resolved.sums_locally == Zero.of(resolved.engine_json, 8).sums_locally(how) == expected


def test_small_micro_batches_cost_launches_and_zero_3_costs_twice_as_many() -> None:
    """30 ms of a CPU for the 7B's micro-batch, however few its tokens are; recomputing every block
    adds a third. A GPU that computes for longer hides them."""
    gpu = gpu_named("h100")
    assert gpu is not None
    cluster = Cluster(gpu, Links(8, gpu.link))
    rows = Workload.like(128, 700, 0.66, 2048)
    two, three = (Work(QWEN_7B, HOW, Zero(stage, 8, 4096**2, overlap=True)) for stage in (2, 3))
    for tokens in (512, 8192):
        parts = split(rows, 8, BatchOptions(128, tokens))
        assert launching_seconds(two, parts, 0) == pytest.approx(0.030 * parts.micro_batches)
        assert launching_seconds(two, parts, 1) == pytest.approx(0.040 * parts.micro_batches)
        assert launching_seconds(three, parts, 0) == pytest.approx(0.085 * parts.micro_batches)
        idle = step_seconds(three, cluster, parts, 0.66, 0).idle
        assert (idle > 0) == (tokens == 512)
    small, large = (split(rows, 8, BatchOptions(128, tokens)) for tokens in (1024, 8192))
    slow, fast = (step_seconds(two, cluster, parts, 0.66, 0) for parts in (small, large))
    assert fast.passes < slow.passes and slow.idle == 0  # each micro-batch reads the weights
