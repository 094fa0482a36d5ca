"""Linear maps with their LoRA branches as one function: its numbers, its gradients, its casts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from qwen_ds.train import lora_product
from qwen_ds.train.lora_product import Cast, LoraMap, lora_formula, lora_products

WIDTHS = (5, 4)  # of the results


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def products(x: Tensor, maps: Sequence[LoraMap], scale: float, p: float) -> tuple[Tensor, ...]:
    casts = [(m.a_RI.detach().to(x.dtype), m.b_OR.detach().to(x.dtype)) for m in maps]
    a_SI = torch.cat([a for a, _ in casts])
    return lora_products(x, maps, (a_SI, [b for _, b in casts]), scale, p)


def arguments(dtype: torch.dtype, bias: bool, count: int) -> tuple[Tensor, list[LoraMap]]:
    maps = []
    master = torch.float64 if dtype == torch.float64 else torch.float32
    for width in WIDTHS[:count]:
        base = nn.Linear(6, width, bias=bias).to(dtype).requires_grad_(False)
        for i, parameter in enumerate(base.parameters()):
            parameter.copy_(normal(*parameter.shape) + i)
        a = (normal(3, 6, dtype=master) + width).requires_grad_()
        maps.append(LoraMap(base, a, normal(width, 3, dtype=master).requires_grad_()))
    return normal(2, 7, 6, dtype=dtype).requires_grad_(), maps


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_its_gradients_are_its_derivatives(bias: bool, p: float, count: int) -> None:
    x, maps = arguments(torch.float64, bias, count)

    def seeded(x: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(4)  # the same elements are dropped every time
        pairs = zip(maps, matrices[::2], matrices[1::2], strict=True)
        return products(x, [LoraMap(m.base, a, b) for m, a, b in pairs], 1.7, p)

    assert torch.autograd.gradcheck(seeded, (x, *(t for m in maps for t in m[1:])))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_it_computes_what_the_formula_does(p: float, count: int) -> None:
    """In bf16, with the same elements dropped; gradients of A and B come in fp32."""
    found = []
    for function in (lora_formula, products):
        x, maps = arguments(torch.bfloat16, True, count)
        torch.manual_seed(4)
        outs = function(x, maps, 0.5, p)
        torch.autograd.backward(outs, [normal(*y.shape, dtype=torch.bfloat16) for y in outs])
        assert all(m.a_RI.grad.dtype == torch.float32 for m in maps if m.a_RI.grad is not None)
        assert all(m.base.weight.grad is None for m in maps)
        found.append([*outs, x.grad, *(t.grad for m in maps for t in m[1:])])
    for ours, formula in zip(*reversed(found), strict=True):
        assert ours is not None and formula is not None
        assert (ours - formula).norm() < 0.01 * formula.norm()


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_maps_of_one_input_are_what_each_is_alone(p: float) -> None:
    """With the same elements dropped: each draws first after the same seed."""
    x, maps = arguments(torch.float64, False, 2)
    torch.manual_seed(4)
    together = products(x, maps, 0.5, p)
    for one, found in zip(maps, together, strict=True):
        torch.manual_seed(4)
        (alone,) = products(x, [one], 0.5, p)
        torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("count", [1, 2])
def test_what_needs_no_gradient_saves_no_more_than_it_must(count: int) -> None:
    """The first block's input: neither the bases' weights nor A are needed in the backward pass."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x, maps = arguments(torch.bfloat16, False, count)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        products(x.detach(), maps, 1.0, 0.0)
    of_b = [(width, 3) for width in WIDTHS[:count]]
    assert [tuple(t.shape) for t in saved] == [(14, 6), (14, 3 * count), *of_b]


def test_a_cast_is_made_once_until_its_parameter_may_have_changed() -> None:
    weight = nn.Parameter(torch.ones(3))
    cast = Cast()
    first = cast.of([weight], torch.bfloat16)
    assert first.dtype == torch.bfloat16 and not first.requires_grad
    assert cast.of([weight], torch.bfloat16) is first
    with torch.no_grad():
        weight.add_(1)
    assert cast.of([weight], torch.bfloat16).tolist() == [2, 2, 2]
    # DeepSpeed writes the weights after the step of the optimizer, by a way that nobody counts.
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    optimizer.step()
    weight.data.fill_(5)
    assert cast.of([weight], torch.bfloat16).tolist() == [5, 5, 5]
    weight.data.fill_(6)
    lora_product.values_changed()  # as after a state was restored
    assert cast.of([weight], torch.bfloat16).tolist() == [6, 6, 6]
    assert cast.of([weight], torch.float32).data_ptr() == weight.data_ptr()


def test_casts_of_several_lie_below_each_other() -> None:
    first, second = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.zeros(1, 3))
    cast = Cast()
    both = cast.of([first, second], torch.bfloat16)
    assert both.tolist() == [[1] * 3, [1] * 3, [0] * 3] and both.dtype == torch.bfloat16
    assert cast.of([first, second], torch.bfloat16) is both
    with torch.no_grad():
        second.add_(2)
    assert cast.of([first, second], torch.bfloat16)[-1].tolist() == [2] * 3
    assert cast.of([first], torch.bfloat16).shape == (2, 3)  # of others it is another
    assert cast.of([first, second], torch.float32).shape == (3, 3)
