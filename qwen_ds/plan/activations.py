"""Bytes that autograd keeps from the forward pass for the backward pass, tensor by tensor.

Each line of the functions below is one saved tensor, in the order in which the model's code runs.
Two uses of one storage count once; parameters do not count. Held against what
torch.autograd.graph.saved_tensors_hooks sees (test_saved_tensors_are_predicted).

Symbols: B rows, T tokens of a row, N = B T, D hidden, I inner width of the MLP, H heads, r LoRA
rank, b bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ds.disk.weights import TORCH_DTYPES
from qwen_ds.model.family import QWEN, Family, Role
from qwen_ds.plan.shape import Shape
from qwen_ds.recipe.options import Recipe

FP32 = 4


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of equal length; targets are those of all rows."""

    rows: int
    length: int
    targets: int

    @property
    def tokens(self) -> int:
        """Padded tokens."""
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Saving:
    """The parts of a recipe that decide which tensors are saved."""

    b: int
    full: bool
    whole_embedding: bool
    whole_head: bool
    """Whether these two are trained whole."""
    rows: bool
    """Whether token rows of both are trained."""
    r: int
    targets: frozenset[str]
    """Names below the block of the linear maps that LoRA is on; none in full training."""
    dropout: bool
    eager: bool
    on_gpu: bool

    @classmethod
    def of(cls, recipe: Recipe, *, on_gpu: bool, family: Family = QWEN) -> Saving:
        """Take it from a recipe without any "auto" but that of activation checkpointing."""
        full, lora = recipe.method == "full", recipe.lora
        assert full or lora.special_rows != "auto", (
            "plan/resolve.py decides about trainable token rows"
        )
        matched = family.matched(lora.targets)
        embedding, head = (full or name in lora.modules_to_save for name in family.ends)
        return cls(
            b=TORCH_DTYPES[recipe.model.dtype].itemsize,
            full=full,
            whole_embedding=embedding,
            whole_head=head,
            rows=not full and lora.special_rows == "on",
            r=lora.r,
            targets=frozenset() if full else frozenset(each.name for each in matched),
            dropout=lora.dropout > 0 and not full,
            eager=recipe.model.attention == "eager",
            on_gpu=on_gpu,
        )

    @property
    def embedding(self) -> bool:
        """Whether the first block's input needs a gradient."""
        return self.rows or self.whole_embedding

    def trains(self, shape: Shape, *roles: Role) -> bool:
        """Whether any of these linear maps is trained, whole or through LoRA."""
        return self.full or not self.targets.isdisjoint(each.name for each in shape.of_role(*roles))


def blocks_bytes(shape: Shape, how: Saving, batch: MicroBatch, every: int) -> int:
    """Bytes of all blocks, the rotary tables and the last norm, for one micro-batch.

    Args:
        every: each every-th block is recomputed (1: all, 0: none) and keeps its input alone.
    """
    total = 2 * batch.length * (shape.hidden // shape.heads // 2) * FP32  # cos and sin, [1, T, W/2]
    total += batch.length**2 if every and how.eager else 0  # the mask, as an input
    total += batch.tokens * 8 if how.embedding else 0  # ids, for the embedding's gradient
    total += batch.tokens if how.rows else 0  # and where they are special
    for layer in range(shape.layers):
        if every and layer % every == 0:
            total += batch.tokens * shape.hidden * how.b
        else:
            total += block_bytes(shape, how, batch, first=layer == 0)
    return total + _norm(shape, how, batch.tokens)


def block_bytes(shape: Shape, how: Saving, batch: MicroBatch, *, first: bool) -> int:
    """Bytes of one block that is not recomputed.

    The first one's input needs no gradient unless the embedding is trained.
    """
    n, i, b = batch.tokens, shape.inner, how.b
    flows = not first or how.embedding
    total = _norm(shape, how, n) if flows else 0
    total += _inputs(shape, how, n, ("qkv",), flows, kept=False)
    flows = flows or how.trains(shape, "qkv")
    if flows:
        total += _attention(shape, how, batch)
    # SDPA's result lies in memory as the output projection reads it, and is saved already.
    total += _inputs(shape, how, n, ("attention_out",), flows, kept=flows and not how.eager)
    flows = flows or how.trains(shape, "attention_out")
    if flows:
        total += _norm(shape, how, n)
    total += _inputs(shape, how, n, ("up", "gate"), flows, kept=False)
    gate, up = flows or how.trains(shape, "gate"), flows or how.trains(shape, "up")
    total += 2 * n * i * b if gate else 0  # gate(x) for silu's derivative, up(x) for the product's
    total += n * i * b if up else 0  # silu(gate(x))
    return total + _inputs(shape, how, n, ("down",), gate or up, kept=False)


def _norm(shape: Shape, how: Saving, n: int) -> int:
    """RMSNorm: its input (torch's CPU path keeps the fp32 copy) and 1 / rms.

    With a trained weight the product's other factor comes on top.
    """
    total = n * shape.hidden * (how.b if how.on_gpu else FP32) + n * FP32
    return total + (n * shape.hidden * how.b if how.full else 0)


def _attention(shape: Shape, how: Saving, batch: MicroBatch) -> int:
    """q and k after the rotation, v, and what the kernel adds.

    SDPA (Dao et al. 2022, algorithm 1): the result and one log-sum-exp a row. v is a view of the
    fused projection's result, which stays whole. Eager: copies of q, k and v (one row needs none
    and keeps what they are views of), the softmax in fp32 and rounded, the inverted mask.
    """
    n, d, h, b = batch.tokens, shape.hidden, shape.heads, how.b
    if not how.eager:
        return n * (2 * d + 3 * d + d) * b + n * h * FP32
    scores = batch.rows * h * batch.length**2
    copies = 3 if batch.rows > 1 else 5
    return copies * n * d * b + scores * (FP32 + (b if b != FP32 else 0)) + batch.length**2


def _inputs(
    shape: Shape, how: Saving, n: int, roles: tuple[Role, ...], flows: bool, *, kept: bool
) -> int:
    """Bytes that linear maps keep of the x which they all read, and of their LoRA branches.

    Args:
        flows: whether x needs a gradient.
        kept: x is saved anyway.
    """
    linears = shape.of_role(*roles)
    x = n * linears[0].width_in * how.b
    if how.full:
        return 0 if kept else x
    trained = [linear for linear in linears if linear.name in how.targets]
    total = x if trained and not how.dropout and not kept else 0
    for linear in trained:
        if how.dropout:  # A's input is a tensor of its own, and its mask a byte each
            total += x + (n * linear.width_in if flows else 0)
        total += n * how.r * how.b  # between A and B
        if how.b != FP32:  # B in the activations' dtype, and A where x needs a gradient
            total += how.r * (linear.width_out + (linear.width_in if flows else 0)) * how.b
    return total


def head_bytes(shape: Shape, how: Saving, batch: MicroBatch) -> int:
    """Bytes of the loss head: the gradient of the gathered hidden states, made on the way forward,
    and a byte a token for which of them are targets; with a trained head its gradient in fp32."""
    states = batch.targets * shape.hidden * how.b
    head = shape.head * FP32 if how.whole_head else 0
    return states + batch.rows * (batch.length - 1) + head


def recomputed_blocks(layers: int, every: int) -> int:
    """How many blocks run forward twice."""
    return -(-layers // every) if every else 0
