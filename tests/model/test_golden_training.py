"""Losses and gradients against the official code's: golden/train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import qwen_ds

LOSS = {"atol": 5e-6, "rtol": 0.0}


@pytest.fixture
def model(small_dir: Path) -> qwen_ds.QWenLMHeadModel:
    return AutoModelForCausalLM.from_pretrained(small_dir).train()


def assert_official_gradients(model: torch.nn.Module, data: dict[str, torch.Tensor]) -> None:
    names = [name for name in data if name.startswith("grad.")]
    assert names
    for name in names:
        expected = data[name]
        found = model.get_parameter(name.removeprefix("grad.")).grad
        tolerance = 2e-5 * expected.abs().max().item()
        assert_close({name: found}, {name: expected}, atol=tolerance, rtol=0.0)


@pytest.mark.parametrize("file", ["loss_within", "loss_beyond"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [True, False])
def test_losses_and_gradients_are_official(
    model, golden: Path, file: str, implementation: str, masked: bool
) -> None:
    model.config._attn_implementation = implementation
    data = load_file(golden / f"train/{file}.safetensors")
    mask = data["attention_mask"] if masked else None
    out = model(data["input_ids"], attention_mask=mask, labels=data["labels"])
    assert_close(out.loss, data["loss_train" if masked else "loss_train_nomask"], **LOSS)
    out.loss.backward()
    assert_official_gradients(model, data)
    logits = out.logits[:, :-1].detach().transpose(1, 2)
    per_token = torch.nn.functional.cross_entropy(logits, data["labels"][:, 1:], reduction="none")
    assert_close(per_token, data["token_loss_train"], atol=3e-5, rtol=0.0)
    with torch.no_grad():
        assert model(data["input_ids"], labels=torch.full_like(data["labels"], -100)).loss.isnan()
        model.eval()
        # Alpha comes from the rows' lengths, so beyond seq_length evaluation needs the mask.
        known = {"attention_mask": data["attention_mask"], "labels": data["labels"]}
        assert_close(model(data["input_ids"], **known).loss, data["loss_eval"], **LOSS)


def test_evaluation_can_use_the_training_formula(model, golden: Path) -> None:
    """Neither NTK nor LogN, though dropout is off: the loss of golden train mode, in eval mode."""
    data = load_file(golden / "train/loss_beyond.safetensors")
    model.eval()
    with torch.no_grad():
        loss = model(data["input_ids"], labels=data["labels"], extend_context=False).loss
    assert_close(loss, data["loss_train"], **LOSS)
    assert (data["loss_train"] - data["loss_eval"]).abs() > 1e-3


def test_the_decoder_alone_needs_no_mask_and_gives_the_same_gradients(model, golden: Path) -> None:
    """What the training engine calls: hidden states of right-padded rows, the head applied
    elsewhere."""
    data = load_file(golden / "train/loss_within.safetensors")
    hidden = model.transformer(input_ids=data["input_ids"], use_cache=False).last_hidden_state
    learnt = data["labels"][:, 1:] != -100
    logits = hidden[:, :-1][learnt] @ model.lm_head.weight.T
    loss = torch.nn.functional.cross_entropy(logits, data["labels"][:, 1:][learnt])
    assert_close(loss, data["loss_train"], **LOSS)
    loss.backward()
    assert_official_gradients(model, data)


@pytest.mark.parametrize("every, calls", [(1, [2, 2, 2]), (2, [2, 1, 2])])
def test_activation_checkpointing_changes_nothing_and_recomputes_blocks(
    model, golden: Path, every, calls
) -> None:
    data = load_file(golden / "train/loss_within.safetensors")
    found = [0, 0, 0]
    for i, block in enumerate(model.transformer.h):
        block.mlp.w1.register_forward_hook(lambda *_, i=i: found.__setitem__(i, found[i] + 1))
    model.gradient_checkpointing_enable()
    model.transformer.checkpoint_every = every
    model(data["input_ids"], labels=data["labels"]).loss.backward()
    assert found == calls
    assert_official_gradients(model, data)
    model.gradient_checkpointing_disable()
    assert not model.transformer.gradient_checkpointing


def test_checkpointing_leaves_a_cache_alone(model) -> None:
    model.gradient_checkpointing_enable()
    ids = torch.arange(12).reshape(2, 6)
    out = model(ids, labels=ids, use_cache=True)
    out.loss.backward()
    assert out.past_key_values.get_seq_length() == 6


def test_checkpointing_works_where_only_inner_parameters_are_trained(model) -> None:
    """Non-reentrant: nothing that enters a block of a LoRA-tuned model needs a gradient."""
    model.requires_grad_(False)
    weight = model.transformer.h[1].attn.c_attn.weight.requires_grad_()
    model.activation_checkpointing_enable()
    ids = torch.arange(12).reshape(2, 6)
    model(ids, labels=ids).loss.backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0


def test_official_sft_rows_with_a_hole_in_the_mask_have_the_official_loss(
    full_dir: Path, golden: Path
) -> None:
    data = load_file(golden / "train/sft_loss_full.safetensors")
    model = AutoModelForCausalLM.from_pretrained(full_dir, dtype=torch.float32).train()
    mask = data["attention_mask"]
    assert (mask[:, 1:] & ~mask[:, :-1]).any()
    with torch.no_grad():
        loss = model(data["input_ids"], attention_mask=mask, labels=data["labels"]).loss
    assert_close(loss, data["loss_train"], **LOSS)


def test_blocks_compile_by_themselves(model, golden: Path) -> None:
    """Plain tensors in and out, one graph for all lengths. Traced only: the backend runs the graph
    as it is."""
    data = load_file(golden / "train/loss_within.safetensors")
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    for block in model.transformer.h:
        block.compile(dynamic=True, fullgraph=True, backend=backend)
    model(data["input_ids"], labels=data["labels"]).loss.backward()
    assert_official_gradients(model, data)
    compiled = len(graphs)
    model(data["input_ids"][:, :13], labels=data["labels"][:, :13])
    assert len(graphs) == compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("key", ["attn_dropout_prob", "emb_dropout_prob"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dropout_acts_in_training_only(small_dir: Path, key: str, implementation: str) -> None:
    options = {key: 0.5, "attn_implementation": implementation}
    model = AutoModelForCausalLM.from_pretrained(small_dir, **options).train()
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
        model.eval()
        assert torch.equal(model(ids).logits, model(ids).logits)
