"""The recipe: every option of a training run, typed and documented; and the command-line parser of all commands.

A recipe file is YAML; each key can also be given on the command line (`--lora.r 16`), where it wins. Defaults are the
original project's: 128 rows a step, learning rate 3e-4 constant, 3 epochs, LoRA r 8 on c_attn and c_proj.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import yaml

from qwen_ds.errors import UserError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class ModelOptions:
    """The base model."""

    path: str = "demo"
    """Folder or hub id of a Qwen checkpoint in the official layout; `demo` makes the embedded tiny Qwen."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of the frozen base and the activations; trainable LoRA parameters are always fp32. auto: bfloat16, but
    float32 for LoRA on x86 CPUs without a matrix unit for bf16 (AMX), where it is faster and takes twice the memory."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention kernel: sdpa lets torch choose (flash on CUDA), eager is plain matrix products; auto: sdpa, but eager
    for bfloat16 on CPUs, where it is faster."""
    compile: bool = False
    """Compile each block (torch.compile): some 20 to 60 seconds at the start, which long runs get back. It needs a C++
    compiler, on a GPU Triton."""
    activation_checkpointing: Literal["auto", "none", "all"] | int = "auto"
    """Recompute no block, all blocks, or every n-th block (an integer) in the backward pass; auto: the fewest that fit
    the memory, by plan/memory.py. The numbers that come out are the same."""
    memory_gb: float | None = None
    """Memory in GB (10^9 bytes) that auto may fill on each rank; unset: what is free on the GPU when the run starts,
    without one the machine's free memory divided by its ranks."""


@dataclass(frozen=True)
class DataOptions:
    """What is read, how it becomes tokens, and which of them are learnt."""

    train: list[str] = field(default_factory=list)
    """Files, folders or hub data sets to train on."""
    eval: list[str] = field(default_factory=list)
    """Files, folders or hub data sets to compute the evaluation loss on."""
    eval_fraction: float = 0.0
    """Share of the training rows that is set aside for evaluation when data.eval is empty."""
    format: str = "auto"
    """Name of a reader, or auto to recognise each row by its keys."""
    columns: dict[str, str] | None = None
    """Maps expected column names to those in the files, for example {"instruction": "q", "output": "a"}."""
    system: str | None = None
    """System text of rows that bring none; unset means the original's "You are a helpful assistant."."""
    weights: list[float] | None = None
    """One weight for each entry of data.train: how often its rows are seen per epoch."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What to do with a row that cannot be read: stop with its file:line, or skip and count it."""
    cache_dir: str | None = None
    """Where tokenised rows are cached; unset means ~/.cache/qwen_ds/rows."""
    max_prompt_tokens: int = 254
    """Prompt tokens of a single-turn row at most (learn_on original)."""
    max_answer_tokens: int = 254
    """Answer tokens of a single-turn row at most (learn_on original)."""
    max_tokens: int | None = None
    """Tokens of any other row at most; unset: the model's seq_length. A longer conversation loses its oldest turns."""
    learn_on: Literal["original", "answer", "official"] = "original"
    """Which tokens are learnt: as in the original project, the answers alone, or as in the official finetune.py."""
    special_tokens_in_text: Literal["escape", "parse"] = "escape"
    """Whether <|im_end|> and the like, spelled in a text, stay plain text or become control tokens."""


@dataclass(frozen=True)
class LoraOptions:
    """The adapter."""

    r: int = 8
    """Rank."""
    alpha: int = 16
    """Scale: the update is multiplied by alpha / r (rslora: alpha / sqrt(r))."""
    dropout: float = 0.05
    """Dropout on the input of the LoRA branch."""
    targets: list[str] = field(default_factory=lambda: ["c_attn", "c_proj"])
    """Modules: c_attn, c_proj (both), attn.c_proj, mlp.c_proj, w1, w2."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """The LoRA variant."""
    special_rows: str | bool = "auto"  # YAML reads a bare on or off as true or false
    """Train the rows of <|endoftext|>, <|im_start|> and <|im_end|> in wte and lm_head too, without which a base model
    never learns to stop: on, off, or auto, which is on where generation_config.json does not say chat_format chatml."""
    modules_to_save: list[str] = field(default_factory=list)
    """Train these whole, in fp32: wte, lm_head. The official way for base models: 1.2 billion parameters of the 7B."""
    init_from: str | None = None
    """Folder of an adapter to continue from."""


@dataclass(frozen=True)
class OptimOptions:
    """AdamW and its schedule."""

    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 turns clipping off."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    epochs: float = 3.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Optimizer steps at most, whatever the epochs say."""


