"""ZeRO: what it shards over the ranks, what it sends for that, and how long the links take.

Sources: Rajbhandari et al. 2020 (ZeRO), section 7; Wang et al. 2023 (ZeRO++), section 3, for hpZ;
and for what DeepSpeed 0.19 really does, its code (stage_1_and_2.py, stage3.py,
partitioned_param_coordinator.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen_ds.plan.activations import FP32, Saving
from qwen_ds.plan.shape import Shape
from qwen_ds.recipe.deepspeed_json import Json

# Latency in seconds of one step of a ring under NCCL's Simple protocol, over NVLink and over the
# network: the table hwLat of NCCL's own tuning model (src/graph/tuning.cc).
NVLINK_LATENCY, NETWORK_LATENCY = 3.4e-6, 14e-6


@dataclass(frozen=True)
class Zero:
    """The keys of a zero_optimization section that decide memory and traffic, with DeepSpeed's
    defaults."""

    stage: int
    world: int
    reduce_bucket: int = 500_000_000
    """Elements of a gradient bucket, which is held while gradients are computed."""
    overlap: bool = False
    contiguous: bool = True
    live: int = 1_000_000_000  # parameters that ZeRO-3 may keep gathered
    small: int = 100_000  # parameters up to which ZeRO-3 does not shard a tensor
    hpz: int = 1  # ranks over which ZeRO-3 shards a second copy of the parameters; 1: there is none
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
            int(section.get("reduce_bucket_size", cls.reduce_bucket)),
            bool(section.get("overlap_comm", stage == 3)),
            bool(section.get("contiguous_gradients", cls.contiguous)),
            int(section.get("stage3_max_live_parameters", cls.live)),
            int(section.get("stage3_param_persistence_threshold", cls.small)),
            int(section.get("zero_hpz_partition_size", cls.hpz)),
            offloaded("offload_optimizer"),
            offloaded("offload_param"),
        )

    def sums_locally(self, how: Saving) -> bool:
        """As `ResolvedConfig.sums_locally`."""
        return self.stage > 1 and how.adapter and not self.offload_optimizer

    def share(self, from_stage: int) -> float:
        """Share that one rank holds of what is sharded from that stage on."""
        return 1 / self.world if self.stage >= from_stage else 1.0


@dataclass(frozen=True, slots=True)
class Collective:
    """All collectives of one kind in a step. On a ring an all-gather or a reduce-scatter moves
    `size` round once, an all-reduce twice."""

    name: str
    size: float  # bytes of the whole tensors, summed over the collectives
    count: float
    ranks: int
    rounds: int = 1

    @property
    def moved(self) -> float:
        """Bytes that each rank receives: rounds (n - 1) / n size (ring algorithms; Patarasuk and
        Yuan 2009)."""
        return self.rounds * self.size * (self.ranks - 1) / self.ranks


def traffic(shape: Shape, how: Saving, zero: Zero, micro_batches: int) -> list[Collective]:
    """All collectives of one optimizer step whose size grows with the model.

    ZeRO-0 and ZeRO-1 average the gradients once a step, as ZeRO-2 and 3 do with those of an
    adapter. Others they average after every micro-batch, bucket by bucket: ZeRO-2 by all-reduce,
    although each rank keeps only its own share (DeepSpeed's default,
    use_multi_rank_bucket_allreduce), ZeRO-3 by reduce-scatter. ZeRO-1 and 2 then gather the updated
    parameters, in fp32 as the gradients are. ZeRO-3 gathers the weights for the forward and again
    for the backward pass of each micro-batch.
    """
    n, trained = zero.world, how.trained_parameters(shape)
    if n == 1:
        return []
    times = micro_batches if zero.stage > 1 and not zero.sums_locally(how) else 1
    buckets = math.ceil(trained / zero.reduce_bucket) if zero.stage else 1
    size, count = times * 4.0 * trained, times * buckets
    if zero.stage == 3:
        *gathers, updated = _gathers(shape, how, zero, micro_batches)
        return [*gathers, Collective("scatter gradients", size, count, n), updated]
    average = Collective("average gradients", size, count, n, rounds=2)
    updated = Collective("gather updated parameters", 4.0 * trained, 1, n)
    return [average, updated] if zero.stage else [average]


def _gathers(shape: Shape, how: Saving, zero: Zero, micro_batches: int) -> list[Collective]:
    """The gathers of a step under ZeRO-3, block by block; the last is that of updated parameters.

    Small tensors are not sharded: every rank has them, and gathers them after the step. The
    backward pass gathers neither the head, which is still there, nor an embedding that is not
    trained whole. Under hpZ a gather stays within the machine unless the weight has changed since
    the last one: only the first gather in a step of what is trained leaves it.
    """
    n, layers = zero.world, shape.layers
    blocks = [how.b * shape.block] * layers
    bytes_each = FP32 if not how.full else how.b  # of a parameter that is trained
    embedding = (bytes_each if how.whole_embedding else how.b) * shape.head
    head = (bytes_each if how.whole_head else how.b) * shape.head
    adapters = [FP32 * how.r * width for width in shape.lora_widths(how.targets)] * layers
    small = [size for size in adapters if size <= FP32 * zero.small]
    trained = [size for size in adapters if size > FP32 * zero.small]
    forward = [*blocks, embedding, head, *trained]
    once = [head]
    once += [] if how.whole_embedding else [embedding]
    trained += [embedding] if how.whole_embedding else []
    trained += [head] if how.whole_head else []
    size = float(micro_batches * (2 * sum(forward) - sum(once)))
    count = micro_batches * (2 * len(forward) - len(once))
    gathers = [Collective("gather weights", size, count, n)]
    if zero.hpz > 1:
        changed = forward if how.full else trained
        far, far_count = float(sum(changed)), len(changed)
        near = Collective("gather weights in the machine", size - far, count - far_count, zero.hpz)
        gathers = [Collective("gather weights", far, far_count, n), near]
    size = float(sum(small) + how.b * shape.small_parameters)
    count = len(small) + 3 * layers + 1
    return [*gathers, Collective("gather updated parameters", size, count, n)]


@dataclass(frozen=True, slots=True)
class Links:
    """The links of a GPU: bytes a second, one direction."""

    per_machine: int
    inside: float
    between: float = 50e9  # 400 Gb/s: one network adapter for each GPU

    def seconds(self, collective: Collective) -> float:
        """Time of these collectives on a ring through all machines: its slowest link sets the pace,
        and each of its n - 1 steps costs a latency."""
        n = collective.ranks
        near = min(n, self.per_machine)
        machines = math.ceil(n / self.per_machine)
        inside = (near - 1) / near * collective.size / self.inside
        between = (machines - 1) / machines * collective.size / (near * self.between)
        latency = (n - machines) * NVLINK_LATENCY + (machines - 1) * NETWORK_LATENCY
        return collective.rounds * (max(inside, between) + collective.count * latency)
