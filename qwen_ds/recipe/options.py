"""The recipe: every option of a training run, typed, with its range and its documentation.

A recipe file is YAML; each key can also be given on the command line (`--lora.r 16`), where it
wins. Defaults are the original project's: 128 rows a step, learning rate 3e-4 constant, 3 epochs,
LoRA r 8 on c_attn and c_proj.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qwen_ds.recipe.ranges import (
    AnswerBound,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    PromptBound,
    RowBound,
    Seed,
)


@dataclass(frozen=True)
class ModelOptions:
    """The base model."""

    path: PathText = "demo"
    """Folder or hub id of a Qwen checkpoint in the official layout; `demo` is the embedded tiny
    Qwen."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of the frozen base and of the activations; trainable LoRA parameters are always fp32.
    auto: bfloat16, but float32 for LoRA on CPUs that are measured to multiply it faster (x86
    without AMX), where it takes twice the memory. GPUs older than Ampere emulate bfloat16: float16
    is faster there, from V100 on."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention kernel: sdpa lets torch choose (flash on CUDA), eager is plain matrix products.
    auto: sdpa, but eager on CPUs where it is measured to be faster for short rows."""
    compile: Literal["auto", "pieces"] | bool = "auto"
    """Compile each block and the loss (torch.compile), or pieces: of a block only norm, gate and
    rotation, each by itself. It takes 20 to 60 seconds at the start, which a long run gets back. It
    needs a C++ compiler; on a GPU (V100 or newer; in bfloat16 Ampere or newer) a C compiler,
    Python's headers and Triton. auto: true on GPUs under ZeRO-0 to 2, but for DoRA; pieces under
    ZeRO-3 where there is no liger-kernel."""
    activation_checkpointing: Literal["auto", "none", "all"] | NonNegativeInt = "auto"
    """Recompute no block, all blocks, or every n-th block (an integer) in the backward pass. auto:
    the fewest that fit the memory. The numbers that come out are the same."""
    memory_gb: PositiveFloat | None = None
    """Memory in GB (10^9 bytes) that auto may fill on each rank. Unset: what is free on the GPU
    when the run starts; without a GPU, the machine's free memory divided by its ranks."""


