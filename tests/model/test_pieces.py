"""The pieces between the products: every filling gives the formula's numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen_ds.model import pieces
from qwen_ds.model.configuration import QWenConfig

TINY = QWenConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_channels=16,
    intermediate_size=88,
)  # fmt: skip


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def rotation(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of two rows, cosines and sines that differ from token to token."""
    angles = normal(1, 5, 1, 1, 4, dtype=torch.float32)
    return normal(2, 5, 3, 2, 8, dtype=dtype), angles.cos(), angles.sin()


def in_place(qkv: Tensor, cos: Tensor, sin: Tensor) -> pieces.QKV:
    """The eager filling, on memory of its own."""
    return pieces.EAGER.rotated(qkv * 1.0, cos, sin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_parts", [False, True])  # as on a CPU, and as on a GPU
def test_rotating_in_place_gives_the_formulas_numbers_and_gradients(
    dtype: torch.dtype, by_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_parts:
        monkeypatch.setattr(pieces, "turn", pieces.turn_by_parts)
    found: list[list[Tensor]] = []
    for rotate in (pieces.rotated, in_place):
        qkv, cos, sin = rotation(dtype)
        out = rotate(qkv.requires_grad_(), cos, sin)
        loss = sum(
            (normal(*part.shape, dtype=dtype) * part).sum() * i for i, part in enumerate(out, 1)
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        assert qkv.grad is not None
        found.append([*out, qkv.grad])
    # A step of bf16 apart at most, where fused products round fp32 differently.
    bound = {"rtol": 2**-7, "atol": 1e-5} if by_parts else {"rtol": 0, "atol": 0}
    for ours, formula in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, formula, **bound)


def test_the_rotations_gradient_is_its_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where the formula's own float32 would be too coarse for differences."""
    monkeypatch.setattr(pieces, "turn", pieces.turn_by_parts)
    qkv, cos, sin = rotation(torch.float64)
    assert torch.autograd.gradcheck(in_place, (qkv.requires_grad_(), cos.double(), sin.double()))


def test_the_fused_projection_keeps_its_values_where_no_gradient_is_recorded() -> None:
    qkv, cos, sin = rotation()
    before = qkv.clone()
    q, _, v = pieces.EAGER.rotated(qkv, cos, sin)
    assert torch.equal(qkv, before) and torch.equal(v, qkv[:, :, 2]) and not torch.equal(q, v)
