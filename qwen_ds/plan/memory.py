"""Peak memory of one rank by part: arithmetic over the model's shape, the recipe and the JSON.

Nothing here is fitted to a measurement. Checked against the official table of Qwen-7B
(test_official_memory_is_predicted) and the tensors that autograd saves (plan/activations.py).

Symbols: N tokens of a micro-batch, D hidden, I inner width of the MLP, V vocabulary, b bytes of a
number.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from qwen_ds.plan import activations
from qwen_ds.plan.activations import FP32, MicroBatch, Saving
from qwen_ds.plan.shape import Shape
from qwen_ds.plan.traffic import Zero

# The CUDA context with the kernels in use. Since CUDA 11.7, which loads kernels lazily, a bare
# context takes 0.3 GB (PyTorch issue 107667); with cuBLAS and attention kernels about 0.5 GB.
CUDA_CONTEXT = 0.5e9
# 32 channels with two neighbours each, NCCL_BUFFSIZE = 4 MiB (NCCL's documented defaults).
NCCL_BUFFERS = 32 * 2 * 4 * 2**20
MOMENTS = 2  # of AdamW
# Temporaries of torch's foreach AdamW, in copies of the trained parameters: the root of the second
# moment; torch 2.0 also kept that root plus epsilon.
TEMPORARIES, TEMPORARIES_TORCH_2_0 = 1, 2
# fp32 logits of one chunk of the loss head at most: 384 tokens of the 151,936-row vocabulary.
CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes at the peak; their sum is the peak."""

    weights: float
    adapter_and_optimizer: float
    """LoRA's parameters, fp32 masters and AdamW's moments; also AdamW's temporaries, where its step
    is the peak."""
    gradients: float
    activations: float
    """Saved tensors; where backward is the peak, also those of the block being recomputed, and its
    temporaries."""
    loss_head: float
    zero_buffers: float
    context: float

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))


