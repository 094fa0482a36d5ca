"""liger-kernel's filling of the pieces; tests/model/fake_liger.py stands in for its functions."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from qwen_ds.errors import UserError
from qwen_ds.model import liger, pieces
from qwen_ds.model.modeling import QWenLMHeadModel
from tests.model import fake_liger

Found = dict[str, Tensor]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> pieces.Pieces:
    fake_liger.install(monkeypatch)
    return liger.liger_pieces()


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def passed(filling: pieces.Pieces, dtype: torch.dtype) -> tuple[Found, Found]:
    """Results and gradients of norm and gate; and the gradients that were given to them."""
    x, weight = normal(2, 5, 32, dtype=dtype), normal(32, dtype=dtype, seed=1)
    up, gate = normal(2, 5, 44, dtype=dtype, seed=2), normal(2, 5, 44, dtype=dtype, seed=3)
    given = {"norm": normal(2, 5, 32, dtype=dtype, seed=4), "gated": normal(2, 5, 44, dtype=dtype)}
    leaves = {"x": x, "weight": weight, "up": up, "gate": gate}
    for leaf in leaves.values():
        leaf.requires_grad_()
    # Copies, as the results of linear maps are: the gate may write into them.
    results = {
        "norm": filling.norm(x * 1.0, weight, 1e-6),
        "gated": filling.gated(up * 1.0, gate * 1.0),
    }
    torch.autograd.backward(list(results.values()), list(given.values()))
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert gradients.keys() == leaves.keys()
    return {**{k: v.detach() for k, v in results.items()}, **gradients}, given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_gate_have_the_formulas_numbers_and_gradients(
    made: pieces.Pieces, dtype: torch.dtype
) -> None:
    wanted, given = passed(pieces.EAGER, dtype)
    found, given_to_liger = passed(made, dtype)
    exact = dtype == torch.bfloat16  # one rounding, in the official places
    for name in ("norm", "gated"):
        assert_close(found[name], wanted[name], **({"rtol": 0, "atol": 0} if exact else {}))
        # A gradient belongs to whoever passes it.
        assert torch.equal(given_to_liger[name], given[name])
    # The formulas round each product of the backward pass, liger-kernel the last one.
    bound = {"rtol": 2**-6, "atol": 2**-5} if exact else {"rtol": 1e-5, "atol": 1e-5}
    for name in ("x", "weight", "up", "gate"):
        assert_close(found[name], wanted[name], **bound)
    assert made.rotated is pieces.EAGER.rotated
    assert "norm" in fake_liger.calls and "gate" in fake_liger.calls


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("file", ["loss_within", "loss_beyond"])
def test_losses_and_gradients_are_official(
    small_dir: Path, golden: Path, made: pieces.Pieces, file: str, recompute: bool
) -> None:
    """golden/train, within the bounds of tests/model/test_golden_training.py, recomputed or not."""
    model = QWenLMHeadModel.from_pretrained(small_dir).train()
    pieces.fill(model, made)
    if recompute:
        model.activation_checkpointing_enable()
    data = load_file(golden / f"train/{file}.safetensors")
    loss = model(data["input_ids"], data["attention_mask"], labels=data["labels"]).loss
    assert_close(loss, data["loss_train"], atol=5e-6, rtol=0.0)
    loss.backward()
    names = [name for name in data if name.startswith("grad.")]
    for name in names:
        gradient = model.get_parameter(name.removeprefix("grad.")).grad
        bound = 2e-5 * data[name].abs().max().item()
        assert_close({name: gradient}, {name: data[name]}, atol=bound, rtol=0.0)
    layers = len(model.transformer.h)
    forward = 2 if recompute else 1
    assert names and fake_liger.calls.count("gate") == forward * layers
    assert fake_liger.calls.count("norm weight's gradient") == 2 * layers + 1


def test_a_frozen_norm_gets_no_gradient_and_a_gathered_weight_may_go_between_the_passes(
    made: pieces.Pieces,
) -> None:
    """ZeRO-3 takes a weight's memory after the forward pass and brings it back for the backward."""
    weight = torch.nn.Parameter(normal(32), requires_grad=False)
    gathered, x = weight.data, normal(2, 5, 32).requires_grad_()
    result = made.norm(x, weight, 1e-6)
    weight.data = torch.empty(0)
    with torch.no_grad():
        weight.data = gathered.clone()
    result.sum().backward()
    wanted = normal(2, 5, 32).requires_grad_()
    pieces.norm(wanted, weight, 1e-6).sum().backward()
    assert x.grad is not None and wanted.grad is not None
    assert_close(x.grad, wanted.grad)
    assert "norm weight's gradient" not in fake_liger.calls


@pytest.mark.parametrize(
    ("packages", "version", "expected"),
    [
        ({"liger_kernel", "triton"}, "0.8.5", "0.8.5"),
        ({"liger_kernel", "triton"}, "0.10.0", "0.10.0"),
        ({"liger_kernel", "triton"}, "0.8.4", None),  # computes a frozen weight's gradient
        ({"liger_kernel"}, "0.8.5", None),
        ({"triton"}, "", None),
    ],
)
def test_liger_kernel_is_found_where_it_can_be_used(
    packages: set[str], version: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda name: name if name in packages else None)
    monkeypatch.setattr(metadata, "version", {"liger-kernel": version}.__getitem__)
    assert liger.liger_version() == expected


def test_a_broken_installation_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # importing it raises ImportError
    with pytest.raises(UserError, match=r"^liger-kernel is installed and cannot be imported: .*;"):
        liger.liger_pieces()