@dataclass(frozen=True)
class DataOptions:
    """The rows: where they come from, how they become tokens, and which tokens are targets."""

    train: list[PathText] = field(default_factory=list)
    """Files, folders or hub data sets to train on."""
    eval: list[PathText] = field(default_factory=list)
    """Files, folders or hub data sets to compute the evaluation loss on."""
    eval_fraction: Fraction = 0.0
    """Share of the training rows that is set aside for evaluation when data.eval is empty."""
    format: str = "auto"
    """Name of a reader, or auto to recognise each row by its keys."""
    columns: dict[str, str] | None = None
    """Maps expected column names to those in the files: {"instruction": "q", "output": "a"}."""
    system: str | None = None
    """System text of rows that bring none. Unset: the original's "You are a helpful assistant."."""
    weights: list[PositiveFloat] | None = None
    """One weight for each entry of data.train: how often an epoch draws each of its rows."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """At a row that cannot be read: stop with its file:line, or skip and count it."""
    encoding: str = "auto"
    """Encoding of texts: gb18030, big5, cp1252 and so on. auto: UTF-8, or what each file's own
    bytes tell; where they leave a doubt, the run stops and asks for this option."""
    max_row_mb: PositiveInt = 64
    """Longest row of a file, in MB (10^6 bytes). An object that holds all rows counts as one."""
    max_expansion: PositiveInt = 200
    """How many times its own size a compressed file or an archive may unfold to; every one may
    unfold to 256 MB."""
    cache_dir: PathText | None = None
    """Cache of tokenised rows. Unset: ~/.cache/qwen_ds/rows."""
    max_prompt_tokens: PromptBound = 254
    """Bound for the prompt of a single-turn row, in tokens (learn_on original)."""
    max_answer_tokens: AnswerBound = 254
    """Bound for the answer of a single-turn row, in tokens (learn_on original)."""
    max_tokens: RowBound | None = None
    """Bound for any other row, in tokens. Unset: the model's seq_length. A longer conversation
    loses its oldest turns."""
    learn_on: Literal["original", "answer", "official"] = "original"
    """Target tokens: as in the original project, the answers alone, or as in the official
    finetune.py."""
    special_tokens_in_text: Literal["escape", "parse"] = "escape"
    """Whether <|im_end|> and the like, spelled in a text, stay plain text or become control
    tokens."""


@dataclass(frozen=True)
class LoraOptions:
    """The adapter."""

    r: PositiveInt = 8
    """Rank."""
    alpha: PositiveInt = 16
    """Scale: the update is multiplied by alpha / r (rslora: alpha / sqrt(r))."""
    dropout: Fraction = 0.05
    """Dropout on the input of the LoRA branch."""
    targets: list[str] = field(default_factory=lambda: ["c_attn", "c_proj"])
    """Modules: c_attn, c_proj (both), attn.c_proj, mlp.c_proj, w1, w2."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """The LoRA variant."""
    special_rows: Literal["auto", "on", "off"] | bool = "auto"  # YAML reads a bare on as true
    """Train the rows of <|endoftext|>, <|im_start|> and <|im_end|> in wte and lm_head too, without
    which a base model never learns to stop: on, off, or auto, which is on where
    generation_config.json does not say chat_format chatml."""
    modules_to_save: list[str] = field(default_factory=list)
    """Train these whole, in fp32: wte, lm_head. The official way for base models: 1.2 billion
    parameters of the 7B."""
    init_from: PathText | None = None
    """Folder of an adapter to continue from, or of a run or checkpoint that holds one."""
    allow_pickle: bool = False
    """Also read init_from from adapter_model.bin or pytorch_model.bin: tensors, nothing else."""


@dataclass(frozen=True)
class OptimOptions:
    """AdamW and its schedule."""

    lr: NonNegativeFloat = 3e-4
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's betas."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradient norm above which gradients are scaled down; 0 turns clipping off."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    decay_steps: PositiveInt | None = None
    """Optimizer step, warm-up included, at which linear and cosine have come down to 0, where they
    stay. Unset: the end of the run."""
    epochs: PositiveFloat = 3.0
    """Passes over the training rows."""
    max_steps: PositiveInt | None = None
    """Bound for the optimizer steps, whatever the epochs say."""


@dataclass(frozen=True)
class BatchOptions:
    """The optimizer step."""

    rows_per_step: PositiveInt = 128
    """Rows of one optimizer step over all ranks."""
    tokens_per_micro_batch: PositiveInt = 2048
    """Bound for the padded tokens of one micro-batch (a single longer row still runs, alone).
    Where micro-batches cost no communication, a half, a quarter and so on is taken if it saves more
    padding than it costs: in training below ZeRO-2, and of adapters under it."""
    rehearse: Literal["auto"] | bool = "auto"
    """Run the largest micro-batch forward and backward once before the first step, so that a lack
    of memory shows at once; with model.compile also one of the other kind, of a single row or of
    several, since each has code of its own. No number changes. auto: on GPUs."""


@dataclass(frozen=True)
class LogOptions:
    """Metrics."""

    every_steps: PositiveInt = 1
    """Optimizer steps between two lines of metrics."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last optimizer step to profile, for example [10, 12]: a trace for TensorBoard and
    the split of the time into data, forward, backward, optimizer and communication, in the run
    folder's profile/."""
    trackers: list[Literal["swanlab", "wandb", "mlflow", "trackio"]] = field(default_factory=list)
    """Trackers that also get the numbers of metrics.jsonl. Each needs its package. Without a login
    or variables of their own they write into the run folder, trackio into its local database.
    TensorBoard's files are always written."""
    project: str | None = None
    """The run's project in the trackers (MLflow: its experiment). Unset: as the tracker's own
    variables have it, or qwen-ds."""
    run_name: str | None = None
    """The run's name in the trackers. Unset: that of the run folder."""
    token_losses_rows: NonNegativeInt = 5
    """Rows of the evaluation data, or of the training data where there is none, whose every target
    token is written with its loss before the first step and after the last (token_losses.jsonl)."""


@dataclass(frozen=True)
class EvalOptions:
    """Evaluation while training."""

    every_steps: PositiveInt | None = None
    """Optimizer steps between two evaluations. Unset: once at the end of every epoch."""
    patience: PositiveInt | None = None
    """Stop after so many evaluations in a row without a lower loss. Unset: never."""
    samples: NonNegativeInt = 3
    """Rows of the evaluation data that are answered, greedily, at each evaluation (samples.jsonl,
    TensorBoard)."""
    sample_tokens: PositiveInt = 64
    """Bound for such an answer, in tokens."""


@dataclass(frozen=True)
class SaveOptions:
    """Checkpoints."""

    every_steps: PositiveInt = 382
    """Optimizer steps between two checkpoints."""
    keep: PositiveInt | None = None
    """How many of the newest checkpoints stay; the best one stays, too. Unset: 32, and 2 in full
    training, whose checkpoints take 12 bytes a parameter."""
    before_minutes: NonNegativeFloat = 5.0
    """Save and stop this long before the time limit of the Slurm job that the run is in."""


@dataclass(frozen=True)
class ResumeOptions:
    """Resuming a run folder."""

    allow_changes: list[str] = field(default_factory=list)
    """Recipe keys or sections that may differ from those the run began with, such as optim.epochs
    or data."""


@dataclass(frozen=True)
class DistributedOptions:
    """The process group."""

    timeout_minutes: PositiveFloat = 10.0
    """A collective that waits longer ends the run."""


@dataclass(frozen=True)
class Recipe:
    """Everything that a user can ask of a run."""

    output_dir: PathText = "runs/demo"
    """The run folder."""
    seed: Seed = 42
    """Seed of the order of the rows, of the dropout and of the fresh adapter."""
    method: Literal["lora", "full"] = "lora"
    """Train an adapter, or all parameters."""
    deepspeed: PathText | None = None
    """Path of a DeepSpeed JSON. Unset: ZeRO-2."""
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
