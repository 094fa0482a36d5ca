"""The measurements of gpu.py, in their order, and the figures that stand beside them; the sizes of
those of gpu_serve.py.

Nothing but Python's own modules is imported until a model is asked for: gpu.py shows its plan, and
both resume, without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from qwen_ds.model.configuration import QWenConfig

Kind = Literal["attention", "block", "step", "ours", "peer"]
ALL_TARGETS = ("c_attn", "c_proj", "w1", "w2")
RECIPE_TARGETS = ("c_attn", "c_proj")  # those of launch/recipes/lora_zero2.yaml
ADAPTER, WHOLE = "LoRA", "LoRA + embedding and head"
# Length: (GB, seconds a step), README of QwenLM/Qwen, one A100-SXM4-80G.
OFFICIAL = {
    ADAPTER: {
        256: (20.1, 1.2), 512: (20.4, 1.5), 1024: (21.5, 2.8),
        2048: (23.8, 5.2), 4096: (29.7, 10.1), 8192: (36.6, 21.3),
    },
    WHOLE: {
        256: (33.7, 1.4), 512: (34.1, 1.6), 1024: (35.2, 2.9),
        2048: (35.1, 5.3), 4096: (39.2, 10.3), 8192: (48.5, 21.7),
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Goal:
    """Figures to reach on an H200; None: nothing is asked."""

    tokens_per_second: float | None = None
    mfu: float | None = None
    gb: float | None = None  # at most


GOAL_OF_PEERS = 1.5  # times the fastest peer with the same adapter


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Those of Qwen-7B; a test makes them tiny."""

    vocab: int = 151936
    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    intermediate: int = 22016

    def config(self) -> QWenConfig:
        from qwen_ds.model.configuration import QWenConfig

        return QWenConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, kv_channels=self.hidden // self.heads,
            intermediate_size=self.intermediate,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServingPlan(ModelSizes):
    """The sizes of the measurements of gpu_serve.py."""

    rows: int = 32
    context: int = 512
    steps: int = 64  # timed
    prompts: int = 8
    prompt_tokens: int = 2048
    prefill_tokens: int = 4096
    memory_gb: float = 20.0  # of keys and values: 38,000 tokens of the 7B


@dataclass(frozen=True, slots=True)
class Plan(ModelSizes):
    """The sizes of the measurements of gpu.py."""

    lengths: tuple[int, ...] = (8192, 4096, 2048, 1024, 512, 256)
    length: int = 2048  # of the settings that are compared with peers
    rows: int = 4  # in their micro-batches
    micro_batches: int = 8
    r: int = 64
    small_r: int = 8
    timed_steps: int = 2
    fresh_lengths: int = 50
    repeats: int = 10  # of a block
    compiled: bool = True

    @classmethod
    def of(cls, sizes: Mapping[str, Any]) -> Plan:
        """From JSON, which has lists in place of tuples."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()})


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to train."""

    rows: int  # in a micro-batch
    length: int
    r: int
    targets: tuple[str, ...] = ALL_TARGETS
    whole: bool = False  # embedding and head are trained whole
    recompute: bool = False
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class Measurement:
    """One process, and the lines that come of it."""

    name: str
    kind: Kind
    seconds: int
    """An estimate for an H200, with the start of the process. Nothing is begun with less time left,
    and what takes `PATIENCE` times as long is ended."""
    setting: Setting
    goal: Goal = Goal()
    official: tuple[float, float] | None = None  # GB, seconds a step


PATIENCE = 3


def first_part(plan: Plan) -> Iterator[Measurement]:
    """The checks, and our speed beside HF Trainer's: under four minutes on an H200."""
    batch = Setting(plan.rows, plan.length, plan.r)
    small = replace(batch, r=plan.small_r, targets=RECIPE_TARGETS)
    yield Measurement("attention", "attention", 20, batch)
    yield Measurement("block", "block", 35, small)  # for which the bytes of a token are counted
    yield Measurement("step", "step", 25, replace(batch, rows=1))
    yield _ours(batch, 35, Goal(tokens_per_second=15_000))
    yield _peer(batch, 40)
    small = replace(small, compiled=plan.compiled)
    yield _ours(small, 55, Goal(tokens_per_second=18_000, mfu=0.55))


def second_part(plan: Plan) -> Iterator[Measurement]:
    """The other peers, the official table from its largest length on, other settings of ours."""
    batch = Setting(plan.rows, plan.length, plan.r)
    yield _peer(replace(batch, rows=1), 35)
    yield _peer(replace(batch, rows=1, recompute=True), 35)
    for length in plan.lengths:
        for part, (name, figures) in enumerate(OFFICIAL.items()):
            setting = Setting(1, length, plan.r, whole=part == 1, recompute=True)
            gb = 24 if (name, length) == (ADAPTER, 8192) else None
            seconds = 15 + plan.micro_batches * 3 * length // 12_000
            official = figures.get(length)
            yield Measurement(f"{name}, {length}", "ours", seconds, setting, Goal(gb=gb), official)
    if plan.compiled:
        yield _ours(replace(batch, compiled=True), 60, Goal())
        yield Measurement("step, compiled", "step", 60, replace(batch, rows=1, compiled=True))
    yield _ours(replace(batch, rows=2 * plan.rows), 50, Goal())
    yield _ours(replace(batch, rows=1), 25, Goal())


def with_half_the_rows(measurement: Measurement) -> Measurement | None:
    """The measurement to try where this one does not fit the memory; None with one row already."""
    setting = measurement.setting
    if setting.rows < 2 or measurement.kind not in ("ours", "peer"):
        return None
    make = _ours if measurement.kind == "ours" else _peer
    return make(replace(setting, rows=setting.rows // 2), measurement.seconds, measurement.goal)


def _ours(setting: Setting, seconds: int, goal: Goal) -> Measurement:
    name = f"ours, {_words(setting)}{', compiled' if setting.compiled else ''}"
    return Measurement(name, "ours", seconds, setting, goal)


def _peer(setting: Setting, seconds: int, goal: Goal = Goal()) -> Measurement:
    name = f"HF Trainer + peft, {_words(setting)}{', recomputed' if setting.recompute else ''}"
    return Measurement(name, "peer", seconds, setting, goal)


def _words(setting: Setting) -> str:
    return f"r {setting.r}, {setting.rows} x {setting.length}"
