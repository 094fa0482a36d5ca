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
# Temporaries of foreach AdamW in torch 2.0, in copies of the trained parameters: the root of the
# second moment, and that root plus epsilon. The fused kernel of today has none.
TEMPORARIES_TORCH_2_0 = 2
# DeepSpeed's ZeRO-3 takes the norm of each piece of the gradient over a copy in double precision.
# Below it the norm is ours, without a copy (train/engine/engine.py).
FP64 = 8
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
    micro-batch and every n-th block is recomputed (1: all, 0: none).

    The peak is the largest of four moments: the loss with the logits of a chunk, the gradient of
    the head, the backward pass through a block, and the update.
    """
    trained = how.trained_parameters(shape)
    # LoRA's parameters are fp32 (under DeepSpeed's fp16 section they are fp16, and still counted as
    # fp32). In full training they are the weights themselves, in the weights' dtype.
    frozen_or_full = shape.parameters - how.whole_parameters(shape)
    weights = 0.0 if zero.offload_parameters else how.b * frozen_or_full * zero.share(3)
    optimizer = 0.0 if how.full else FP32 * trained * zero.share(3)
    if not zero.offload_optimizer:
        masters = zero.stage > 0  # DeepSpeed clones its share of them even where they are fp32
        optimizer += FP32 * trained * zero.share(1) * (MOMENTS + masters)
    saved = activations.blocks_bytes(shape, how, batch, every)
    states = activations.head_bytes(shape, how, batch)
    matrix = FP32 * shape.head if how.whole_head else 0  # in `states` until the head's backward
    context = CUDA_CONTEXT + (NCCL_BUFFERS if zero.world > 1 else 0)
    base = Memory(
        weights=weights,
        adapter_and_optimizer=optimizer,
        gradients=_gradients(shape, how, zero),
        activations=saved,
        loss_head=states,
        zero_buffers=_zero_buffers(shape, how, zero, trained),
        context=context if how.on_gpu else 0.0,
    )
    at_update = optimizer + _update_working_set(shape, how, zero)
    in_block = saved + _block_working_set(shape, how, batch, every)
    moments = (
        replace(base, loss_head=states + _loss_working_set(shape, how, batch)),
        replace(base, loss_head=states + _head_working_set(shape, how, zero)),
        replace(base, activations=in_block, loss_head=states - matrix),
        replace(base, adapter_and_optimizer=at_update, activations=0.0, loss_head=0.0),
    )
    return max(moments, key=lambda moment: moment.total)


def _gradients(shape: Shape, how: Saving, zero: Zero) -> float:
    """Gradients that a rank keeps from one micro-batch to the next, in fp32: whole below ZeRO-2 and
    those of an adapter, of which ZeRO also holds its averaged share; none where the optimizer is
    offloaded."""
    if zero.offload_optimizer:
        return 0.0
    trained = how.trained_parameters(shape)
    if zero.sums_locally(how):
        return FP32 * trained * (1 + 1 / zero.world)
    if zero.stage == 2 and not how.full:
        return FP32 * _held(shape, how, zero.world)
    return FP32 * trained * (zero.share(2) + (zero.share(1) if zero.stage == 1 else 0))


def _held(shape: Shape, how: Saving, world: int) -> float:
    """Numbers of the gradient that the rank with the most keeps under ZeRO-2 where the trained
    parameters are fp32: DeepSpeed keeps a matrix whole on each rank that updates a part of it
    (stage_1_and_2.py, copy_grads_in_partition). In full training it keeps the part alone."""
    whole = shape.head if how.whole_embedding else 0, shape.head if how.whole_head else 0
    trained = how.trained_parameters(shape)
    ends = trained - whole[1], trained  # of the adapters, then of the head; the embedding is first
    share, most = trained / world, 0.0
    for rank in range(world):
        first, last = rank * share, (rank + 1) * share
        held = max(0.0, min(last, ends[0]) - max(first, whole[0]))
        held += whole[0] if first < whole[0] else 0
        held += whole[1] if last > ends[0] + 1 else 0  # 1: rounding
        most = max(most, held)
    return most


def _loss_working_set(shape: Shape, how: Saving, batch: MicroBatch) -> float:
    """One chunk's logits in the head's dtype and in fp32, and the gathered hidden states; for a
    trained head also the chunk's part of its gradient, which on a CPU is cast before it is added,
    and the head in the dtype of the activations."""
    chunk = min(chunk_tokens(shape.vocab), batch.targets) * shape.vocab
    logits = chunk * (FP32 + (how.b if how.b != FP32 else 0))
    total = logits + batch.targets * shape.hidden * how.b
    if how.whole_head:
        cast = FP32 if not how.on_gpu and how.b != FP32 else 0
        copy = how.b if not how.full and how.b != FP32 else 0
        total += shape.head * (how.b + cast + copy)
    return total


def _head_working_set(shape: Shape, how: Saving, zero: Zero) -> float:
    """The gradient of a trained head beside the one that the forward pass has saved: times the
    loss's, in fp32 and in the head's dtype; or, once the saved one is gone, the averaging of it."""
    if not how.whole_head:
        return 0.0
    scaled = FP32 + (how.b if how.full and how.b != FP32 else 0)
    if zero.stage < 2:
        return float(shape.head * scaled)
    if how.full or zero.stage == 3:  # ZeRO-3 joins the pieces before it sends them
        averaged = how.b + FP32 * (2 if zero.stage == 3 else 1) - FP32
        return float(shape.head * max(scaled, averaged))
    return max(float(shape.head * scaled), FP32 * _held(shape, how, zero.world))


def _update_working_set(shape: Shape, how: Saving, zero: Zero) -> float:
    """The gradient joined to one piece, where the trained parameters are fp32; or under ZeRO-3 a
    piece of it in double precision, for its norm."""
    if zero.stage == 0 or zero.offload_optimizer:
        return 0.0
    joined = 0.0 if how.full else FP32 * how.trained_parameters(shape) / zero.world
    if zero.stage < 3:
        return joined
    widest = shape.head if how.whole_head or how.whole_embedding else 0
    return max(FP64 * widest / zero.world, joined)


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
    untouched pages of a bucket cost nothing); a trained matrix in fp32, in which it is averaged, on
    a stream whose memory no other can use; the parameters that ZeRO-3 has gathered, bounded by
    stage3_max_live_parameters; and hpZ's second copy."""
    if zero.stage == 0:
        return 0.0
    bucket = zero.reduce_bucket if how.on_gpu else min(zero.reduce_bucket, trained)
    copies = 2 if zero.overlap and zero.stage < 3 else 1
    of_bucket = how.b if how.full and zero.stage == 2 else FP32
    buffers = float(of_bucket * bucket * copies) if zero.contiguous else 0.0
    if how.full and how.on_gpu and zero.overlap and zero.world > 1:
        buffers += FP32 * shape.head * (2 if zero.stage == 3 else 1)
    if zero.stage < 3:
        return buffers
    if how.full:  # the gradients of a block, until it is done
        buffers += how.b * shape.block
    largest = max(shape.head, shape.block)
    gathered = min(shape.parameters, max(zero.live, largest))
    second = how.b * shape.parameters / zero.hpz if zero.hpz > 1 else 0
    in_fp32 = min(how.whole_parameters(shape), gathered)
    return buffers + how.b * gathered + (FP32 - how.b) * in_fp32 + second


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