def chunk_tokens(vocab_rows: int) -> int:
    """Tokens whose fp32 logits fill CHUNK_BYTES: what train/loss.py takes at once.

    A multiple of 128, at least that: the tile of a GPU's matrix products, which compute a smaller
    rest at the price of a whole tile.
    """
    return max(1, CHUNK_BYTES // (4 * vocab_rows) // 128) * 128


def peak_memory(shape: Shape, how: Saving, zero: Zero, batch: MicroBatch, every: int) -> Memory:
    """The peak of a training step of this code base on one rank, if `batch` is its largest
    micro-batch and every n-th block is recomputed (1: all, 0: none)."""
    trained = how.trained_parameters(shape)
    # LoRA's parameters are fp32 (under DeepSpeed's fp16 section they are fp16, and still counted as
    # fp32). In full training they are the weights themselves, in the weights' dtype.
    frozen_or_full = shape.parameters - how.whole_parameters(shape)
    weights = 0.0 if zero.offload_parameters else how.b * frozen_or_full * zero.share(3)
    optimizer = 0.0 if how.full else FP32 * trained * zero.share(3)
    if not zero.offload_optimizer:
        masters = zero.stage > 0  # DeepSpeed clones its share of them even where they are fp32
        optimizer += FP32 * trained * zero.share(1) * (MOMENTS + masters)
    # Gradients: whole below ZeRO-2; under ZeRO-1 a rank also holds its averaged share.
    accumulated = zero.share(2) + (zero.share(1) if zero.stage == 1 else 0)
    temporaries = 0.0 if zero.offload_optimizer else TEMPORARIES * FP32 * trained * zero.share(1)
    saved = activations.blocks_bytes(shape, how, batch, every)
    saved_head = activations.head_bytes(shape, how, batch)
    at_loss = _head_working_set(shape, how, batch)
    at_backward = _block_working_set(shape, how, batch, every)
    context = CUDA_CONTEXT + (NCCL_BUFFERS if zero.world > 1 else 0)
    base = Memory(
        weights=weights,
        adapter_and_optimizer=optimizer,
        gradients=FP32 * trained * accumulated,
        activations=saved,
        loss_head=saved_head,
        zero_buffers=_zero_buffers(shape, how, zero, trained),
        context=context if how.on_gpu else 0.0,
    )
    if temporaries > saved + saved_head + max(at_loss, at_backward):
        peak = optimizer + temporaries
        return replace(base, adapter_and_optimizer=peak, activations=0.0, loss_head=0.0)
    if at_loss > at_backward:
        return replace(base, loss_head=saved_head + at_loss)
    return replace(base, activations=saved + at_backward)


def _head_working_set(shape: Shape, how: Saving, batch: MicroBatch) -> float:
    """One chunk's logits in the head's dtype and in fp32, and the gathered hidden states."""
    chunk = min(chunk_tokens(shape.vocab), batch.targets) * shape.vocab
    logits = chunk * (FP32 + (how.b if how.b != FP32 else 0))
    copy = shape.head * how.b if how.whole_head and not how.full else 0
    return logits + batch.targets * shape.hidden * how.b + copy


def _block_working_set(shape: Shape, how: Saving, batch: MicroBatch, every: int) -> float:
    """Working set of the backward pass through one block: what its recomputation saves, and the
    larger of the MLP's gradients (w1, w2 and their product, with two of the residual stream) and
    the rotation of q and k in fp32 (three tensors of 2 D)."""
    n = batch.tokens
    again = activations.block_bytes(shape, how, batch, first=False) if every else 0
    mlp, rotation = (3 * shape.inner + 2 * shape.hidden) * how.b, 3 * 2 * shape.hidden * FP32
    return again + n * max(mlp, rotation)


def _zero_buffers(shape: Shape, how: Saving, zero: Zero, trained: int) -> float:
    """Gradient buckets (two of the full size where DeepSpeed overlaps communication; on a CPU the
    untouched pages of a bucket cost nothing), the parameters that ZeRO-3 has gathered, bounded by
    stage3_max_live_parameters, and hpZ's second copy."""
    if zero.stage == 0:
        return 0.0
    bucket = zero.reduce_bucket if how.on_gpu else min(zero.reduce_bucket, trained)
    copies = 2 if zero.overlap and zero.stage < 3 else 1
    buckets = FP32 * bucket * copies if zero.contiguous else 0.0
    if zero.stage < 3:
        return buckets
    largest = max(shape.head, *(linear.size for linear in shape.linears))
    gathered = min(shape.parameters, max(zero.live, largest))
    return buckets + how.b * (gathered + (shape.parameters / zero.hpz if zero.hpz > 1 else 0))


def official_memory(shape: Shape, length: int, *, embedding: bool, r: int = 64) -> float:
    """Peak in bytes of the official finetune.py on one GPU without DeepSpeed: one row, padded to
    `length`.

    This is what its code holds with the libraries of its time (torch 2.0, peft 0.5, autocast in
    bf16, AdamW, gradient checkpointing). Always: the base in bf16; adapters, their gradients and
    moments in fp32 (peft 0.5 makes them in torch's default dtype); for a base model (`embedding`)
    copies of wte and lm_head, with gradients and moments, in bf16. On top comes the larger of two
    peaks. At the loss: the inputs of all blocks; the logits of every token in bf16, their shifted
    copy, the fp32 copy that autocast makes for log_softmax, and its result (backward takes as much:
    the result and two gradients in fp32). In AdamW's step: two foreach temporaries as large as all
    trained parameters. A recomputed block is smaller than the logits, 12 V bytes a token.
    """
    adapter = 4.0 * shape.lora_parameters(r, shape.family.target_names)
    copies = 2.0 * 2 * shape.head if embedding else 0.0
    static = 2.0 * shape.parameters + (adapter + copies) * (2 + MOMENTS)
    at_loss = length * (shape.layers * shape.hidden * 2 + shape.vocab * (2 + 2 + 4 + 4))
    return CUDA_CONTEXT + static + max(at_loss, TEMPORARIES_TORCH_2_0 * (adapter + copies))