@dataclass(frozen=True)
class BatchOptions:
    """The optimizer step."""

    rows_per_step: int = 128
    """Rows of one optimizer step over all ranks."""
    tokens_per_micro_batch: int = 2048
    """Padded tokens of one micro-batch at most (a single longer row still runs, alone)."""


@dataclass(frozen=True)
class LogOptions:
    """Metrics."""

    every_steps: int = 1
    """Optimizer steps between two lines of metrics."""
    profile_steps: tuple[int, int] | None = None
    """First and last optimizer step to profile, for example [10, 12]: a trace for TensorBoard and the split of the time
    into data, forward, backward, optimizer and communication, in the run folder's profile/."""


@dataclass(frozen=True)
class EvalOptions:
    """Evaluation while training."""

    every_steps: int | None = None
    """Optimizer steps between two evaluation losses; unset means once at the end of every epoch."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a lower loss; unset: never."""
    samples: int = 3
    """Rows of the evaluation data that are answered, greedily, at each evaluation (samples.jsonl, TensorBoard)."""
    sample_tokens: int = 64
    """Tokens of such an answer at most."""


@dataclass(frozen=True)
class SaveOptions:
    """Saved steps."""

    every_steps: int = 382
    """Optimizer steps between two checkpoints."""
    keep: int = 32
    """How many of the newest checkpoints stay; the best one stays, too."""
    before_minutes: float = 5.0
    """Save and stop this long before the time limit of the Slurm job that the run is in."""


@dataclass(frozen=True)
class ResumeOptions:
    """Going on in a run folder."""

    allow_changes: list[str] = field(default_factory=list)
    """Recipe keys or sections that may differ from those the run began with, such as optim.epochs or data."""


@dataclass(frozen=True)
class DistributedOptions:
    """The process group."""

    timeout_minutes: float = 10.0
    """A collective that waits longer ends the run."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run."""

    output_dir: str = "runs/demo"
    """The run folder."""
    seed: int = 42
    """Seeds the order of the rows, the dropout and the fresh adapter."""
    method: Literal["lora", "full"] = "lora"
    """Train an adapter, or all parameters."""
    deepspeed: str | None = None
    """Path of a DeepSpeed JSON; unset means ZeRO-2."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes the GPU when there is one."""
    dry_run: bool = False
    """Stop before the first step, after everything was loaded and checked."""
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    log: LogOptions = field(default_factory=LogOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    save: SaveOptions = field(default_factory=SaveOptions)
    resume: ResumeOptions = field(default_factory=ResumeOptions)
    distributed: DistributedOptions = field(default_factory=DistributedOptions)


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe and which of its keys the user wrote, in a file or on the command line."""

    recipe: Recipe
    set_keys: frozenset[str]


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser with our manners: a mistake is one UserError line that names the nearest known option;
    `--key A B C` fills a list option; `--local_rank` (the launcher appends it) is accepted everywhere."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(exit_on_error=False, **kwargs)
        self.add_argument("--local_rank", "--local-rank", type=int, help=jsonargparse.SUPPRESS)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(self._explain(message))

    def parse(
        self, argv: Sequence[str] | None = None, *, defaults: bool = True
    ) -> jsonargparse.Namespace:
        """Parse argv (None: the process's own). Raises UserError."""
        args = self._fold_lists(list(sys.argv[1:] if argv is None else argv))
        try:
            parsed = self.parse_args(args, defaults=defaults)
        except argparse.ArgumentError as error:
            raise UserError(self._explain(str(error))) from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"the recipe file is not UTF-8 ({error.reason} at byte {error.start})"
            ) from None
        parsed.pop("local_rank", None)
        return parsed

    def _option_names(self) -> list[str]:
        return [s for action in self._actions for s in action.option_strings if s.startswith("--")]

    def _explain(self, message: str) -> str:
        text = re.sub(r"\s+", " ", message).strip()
        in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text)
        in_file = re.search(r"Option '([\w.]+)' is not accepted", text)
        flags = re.findall(r"--[\w.]+", text) if "unrecognized arguments" in text else []
        if in_group:
            unknown = ".".join(in_group.groups())
        elif in_file or flags:
            unknown = in_file.group(1) if in_file else flags[0].removeprefix("--")
        else:
            return text
        near = difflib.get_close_matches(
            unknown, [n.removeprefix("--") for n in self._option_names()], n=1, cutoff=0.4
        )
        return f"unknown option {unknown}" + (
            f"; the nearest is {near[0]}" if near else "; --help lists all"
        )

    def _fold_lists(self, args: list[str]) -> list[str]:
        """`--data.train a b` becomes `--data.train=["a", "b"]` for options whose type is a list.

        Given twice, such an option would lose its first values: that is an error.
        """
        lists = {
            s
            for action in self._actions
            if re.search(r"(list|tuple)\[", str(getattr(action, "_typehint", "")).lower())
            for s in action.option_strings
        }
        folded: list[str] = []
        given: set[str] = set()
        i = 0
        while i < len(args):
            name = args[i].partition("=")[0]
            if name in lists and name in given:
                raise UserError(
                    f"{name} was given twice; expected all of its values after one {name}"
                )
            given.add(name)
            if args[i] in lists:
                j = i + 1
                while j < len(args) and not args[j].startswith("--"):
                    j += 1
                values = args[i + 1 : j]
                inline = len(values) == 1 and values[0].startswith("[")
                folded.append(
                    f"{args[i]}={values[0] if inline else yaml.safe_dump(values, default_flow_style=True).strip()}"
                )
                i = j
            else:
                folded.append(args[i])
                i += 1
        return folded


