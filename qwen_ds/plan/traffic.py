"""ZeRO: what it shards over the ranks, what it sends for that, and how long the links take.

Sources: Rajbhandari et al. 2020 (ZeRO), section 7; Wang et al. 2023 (ZeRO++), section 3, for hpZ;
and for what DeepSpeed 0.19 really does, its code (stage_1_and_2.py, stage3.py,
partitioned_param_coordinator.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_ds.recipe.deepspeed_json import Json

# Latency in seconds of one step of a ring under NCCL's Simple protocol, over NVLink and over the
# network: the table hwLat of NCCL's own tuning model (src/graph/tuning.cc).
NVLINK_LATENCY, NETWORK_LATENCY = 3.4e-6, 14e-6


@dataclass(frozen=True, slots=True)
class Zero:
    """The keys of a zero_optimization section that decide memory and traffic, with DeepSpeed's
    defaults."""

    stage: int
    world: int
    reduce_bucket: int = 500_000_000
    """Elements of a gradient bucket, which is held while gradients are computed."""
    overlap: bool = False
    contiguous: bool = True
    live: int = 1_000_000_000
    """Parameters that ZeRO-3 may keep gathered."""
    small: int = 100_000
    """Parameters up to which ZeRO-3 does not shard a tensor."""
    hpz: int = 1
    """Ranks over which ZeRO-3 shards a second copy of the parameters; 1: there is none."""
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @classmethod
    def of(cls, engine_json: Json, world: int) -> Zero:
        section = engine_json.get("zero_optimization", {})
        stage = section.get("stage", 0)

        def offloaded(key: str) -> bool:
            return (section.get(key) or {}).get("device", "none") != "none"

        return cls(
            stage,
            world,
            int(section.get("reduce_bucket_size", 500_000_000)),
            bool(section.get("overlap_comm", stage == 3)),
            bool(section.get("contiguous_gradients", True)),
            int(section.get("stage3_max_live_parameters", 1_000_000_000)),
            int(section.get("stage3_param_persistence_threshold", 100_000)),
            int(section.get("zero_hpz_partition_size", 1)),
            offloaded("offload_optimizer"),
            offloaded("offload_param"),
        )

    def share(self, from_stage: int) -> float:
        """Share that one rank holds of what is sharded from that stage on."""
        return 1 / self.world if self.stage >= from_stage else 1.0


@dataclass(frozen=True, slots=True)
class Collective:
    """All collectives of one kind in a step. On a ring an all-gather or a reduce-scatter moves
    `size` round once, an all-reduce twice."""

    name: str
    size: float
    """Bytes of the whole tensors, summed over the collectives."""
    count: float
    ranks: int
    rounds: int = 1

    @property
    def moved(self) -> float:
        """Bytes that each rank receives: rounds (n - 1) / n size (ring algorithms; Patarasuk and
        Yuan 2009)."""
        return self.rounds * self.size * (self.ranks - 1) / self.ranks


@dataclass(frozen=True, slots=True)
class Tensors:
    """Total bytes of some tensors, and their number: ZeRO-3 gathers module by module."""

    size: float
    count: int

    @classmethod
    def of(cls, sizes: Sequence[float]) -> Tensors:
        return cls(sum(sizes), len(sizes))


@dataclass(frozen=True, slots=True)
class Load:
    """Tensors that a step may have to send; `forward` to `small` concern ZeRO-3 only."""

    forward: Tensors
    """Gathered in a forward pass."""
    backward: Tensors
    """Gathered again in a backward pass."""
    trained: Tensors
    """Those of `forward` that each step changes."""
    small: Tensors
    """Too small to be sharded; gathered after each step."""
    trained_parameters: int
    """Their gradients, and under ZeRO-2 their values, travel in fp32."""
    micro_batches: int


def traffic(zero: Zero, load: Load) -> list[Collective]:
    """All collectives of one optimizer step whose size grows with the model.

    ZeRO-0 and ZeRO-1 average the gradients once a step, ZeRO-2 after every micro-batch, bucket by
    bucket (by all-reduce, although each rank keeps only its own share: DeepSpeed's default,
    use_multi_rank_bucket_allreduce). ZeRO-1 and 2 then gather the updated parameters. ZeRO-3
    gathers the weights for the forward and again for the backward pass of each micro-batch, and
    reduce-scatters the gradients. Under hpZ a gather stays within the machine unless the weight has
    changed since the last one: only the first gather in a step of what is trained leaves it.
    """
    n, m = zero.world, load.micro_batches
    gradient = 4.0 * load.trained_parameters
    buckets = math.ceil(load.trained_parameters / zero.reduce_bucket)
    if n == 1:
        return []
    if zero.stage == 0:
        return [Collective("average gradients", gradient, 1, n, rounds=2)]
    if zero.stage < 3:
        times = m if zero.stage == 2 else 1
        return [
            Collective("average gradients", times * gradient, times * buckets, n, rounds=2),
            Collective("gather updated parameters", gradient, 1, n),
        ]
    size, count = (
        m * (load.forward.size + load.backward.size),
        m * (load.forward.count + load.backward.count),
    )
    gathered = [Collective("gather weights", size, count, n)]
    if zero.hpz > 1:
        gathered = [
            Collective("gather weights", load.trained.size, load.trained.count, n),
            Collective(
                "gather weights in the machine",
                size - load.trained.size,
                count - load.trained.count,
                zero.hpz,
            ),
        ]
    return [
        *gathered,
        Collective("scatter gradients", m * gradient, m * buckets, n),
        Collective("gather updated parameters", load.small.size, load.small.count, n),
    ]


@dataclass(frozen=True, slots=True)
class Links:
    """The links of a GPU: bytes a second, one direction."""

    per_machine: int
    inside: float
    between: float = 50e9
    """400 Gb/s: one network adapter for each GPU."""

    def seconds(self, collective: Collective) -> float:
        """Time of these collectives on a ring through all machines: its slowest link sets the pace,
        and each of its n - 1 steps costs a latency."""
        n = collective.ranks
        near = min(n, self.per_machine)
        machines = math.ceil(n / self.per_machine)
        inside = (near - 1) / near * collective.size / self.inside
        between = (machines - 1) / machines * collective.size / (near * self.between)
        latency = collective.count * (
            (n - machines) * NVLINK_LATENCY + (machines - 1) * NETWORK_LATENCY
        )
        return collective.rounds * (max(inside, between) + latency)
