"""Plain attention as one operation: its numbers, its derivatives, and who takes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen_ds.model import plain_attention
from qwen_ds.model.attention import eager_attention
from qwen_ds.model.plain_attention import attend


def states(dtype: torch.dtype, width: int = 8) -> list[Tensor]:
    """q, k and v [2, 3, 5, width] as blocks have them: views, heads beside each other."""
    generator = torch.Generator().manual_seed(width)
    qkv = torch.randn(2, 5, 3, 3, width, generator=generator, dtype=torch.float64).to(dtype)
    return [x.transpose(1, 2).requires_grad_() for x in qkv.unbind(2)]


def causal(queries: int = 5) -> Tensor:
    return torch.ones(1, 1, queries, 5, dtype=torch.bool).tril(5 - queries)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def error(came: Tensor, wanted: Tensor) -> float:
    return float((came.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("mask", [causal(), None])
def test_its_gradients_are_its_derivatives(mask: Tensor | None) -> None:
    q, k, v = states(torch.float64)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, mask), (q, k, v))
    torch.testing.assert_close(attend(q, k, v, mask), exact(q, k, v, mask))


def test_rows_may_lie_after_each_other_in_one() -> None:
    q, k, v = states(torch.float64)
    grad = torch.randn_like(q)
    wanted = torch.autograd.grad(exact(q, k, v, causal()), (q, k, v), grad)

    def as_one(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(1, 10, 3, 8).transpose(1, 2)

    def apart(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(2, 5, 3, 8).transpose(1, 2)

    out = apart(attend(as_one(q), as_one(k), as_one(v), causal()))
    torch.testing.assert_close(out, exact(q, k, v, causal()))
    for came, each in zip(torch.autograd.grad(out, (q, k, v), grad), wanted, strict=True):
        torch.testing.assert_close(came, each)


def test_a_new_shape_meets_the_backward_pass_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products are then made before the blocks after it have saved anything."""
    met: list[torch.Size] = []
    monkeypatch.setattr(plain_attention, "_met", set())
    monkeypatch.setattr(plain_attention, "_backward", lambda _, q, *__: met.append(q.shape))
    q, k, v = (x.detach() for x in states(torch.float32))
    attend(q, k, v, causal())
    assert not met, "nothing is trained"
    q.requires_grad_()
    for x in (q, q, q[:1]):
        rows = len(x)
        attend(x, k[:rows], v[:rows], causal())
    assert met == [q.shape, q[:1].shape]


def test_what_a_compiler_is_told_of_it_is_true() -> None:
    q, k, v = states(torch.bfloat16)
    _, probs = torch.ops.qwen_ds.plain_attention(q, k, v, causal(), False)
    args = (q.detach(), q.detach(), k.detach(), v.detach(), probs.detach())
    for operation, given in (
        (torch.ops.qwen_ds.plain_attention, (q, k, v, causal(), True)),
        (torch.ops.qwen_ds.plain_attention_backward, args),
    ):
        found = torch.library.opcheck(operation, given)
        assert "test_faketensor" in found and set(found.values()) == {"SUCCESS"}, found


@pytest.mark.parametrize("width", [64, 128])
def test_it_rounds_no_coarser_than_the_eager_operations(width: int) -> None:
    """In bf16. For the gradients of q and k the probabilities are rounded, too: an eighth more
    where the scale is a power of 2 (width 64); else the scores are rounded once and not twice."""
    grad = states(torch.bfloat16, width)[0].detach()
    found = []
    for function, dtype in (
        (lambda *x: exact(*x, causal()), torch.float64),
        (lambda *x: attend(*x, causal()), torch.bfloat16),
        (lambda *x: eager_attention(*x, causal(), 0.0), torch.bfloat16),
    ):
        x = [each.detach().to(dtype).requires_grad_() for each in states(torch.bfloat16, width)]
        out = function(*x)
        found.append([out.detach(), *torch.autograd.grad(out, x, grad.to(dtype))])
    wanted, came, eager = found
    for i in range(4):
        assert came[i].dtype == torch.bfloat16
        assert error(came[i], wanted[i]) < 1.25 * error(eager[i], wanted[i])


@pytest.mark.parametrize(
    ("mask", "dropout", "takes"),
    [
        (causal(), 0.0, True),
        (None, 0.0, True),
        (causal(), 0.1, False),
        (causal().expand(2, 1, 5, 5), 0.0, False),  # a mask of each row
        (torch.zeros(1, 1, 5, 5), 0.0, False),  # an additive one
        (causal(1), 0.0, False),  # fewer queries than keys
    ],
)
def test_only_a_compiled_block_takes_it(mask: Tensor | None, dropout: float, takes: bool) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x = states(torch.float32)
    assert not plain_attention.is_for(x[0], x[1], mask, dropout)
    torch._dynamo.reset()
    torch.compile(eager_attention, backend=keep, dynamic=True)(*x, mask, dropout)
    assert ("plain_attention" in graphs[0].code) == takes
    torch._dynamo.reset()
