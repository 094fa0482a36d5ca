"""Bytes that autograd saves in the forward pass for the backward pass, tensor by tensor.

Each line of the functions below is one saved tensor, in the order in which the model's code runs.
A storage that is used twice counts once; parameters do not count. Checked against what
torch.autograd.graph.saved_tensors_hooks sees (test_saved_tensors_are_predicted).

Symbols: B rows, T tokens of a row, N = B T, D hidden, I inner width of the MLP, H heads, r LoRA
rank, b bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ds.disk.weights import TORCH_DTYPES
from qwen_ds.model.family import Family, Role
from qwen_ds.plan.shape import Shape
from qwen_ds.recipe.options import Recipe

FP32 = 4


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows padded to one length, and the target tokens of them all."""

    rows: int
    length: int
    targets: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Saving:
    """The parts of a recipe that decide which tensors are saved."""

    b: int
    full: bool
    whole_embedding: bool
    whole_head: bool
    rows: bool  # whether token rows of embedding and head are trained
    r: int
    targets: frozenset[str]
    """Linear maps with LoRA, by their names below the block; empty in full training."""
    dropout: bool
    eager: bool
    on_gpu: bool

    @classmethod
    def of(cls, recipe: Recipe, *, on_gpu: bool, family: Family) -> Saving:
        """Take it from a recipe in which only activation checkpointing may still be "auto"."""
        full, lora = recipe.method == "full", recipe.lora
        assert full or lora.special_rows != "auto", "plan/resolve.py decides about token rows"
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

    @property
    def adapter(self) -> bool:
        """Whether nothing but matrices of low rank and token rows is trained."""
        return not (self.full or self.whole_embedding or self.whole_head)

    def whole_parameters(self, shape: Shape) -> int:
        """Parameters of embedding and head that LoRA trains whole."""
        return 0 if self.full else shape.head * (self.whole_embedding + self.whole_head)

    def trained_parameters(self, shape: Shape) -> int:
        """Number of parameters that the recipe trains."""
        if self.full:
            return shape.parameters
        rows = 2 * len(shape.family.stop_tokens) * shape.hidden if self.rows else 0  # of both ends
        return shape.lora_parameters(self.r, self.targets) + rows + self.whole_parameters(shape)

    def trains(self, shape: Shape, *roles: Role) -> bool:
        """Whether any of these linear maps is trained, whole or through LoRA."""
        return self.full or not self.targets.isdisjoint(each.name for each in shape.of_role(*roles))


def blocks_bytes(shape: Shape, how: Saving, batch: MicroBatch, every: int) -> int:
    """Bytes of all blocks, the rotary tables and the last norm, for one micro-batch, if every n-th
    block (1: all, 0: none) is recomputed and saves only its input."""
    total = 2 * batch.length * (shape.hidden // shape.heads // 2) * FP32  # cos and sin, [1, T, W/2]
    total += batch.length**2 if every and how.eager else 0  # the mask, an input of the block
    total += batch.tokens * 8 if how.embedding else 0  # int64 ids, for the embedding's gradient
    total += batch.tokens if how.rows else 0  # a bool each: which of them are trained rows
    for layer in range(shape.layers):
        if every and layer % every == 0:
            total += batch.tokens * shape.hidden * how.b
        else:
            total += block_bytes(shape, how, batch, first=layer == 0)
    return total + _norm(shape, how, batch.tokens)


def block_bytes(shape: Shape, how: Saving, batch: MicroBatch, *, first: bool) -> int:
    """Bytes of one block that is not recomputed. The first one's input needs no gradient unless the
    embedding is trained."""
    n, i, b = batch.tokens, shape.inner, how.b
    flows = not first or how.embedding
    total = _norm(shape, how, n) if flows else 0
    total += _inputs(shape, how, n, ("qkv",), flows, kept=False)
    flows = flows or how.trains(shape, "qkv")
    if flows:
        total += _attention(shape, how, batch)
    # The output projection reads SDPA's result without a copy, and attention has saved that.
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
    """RMSNorm: its input (torch's CPU path keeps the fp32 copy) and 1 / rms in fp32; with a trained
    weight also the normalised input, from which the weight's gradient follows."""
    total = n * shape.hidden * (how.b if how.on_gpu else FP32) + n * FP32
    return total + (n * shape.hidden * how.b if how.full else 0)


def _attention(shape: Shape, how: Saving, batch: MicroBatch) -> int:
    """q, k and v (3 D), and what the kernel adds.

    They are views of the fused projection's result, in whose memory q and k are rotated. SDPA (Dao
    et al. 2022, algorithm 1) adds its result (D) and one log-sum-exp for each query and head. Eager
    saves copies of q, k and v (with one row it makes none, and the views stay), the softmax in fp32
    and rounded, and the inverted mask.
    """
    n, d, h, b = batch.tokens, shape.hidden, shape.heads, how.b
    if not how.eager:
        return n * (3 * d + d) * b + n * h * FP32
    scores = batch.rows * h * batch.length**2
    return 3 * n * d * b + scores * (FP32 + (b if b != FP32 else 0)) + batch.length**2


def _inputs(
    shape: Shape, how: Saving, n: int, roles: tuple[Role, ...], flows: bool, *, kept: bool
) -> int:
    """Bytes that linear maps save: the input x that they share, and their LoRA branches; `flows` if
    x needs a gradient, `kept` if another operation has saved x already."""
    linears = shape.of_role(*roles)
    x = n * linears[0].width_in * how.b
    if how.full:
        return 0 if kept else x
    trained = [linear for linear in linears if linear.name in how.targets]
    total = x if trained and not how.dropout and not kept else 0
    if trained and how.dropout:  # all branches share a dropped-out x and a mask, one byte a number
        total += x + (n * linears[0].width_in if flows else 0)
    for linear in trained:
        total += n * how.r * how.b  # between A and B
        if how.b != FP32:  # casts of B, and of A where x needs a gradient, to the dtype of x
            total += how.r * (linear.width_out + (linear.width_in if flows else 0)) * how.b
    return total


def head_bytes(shape: Shape, how: Saving, batch: MicroBatch) -> int:
    """Bytes of the loss head: the gradient of the gathered hidden states, computed in the forward
    pass, and the targets' int64 places; for a trained head its fp32 gradient."""
    states = batch.targets * shape.hidden * how.b
    head = shape.head * FP32 if how.whole_head else 0
    return states + 8 * batch.targets + head


def recomputed_blocks(layers: int, every: int) -> int:
    """Number of blocks whose forward pass runs twice."""
    return -(-layers // every) if every else 0
