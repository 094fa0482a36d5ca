"""The linear map with its LoRA branch as one function: its numbers, its gradients, its casts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qwen_ds.train import lora_product
from qwen_ds.train.lora_product import Cast, LoraProduct, lora_formula


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def product(x: Tensor, base: nn.Linear, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
    casts = a.detach().to(x.dtype), b.detach().to(x.dtype)
    return LoraProduct.apply(x, base.weight, base.bias, a, b, casts, scale, p)


def arguments(dtype: torch.dtype, bias: bool) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    base = nn.Linear(6, 5, bias=bias).to(dtype).requires_grad_(False)
    for i, parameter in enumerate(base.parameters()):
        parameter.copy_(normal(*parameter.shape) + i)
    x = normal(2, 7, 6, dtype=dtype).requires_grad_()
    master = torch.float64 if dtype == torch.float64 else torch.float32
    return x, base, *(normal(*s, dtype=master).requires_grad_() for s in ((3, 6), (5, 3)))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_its_gradients_are_its_derivatives(bias: bool, p: float) -> None:
    x, base, a, b = arguments(torch.float64, bias)

    def seeded(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(4)  # the same elements are dropped every time
        return product(x, base, a, b, 1.7, p)

    assert torch.autograd.gradcheck(seeded, (x, a, b))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_it_computes_what_the_formula_does(p: float) -> None:
    """In bf16, with the same elements dropped; gradients of A and B come in fp32."""
    found = []
    for function in (lora_formula, product):
        x, base, a, b = arguments(torch.bfloat16, bias=True)
        torch.manual_seed(4)
        out = function(x, base, a, b, 0.5, p)
        out.backward(normal(*out.shape, dtype=torch.bfloat16))
        assert a.grad is not None and a.grad.dtype == torch.float32 and base.weight.grad is None
        found.append([out, x.grad, a.grad, b.grad])
    for ours, formula in zip(*reversed(found), strict=True):
        assert ours is not None and formula is not None
        assert (ours - formula).norm() < 0.01 * formula.norm()


def test_what_needs_no_gradient_saves_no_more_than_it_must() -> None:
    """The first block's input: neither the base's weight nor A is needed in the backward pass."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x, base, a, b = arguments(torch.bfloat16, bias=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        product(x.detach(), base, a, b, 1.0, 0.0)
    assert [tuple(t.shape) for t in saved] == [(14, 6), (14, 3), (5, 3)]


def test_a_cast_is_made_once_until_its_parameter_may_have_changed() -> None:
    weight = nn.Parameter(torch.ones(3))
    cast = Cast()
    first = cast.of(weight, torch.bfloat16)
    assert first.dtype == torch.bfloat16 and not first.requires_grad
    assert cast.of(weight, torch.bfloat16) is first
    with torch.no_grad():
        weight.add_(1)
    assert cast.of(weight, torch.bfloat16).tolist() == [2, 2, 2]
    # DeepSpeed writes the weights after the step of the optimizer, by a way that nobody counts.
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    optimizer.step()
    weight.data.fill_(5)
    assert cast.of(weight, torch.bfloat16).tolist() == [5, 5, 5]
    weight.data.fill_(6)
    lora_product.values_changed()  # as after a state was restored
    assert cast.of(weight, torch.bfloat16).tolist() == [6, 6, 6]
    assert cast.of(weight, torch.float32).data_ptr() == weight.data_ptr()
