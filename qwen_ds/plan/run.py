"""The decisions: a run without any "auto" left, and the facts that it was decided from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_ds.disk.weights import TORCH_DTYPES
from qwen_ds.model.family import QWEN, Family, ModelConfig
from qwen_ds.model.folder import ModelFolder, inspect_folder
from qwen_ds.model.tokenizer import Encoding
from qwen_ds.plan.activations import Saving
from qwen_ds.plan.deepspeed_json import ResolvedConfig
from qwen_ds.plan.shape import Shape
from qwen_ds.plan.traffic import Zero
from qwen_ds.recipe.options import Recipe


@dataclass(frozen=True, slots=True)
class Note:
    """A choice made for the user: one line of the start screen."""

    option: str
    choice: object
    reason: str

    def __str__(self) -> str:
        return f"{self.option} is {self.choice}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Machine:
    """The ranks and what each of them can use; equal on every rank."""

    ranks: int
    ranks_per_machine: int  # greatest common divisor over the machines
    on_gpu: bool
    memory: float  # bytes that a rank may fill: those of the rank with the least
    memory_source: str  # where that number comes from: the words that follow "GB" in messages
    fast_bf16: bool = True
    """Whether every rank multiplies bf16 faster than fp32: on a CPU as measured, on a GPU by units
    of its own (compute capability 8.0 or newer); older GPUs emulate it."""
    eager_dtypes: frozenset[str] = frozenset({"bfloat16"})
    """Dtypes in which plain products are the faster attention on every rank."""
    can_quantise: bool = False
    """Whether every rank has DeepSpeed's CUDA quantiser, or can compile it."""
    can_compile: bool = True
    """Whether every rank has what torch.compile needs (`machine.can_compile`)."""
    liger: str | None = None
    """Version of liger-kernel, where every rank has a GPU and the same usable version."""

    def missing_to_compile(self, dtype: str) -> str:
        """An unmet need of torch.compile, and of Triton on a GPU, for this dtype; "" if none is."""
        if not self.can_compile and self.on_gpu:
            software = "a C compiler, Python's headers (python3-dev), Triton"
            return f"{software} and a GPU of compute capability 7.0 or newer for every rank"
        if not self.can_compile:
            return "a C++ compiler (g++, or $CXX) for every rank"
        if self.on_gpu and not self.fast_bf16 and dtype == "bfloat16":
            return "model.dtype float16 or float32 (these GPUs emulate bfloat16)"
        return ""


@dataclass(frozen=True, slots=True)
class Base:
    """The base model without its weights, which no decision needs."""

    family: Family
    config: ModelConfig
    generation: Mapping[str, Any]  # generation_config.json; empty if there is none
    model: ModelFolder | None = None  # None: only the configuration is known

    @classmethod
    def of(cls, model: ModelFolder) -> Base:
        """The base in a folder that was inspected."""
        return cls(model.family, model.config, model.generation, model)

    @classmethod
    def read(cls, folder: Path) -> Base:
        """Inspect a checkpoint folder, but for its weights. UserError: it cannot be used."""
        return cls.of(inspect_folder(folder.resolve(), weights=False))

    @classmethod
    def qwen_7b(cls) -> Base:
        """Qwen-7B, the base model, without its files."""
        return cls(QWEN, QWEN.config_class(), {"chat_format": "raw"})

    @property
    def folder(self) -> Path | None:
        return None if self.model is None else self.model.path

    @property
    def encoding(self) -> Encoding | None:
        return None if self.model is None else self.model.encoding

    @property
    def chat_format(self) -> str | None:
        """Chat format in generation_config.json; None if it names none."""
        found = self.generation.get("chat_format")
        return None if found is None else str(found)


@dataclass(frozen=True, slots=True)
class Run:
    """A recipe as it will run, with all that was decided for it.

    Training, planner and start screen share this one. What depends on the rows may still be "auto":
    data.format, by which each row finds its own reader, data.encoding, which each file tells, and
    activation checkpointing, which plan/recomputation.py decides once their lengths are known.
    """

    recipe: Recipe
    base: Base
    machine: Machine
    deepspeed: ResolvedConfig
    notes: tuple[Note, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen base and the activations."""
        return TORCH_DTYPES[self.recipe.model.dtype]

    @property
    def memory(self) -> tuple[float, str]:
        """Bytes that a rank may fill, and where the number comes from."""
        given = self.recipe.model.memory_gb
        if given is not None:
            return given * 1e9, "that model.memory_gb allows"
        return self.machine.memory, self.machine.memory_source

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.output_dir)

    @property
    def model(self) -> ModelFolder:
        """The base's folder as it was inspected; a run that is only planned may have none."""
        assert self.base.model is not None, "a run that trains has read its base from a folder"
        return self.base.model

    @property
    def base_folder(self) -> Path:
        """The checkpoint folder of the base; see `model`."""
        return self.model.path

    @property
    def encoding(self) -> Encoding:
        """The vocabulary of the base; see `model`."""
        return self.model.encoding

    @property
    def shape(self) -> Shape:
        return Shape.of(self.base.config)

    @property
    def saving(self) -> Saving:
        return Saving.of(self.recipe, on_gpu=self.machine.on_gpu, family=self.base.family)

    @property
    def zero(self) -> Zero:
        return Zero.of(self.deepspeed.engine_json, self.machine.ranks)

    @property
    def levels_micro_batches(self) -> bool:
        """Whether micro-batches may be smaller than the budget allows, where that saves padding:
        the ranks talk once a step, not for each."""
        stage, sums_locally = self.deepspeed.stage, self.deepspeed.sums_locally
        return stage < 2 or (stage == 2 and sums_locally)

    @property
    def liger(self) -> str | None:
        """Version of liger-kernel, where it computes pieces of the blocks: on GPUs on which Triton
        can, where torch does not compile them."""
        assert self.recipe.model.compile != "auto", "plan/resolve.py decides about compiling"
        missing = self.machine.missing_to_compile(self.recipe.model.dtype)
        return None if self.recipe.model.compile or missing else self.machine.liger

    @property
    def special_ids(self) -> list[int]:
        """Ids of the trainable token rows; empty if there are none."""
        if self.recipe.method != "lora" or self.recipe.lora.special_rows != "on":
            return []
        return list(self.base.family.stop_ids(self.encoding))