def recipe_parser() -> Parser:
    parser = Parser(description="Fine-tune Qwen with LoRA or fully under DeepSpeed ZeRO.")
    parser.add_argument("--config", action="config", help="recipe file (YAML)")
    parser.add_class_arguments(Recipe)
    return parser


def load_recipe(argv: Sequence[str] | None = None) -> LoadedRecipe:
    """Read recipe file and options into a checked Recipe.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range.
    """
    return load_recipe_with(recipe_parser(), argv)[0]


def load_recipe_with(
    parser: Parser, argv: Sequence[str] | None
) -> tuple[LoadedRecipe, dict[str, Any]]:
    """`load_recipe` for a command that gave `recipe_parser` options of its own: their values come beside the recipe."""
    given = parser.parse(argv, defaults=False)
    whole = parser.parse(argv)
    whole.pop("config", None)
    keys = {field.name for field in dataclasses.fields(Recipe)}
    own = {key: whole.pop(key) for key in list(vars(whole)) if key not in keys}
    recipe = Recipe(**parser.instantiate(whole))
    check_ranges(recipe)
    set_keys = (key for key in given.as_flat().__dict__ if key != "config" and key not in own)
    return LoadedRecipe(recipe, frozenset(set_keys)), own


# What must hold of a value beyond its type.
_POSITIVE = ("a positive number", lambda x: x > 0)
_NOT_NEGATIVE = ("0 or a positive number", lambda x: x >= 0)
_SHARE = ("a number from 0 to less than 1", lambda x: 0 <= x < 1)
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "seed": _NOT_NEGATIVE,
    "model.memory_gb": _POSITIVE,
    "data.eval_fraction": _SHARE,
    "data.max_tokens": _POSITIVE,
    "lora.r": _POSITIVE,
    "lora.alpha": _POSITIVE,
    "lora.dropout": _SHARE,
    "lora.special_rows": ("auto, on or off", lambda x: x in ("auto", "on", "off", True, False)),
    "optim.lr": _NOT_NEGATIVE,
    "optim.betas": (
        "two numbers from 0 to less than 1",
        lambda x: len(x) == 2 and all(0 <= b < 1 for b in x),
    ),
    "optim.eps": _POSITIVE,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.max_grad_norm": _NOT_NEGATIVE,
    "optim.warmup_steps": _NOT_NEGATIVE,
    "optim.epochs": _POSITIVE,
    "optim.max_steps": _POSITIVE,
    "batch.rows_per_step": _POSITIVE,
    "batch.tokens_per_micro_batch": _POSITIVE,
    "log.every_steps": _POSITIVE,
    "log.profile_steps": ("two steps, the first not after the last", lambda x: 1 <= x[0] <= x[1]),
    "eval.every_steps": _POSITIVE,
    "eval.patience": _POSITIVE,
    "eval.samples": _NOT_NEGATIVE,
    "eval.sample_tokens": _POSITIVE,
    "save.every_steps": _POSITIVE,
    "save.before_minutes": _NOT_NEGATIVE,
    "save.keep": _POSITIVE,
    "distributed.timeout_minutes": _POSITIVE,
}


def check_ranges(recipe: Recipe) -> None:
    """Raises UserError for the first value that is of the right type and still cannot be meant."""
    values = dataclasses.asdict(recipe)
    for key, (expected, holds) in _RANGES.items():
        value: Any = values
        for part in key.split("."):
            value = value[part]
        if value is not None and not holds(value):
            raise UserError(f"{key} is {value}; expected {expected}")


def to_dict(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


def write_recipe(recipe: Recipe, path: Path) -> None:
    path.write_text(
        yaml.safe_dump(_plain(to_dict(recipe)), sort_keys=False, allow_unicode=True),
        encoding="utf-8",
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
