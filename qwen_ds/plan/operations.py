"""Bytes that the memory-bound operations of a block read and write for a token, one by one.

Between its large products a block computes little: there its time is that of the bytes. The large
products and attention are left out, since they are bound by arithmetic (seconds.py). Each entry
below says what an operation reads and writes, in numbers of the activations' dtype, b bytes each,
unless FP32 stands there. Eager runs torch's operations one after another; compiled, all that is
between two products is one kernel, which reads its inputs and writes its results once.

Symbols: D hidden, I inner width of the MLP, r LoRA rank, b bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ds.plan.activations import FP32, Saving
from qwen_ds.plan.shape import ROLES_BY_INPUT, Shape


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that a part of a block moves for one token."""

    part: str
    forward: float
    backward: float


def moved(shape: Shape, how: Saving, *, compiled: bool) -> list[Moved]:
    """The memory-bound parts of one block, and the bytes of each for a token."""
    d, i, b = shape.hidden, shape.inner, how.b
    # A trained norm's weight also reads the gradient and the normalised input.
    trained = 2 * 2 * b * d if how.full else 0
    if compiled:
        parts = [
            # Read and written; backward also the input.
            Moved("norms", 2 * 2 * b * d, 2 * 3 * b * d + trained),
            # q and k read and written; backward v's gradient joins them.
            Moved("rotation", 4 * b * d, 6 * b * d),
            # gate and up read, the product written; backward its gradient read, two written.
            Moved("gate", 3 * b * i, 5 * b * i),
            # In the norms' kernels: one more tensor read, and the sum written.
            Moved("sums", 2 * 2 * b * d, 2 * b * d),
        ]
    else:
        # Each half of q and k times cos and times sin into fp32, then the other half is added.
        turn = 2 * (b * d + FP32 * d) + 2 * (FP32 * d + 2 * b * d)
        parts = [
            # Normalised, then times the weight: each reads and writes.
            Moved("norms", 2 * 4 * b * d, 2 * (2 + 3) * b * d + trained),
            Moved("rotation", turn, turn + 6 * b * d),  # backward joins three gradients first
            # silu 2, its product with up 3; backward two products 6, silu's own 3.
            Moved("gate", 5 * b * i, 9 * b * i),
            Moved("sums", 2 * 3 * b * d, 2 * 3 * b * d),
        ]
    return [*parts, *_branches(shape, how)]


def _branches(shape: Shape, how: Saving) -> list[Moved]:
    """The LoRA branches, whose products are too thin for arithmetic to count: x A^T, for all maps
    of one x, then times B^T added in place; backward the gradients of B, A and x, the last added in
    place."""
    b, r, found = how.b, how.r, []
    for roles in ROLES_BY_INPUT:
        trained = [linear for linear in shape.of_role(*roles) if linear.name in how.targets]
        if not trained:
            continue
        x, middle = trained[0].width_in, r * len(trained)
        drop = 2 * b * x + x if how.dropout else 0  # read, written, and a byte of the mask
        forward = b * (x + middle) + sum(b * (r + 2 * linear.width_out) for linear in trained)
        backward = sum(2 * b * (linear.width_out + r) for linear in trained)
        backward += b * (x + middle) + b * (middle + 2 * x)
        names = " and ".join(linear.name for linear in trained)
        found.append(Moved(f"LoRA of {names}", forward + drop, backward + drop))
    return found


def block_bytes_moved(shape: Shape, how: Saving, *, compiled: bool, again: float) -> float:
    """Bytes that one block moves for a token; `again` is the share of the blocks that run forward a
    second time."""
    parts = moved(shape, how, compiled=compiled)
    return sum(part.forward * (1 + again) + part.backward for part in parts)
