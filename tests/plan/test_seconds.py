"""Predicted times and what ZeRO sends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.family import QWEN
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
    assert gradients.size == 5 * 4 * 10_158_080
    adapter, near, *_ = traffic(QWEN_7B, HOW, replace(zero, hpz=8), 5)
    assert (adapter.ranks, near.ranks) == (16, 8) and adapter.size < 4 * 10_158_080
    assert adapter.size + near.size == pytest.approx(far.size)
    full = Saving.of(Recipe(method="full", model=BF16, lora=OFF), on_gpu=True, family=QWEN)
    changed, *_ = traffic(QWEN_7B, full, replace(zero, hpz=8), 5)
    assert changed.size == pytest.approx(blocks + ends)
    assert traffic(QWEN_7B, HOW, Zero(3, 1), 5) == []


def test_zero_2_averages_after_each_micro_batch_and_zero_1_once() -> None:
    once, often = (traffic(QWEN_7B, HOW, Zero(stage, 8), 5)[0] for stage in (1, 2))
    assert once.size == 4 * 10_158_080
    assert (often.size, often.count) == (5 * once.size, 5 * once.count)


def test_small_micro_batches_cost_launches_and_zero_3_costs_five_times_as_many() -> None:
    """30 ms of a CPU for the 7B's micro-batch, however few its tokens are; recomputing every block
    adds a third. A GPU that computes for longer hides them."""
    gpu = gpu_named("h100")
    assert gpu is not None
    cluster = Cluster(gpu, Links(8, gpu.link))
    rows = Workload.like(128, 700, 0.66, 2048)
    two, three = (Work(QWEN_7B, HOW, Zero(stage, 8, 4096**2, overlap=True)) for stage in (2, 3))
    for tokens in (1024, 8192):
        parts = split(rows, 8, BatchOptions(128, tokens))
        assert launching_seconds(two, parts, 0) == pytest.approx(0.030 * parts.micro_batches)
        assert launching_seconds(two, parts, 1) == pytest.approx(0.040 * parts.micro_batches)
        assert launching_seconds(three, parts, 0) == pytest.approx(0.150 * parts.micro_batches)
        idle = step_seconds(three, cluster, parts, 0.66, 0).idle
        assert (idle > 0) == (tokens == 1024)
    small, large = (split(rows, 8, BatchOptions(128, tokens)) for tokens in (1024, 8192))
    slow, fast = (step_seconds(two, cluster, parts, 0.66, 0) for parts in (small, large))
    assert fast.passes < slow.passes and slow.idle == 0  # each micro-batch reads the weights
