"""Bytes that autograd keeps from the forward pass for the backward pass, tensor by tensor, as the model's code runs.

Each line below is one saved tensor; two uses of one storage count once, parameters do not count. Held against what
torch.autograd.graph.saved_tensors_hooks sees (test_saved_tensors_are_predicted).

Symbols: B rows, T tokens of a row, N = B T, D hidden, I width of w1 and w2, H heads, r LoRA rank, b bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ds.plan.shape import ENDS, Shape, matched
from qwen_ds.recipe.options import Recipe

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
FP32 = 4


@dataclass(frozen=True, slots=True)
class Saving:
    """What of a recipe decides which tensors are saved."""

    b: int
    full: bool
    whole: frozenset[str]
    """Of wte and lm_head, those that are trained whole."""
    rows: bool
    """Whether special rows of both are trained."""
    r: int
    targets: frozenset[str]
    """Of LINEARS; none in full training."""
    dropout: bool
    eager: bool
    on_gpu: bool

    @classmethod
    def of(cls, recipe: Recipe, *, on_gpu: bool) -> Saving:
        full, lora = recipe.method == "full", recipe.lora
        return cls(
            BYTES[recipe.model.dtype], full, frozenset(ENDS if full else lora.modules_to_save),
            not full and lora.special_rows not in ("off", False), lora.r,
            frozenset(() if full else matched(lora.targets)), lora.dropout > 0 and not full,
            recipe.model.attention == "eager", on_gpu,
        )  # fmt: skip

    @property
    def embedding(self) -> bool:
        """Whether the first block's input needs a gradient."""
        return self.rows or "wte" in self.whole

    def trains(self, *names: str) -> bool:
        return self.full or not self.targets.isdisjoint(names)


def blocks_bytes(shape: Shape, how: Saving, rows: int, length: int, every: int) -> int:
    """All blocks, the rotary tables and the last norm, for a micro-batch of rows x length tokens.

    Args:
        every: each every-th block is recomputed (1: all, 0: none) and keeps its input alone.
    """
    total = (
        2 * length * (shape.hidden // shape.heads // 2) * FP32
    )  # cos and sin, [1, T, W / 2] each
    total += length**2 if every and how.eager else 0  # the mask, as an input
    total += rows * length * 8 if how.embedding else 0  # the ids, for the embedding's gradient
    total += rows * length if how.rows else 0  # and where they are special
    for layer in range(shape.layers):
        if every and layer % every == 0:
            total += rows * length * shape.hidden * how.b
        else:
            total += block_bytes(shape, how, rows, length, first=layer == 0)
    return total + _norm(shape, how, rows * length)


def block_bytes(shape: Shape, how: Saving, rows: int, length: int, *, first: bool) -> int:
    """One block that is not recomputed. The first one's input needs no gradient unless the embedding is trained."""
    n, i, b = rows * length, shape.inner, how.b
    flows = not first or how.embedding
    total = _norm(shape, how, n) if flows else 0
    total += _inputs(shape, how, n, ("c_attn",), flows, kept=False)
    flows = flows or how.trains("c_attn")
    if flows:
        total += _attention(shape, how, rows, length)
    # SDPA's result lies in memory as c_proj reads it, and is saved already.
    total += _inputs(shape, how, n, ("attn.c_proj",), flows, kept=flows and not how.eager)
    flows = flows or how.trains("attn.c_proj")
    if flows:
        total += _norm(shape, how, n)
    total += _inputs(shape, how, n, ("w1", "w2"), flows, kept=False)
    gate, up = flows or how.trains("w2"), flows or how.trains("w1")
    total += 2 * n * i * b if gate else 0  # w2(x) for silu's derivative, w1(x) for the product's
    total += n * i * b if up else 0  # silu(w2(x))
    return total + _inputs(shape, how, n, ("mlp.c_proj",), gate or up, kept=False)


def _norm(shape: Shape, how: Saving, n: int) -> int:
    """RMSNorm: its input (torch's CPU path keeps the fp32 copy) and 1 / rms; with a trained weight the product's
    other factor, too."""
    total = n * shape.hidden * (how.b if how.on_gpu else FP32) + n * FP32
    return total + (n * shape.hidden * how.b if how.full else 0)


def _attention(shape: Shape, how: Saving, rows: int, length: int) -> int:
    """q and k after the rotation, v, and what the kernel adds.

    SDPA (Dao et al. 2022, algorithm 1): the result and one log-sum-exp a row. v is a view of c_attn's result, which
    stays whole. Eager: copies of q, k and v (one row needs none and keeps what they are views of), the softmax in fp32
    and rounded, the inverted mask.
    """
    n, d, h, b = rows * length, shape.hidden, shape.heads, how.b
    if not how.eager:
        return n * (2 * d + 3 * d + d) * b + n * h * FP32
    scores = rows * h * length**2
    return (
        (3 if rows > 1 else 5) * n * d * b + scores * (FP32 + (b if b != FP32 else 0)) + length**2
    )


def _inputs(
    shape: Shape, how: Saving, n: int, names: tuple[str, ...], flows: bool, *, kept: bool
) -> int:
    """Linear maps that read the same x: what they keep of it, and their LoRA branches.

    Args:
        flows: whether x needs a gradient.
        kept: x is saved anyway.
    """
    x = n * shape.linear(names[0])[0] * how.b
    if how.full:
        return 0 if kept else x
    trained = [name for name in names if name in how.targets]
    total = x if trained and not how.dropout and not kept else 0
    for name in trained:
        n_in, n_out = shape.linear(name)
        if how.dropout:  # A's input is a tensor of its own, and its mask a byte each
            total += x + (n * n_in if flows else 0)
        total += n * how.r * how.b  # between A and B
        if how.b != FP32:  # B in the activations' dtype, and A where x needs a gradient
            total += how.r * (n_out + (n_in if flows else 0)) * how.b
    return total


def head_bytes(shape: Shape, how: Saving, rows: int, length: int, targets: int) -> int:
    """The loss head: the gradient of the gathered hidden states, made on the way forward, and a byte a token for which
    of them are learnt; with a trained head its gradient in fp32."""
    return (
        targets * shape.hidden * how.b
        + rows * (length - 1)
        + (shape.head * FP32 if "lm_head" in how.whole else 0)
    )


def recomputed_blocks(layers: int, every: int) -> int:
    """How many blocks run forward twice."""
    return -(-layers // every) if every else 0
