"""The model's numbers against those of the official code: golden/forward, and the invariances
around them.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import qwen_ds
from qwen_ds.model.modeling import RMSNorm
from qwen_ds.model.rotary import apply_rotary, logn_factors, rotary_tables

TOLERANCE = {"atol": 3e-5, "rtol": 0.0}


@pytest.fixture(scope="module")
def model(small_dir: Path) -> qwen_ds.QWenLMHeadModel:
    return AutoModelForCausalLM.from_pretrained(small_dir).eval()


@pytest.fixture(scope="module")
def bf16_model(small_dir: Path) -> qwen_ds.QWenLMHeadModel:
    return AutoModelForCausalLM.from_pretrained(small_dir, dtype=torch.bfloat16).eval()


@pytest.fixture(params=["sdpa", "eager"])
def attention(
    request: pytest.FixtureRequest, model: qwen_ds.QWenLMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> str:
    monkeypatch.setattr(model.config, "_attn_implementation", request.param)
    return request.param


@torch.no_grad()
def logits(model: torch.nn.Module, ids_BT: Tensor, **kwargs: object) -> Tensor:
    return model(ids_BT, **kwargs).logits


@pytest.mark.usefixtures("attention")
def test_right_padded_rows_have_official_logits(model, golden: Path) -> None:
    data = load_file(golden / "forward/right_pad.safetensors")
    ids, mask = data["input_ids"], data["attention_mask"]
    masked, unmasked = logits(model, ids, attention_mask=mask), logits(model, ids)
    assert_close(masked[mask.bool()], data["logits_mask"][mask.bool()], **TOLERANCE)
    assert_close(unmasked, data["logits_nomask"], **TOLERANCE)
    for row, length in enumerate(mask.sum(-1).tolist()):
        alone = logits(model, ids[row : row + 1, :length])[0]
        for found in (unmasked[row, :length], alone):
            assert_close(found, data[f"single.{row}.logits"], **TOLERANCE)


@pytest.mark.usefixtures("attention")
def test_left_padded_rows_have_official_logits(model, golden: Path) -> None:
    data = load_file(golden / "forward/left_pad.safetensors")
    ids, mask = data["input_ids"], data["attention_mask"]
    real = mask.bool()
    for positions in (None, data["position_ids"]):
        found = logits(model, ids, attention_mask=mask, position_ids=positions)
        assert_close(found[real], data["logits"][real], **TOLERANCE)
        assert found.isfinite().all()
    assert_close(logits(model, ids)[:, -1], data["last_logits_nomask"], **TOLERANCE)


@pytest.mark.usefixtures("attention")
def test_a_bool_mask_is_the_int_mask_and_an_additive_4d_mask_is_used_as_it_is(
    model, golden: Path
) -> None:
    data = load_file(golden / "forward/left_pad.safetensors")
    ids, mask = data["input_ids"], data["attention_mask"]
    expected = logits(model, ids, attention_mask=mask)
    assert torch.equal(logits(model, ids, attention_mask=mask.bool()), expected)
    length, real = ids.shape[1], mask.bool()
    visible = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None, :]
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    assert_close(logits(model, ids, attention_mask=additive)[real], expected[real], **TOLERANCE)


def test_padding_a_row_on_the_right_does_not_change_its_logits(model) -> None:
    ids = torch.arange(3, 10).unsqueeze(0)
    padded = torch.nn.functional.pad(ids, (0, 9), value=304)
    assert_close(logits(model, padded)[:, :7], logits(model, ids), atol=1e-5, rtol=0.0)


def test_a_row_that_is_nothing_but_padding_stays_finite_and_changes_no_other(model) -> None:
    ids = torch.arange(8).repeat(2, 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [0] * 8])
    found = logits(model, ids, attention_mask=mask)
    assert found.isfinite().all()
    assert_close(found[0, 2:], logits(model, ids[:1, 2:])[0], **TOLERANCE)


def test_every_module_gives_official_activations(model, golden: Path) -> None:
    data = load_file(golden / "forward/debug.safetensors")
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, __, out: found.update({f"act.{name}": out[0]})

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        out = model(data["input_ids"].unsqueeze(0), output_hidden_states=True, use_cache=True)
    for hook in hooks:
        hook.remove()
    expected = {name: tensor for name, tensor in data.items() if name.startswith("act.")}
    assert_close({name: found[name] for name in expected}, expected, **TOLERANCE)
    for i, state in enumerate(out.hidden_states):
        assert_close(state[0], data[f"hidden_states.{i}"], **TOLERANCE)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    for i, layer in enumerate(out.past_key_values.layers):
        assert_close(layer.keys[0].transpose(0, 1), data[f"cache.{i}.key"], **TOLERANCE)
        assert_close(layer.values[0].transpose(0, 1), data[f"cache.{i}.value"], **TOLERANCE)
    assert_close(out.logits[0], data["logits"], **TOLERANCE)


def test_full_vocabulary_has_official_last_logits(full_dir: Path, golden: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(full_dir, dtype=torch.float32).eval()
    data = load_file(golden / "forward/full_vocab.safetensors")
    last = logits(model, data["input_ids"], attention_mask=data["attention_mask"], logits_to_keep=1)
    assert last.shape == (8, 1, 151936)
    assert_close(last[:, 0, data["columns"]], data["last_logits_at_columns"], **TOLERANCE)
    assert_close(last[:, 0].logsumexp(-1), data["last_logsumexp"], **TOLERANCE)
    values, indices = last[:, 0].topk(50)
    at_official = last[:, 0].gather(-1, data["last_top50_indices"])
    for found in (values, at_official):
        assert_close(found, data["last_top50_values"], **TOLERANCE)
    assert torch.equal(indices[:, 0], data["last_top50_indices"][:, 0])
    texts = json.loads((golden / "forward/full_vocab_texts.json").read_text())
    for row, text in enumerate(texts):  # a row alone, without padding
        found = logits(model, torch.tensor([text["ids"]]), logits_to_keep=1)[0, 0, data["columns"]]
        assert_close(found, data["last_logits_at_columns"][row], **TOLERANCE)


def test_bf16_logits_are_as_close_as_bf16_gets(bf16_model, golden: Path) -> None:
    data = load_file(golden / "forward/bf16.safetensors")
    mask = data["attention_mask"]
    several = logits(bf16_model, data["input_ids"], attention_mask=mask)[mask.bool()]
    long = logits(bf16_model, data["long.input_ids"].unsqueeze(0))[0, data["long.positions"]]
    pairs = (several, data["logits"][mask.bool()]), (long, data["long.logits"])
    for found, expected in pairs:
        assert found.dtype == torch.bfloat16
        difference = (found.float() - expected.float()).abs()
        assert difference.max() <= 0.35 and difference.mean() <= 0.04


def test_bf16_loss_is_in_fp32_and_near_the_official_one(bf16_model, golden: Path) -> None:
    data = load_file(golden / "forward/bf16_ops.safetensors")
    inputs = load_file(golden / "forward/bf16.safetensors")
    known = {"attention_mask": inputs["attention_mask"], "labels": data["labels"]}
    with torch.no_grad():
        loss = bf16_model(inputs["input_ids"], **known).loss
    assert loss.dtype == torch.float32
    assert_close(loss, data["loss_bf16"].float(), atol=0.1, rtol=0.0)


def test_bf16_rms_norm_is_bit_exact(golden: Path) -> None:
    data = load_file(golden / "forward/bf16_ops.safetensors")
    norm = RMSNorm(64, eps=1e-4).bfloat16()
    norm.weight.data = data["rms.weight"]
    assert torch.equal(norm(data["rms.x"]), data["rms.out"])


def test_bf16_rotary_and_logn_are_bit_exact(golden: Path) -> None:
    data = load_file(golden / "forward/bf16_ops.safetensors")
    positions = torch.arange(192).unsqueeze(0)
    cos, sin = rotary_tables(positions, 16, 10000, torch.tensor([3]))
    rotated = apply_rotary(data["rope.x"], cos[:, :, None], sin[:, :, None])
    assert torch.equal(rotated, data["rope.out_alpha3"])
    table = logn_factors(positions, 64).bfloat16()
    assert torch.equal(table[0], data["logn.table_bf16"])
    assert torch.equal(data["rope.out_alpha3"] * table[:, :, None, None], data["logn.out"])


def test_the_gradient_of_the_rotation_is_rounded_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 50, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(x)
    tables = rotary_tables(torch.arange(50).unsqueeze(0), 16, 10000)
    cos, sin = (table[:, :, None] for table in tables)
    apply_rotary(x, cos, sin).backward(upstream)
    assert torch.equal(x.grad, apply_rotary(upstream, cos, -sin))


def test_fp16_logits_are_close_to_fp32(small_dir: Path, model, golden: Path) -> None:
    data = load_file(golden / "forward/right_pad.safetensors")
    half = AutoModelForCausalLM.from_pretrained(small_dir, dtype=torch.float16).eval()
    found = logits(half, data["input_ids"])
    assert found.dtype == torch.float16
    assert_close(found.float(), data["logits_nomask"], atol=0.05, rtol=0.0)


def test_position_ids_are_honoured(model) -> None:
    """Two rows packed into one sequence, each with its own positions and a block-diagonal mask, are
    the two rows."""
    ids = torch.arange(20, 32).unsqueeze(0)
    visible = torch.block_diag(torch.ones(5, 5), torch.ones(7, 7)).tril().bool()[None, None]
    positions = torch.cat([torch.arange(5), torch.arange(7)]).unsqueeze(0)
    packed = logits(model, ids, attention_mask=visible, position_ids=positions)
    assert_close(packed[:, :5], logits(model, ids[:, :5]), **TOLERANCE)
    assert_close(packed[:, 5:], logits(model, ids[:, 5:]), **TOLERANCE)
    # Rotation is relative; only a gap between positions shows in the logits.
    apart = logits(model, ids, position_ids=torch.arange(0, 24, 2).unsqueeze(0))
    assert not torch.allclose(apart, logits(model, ids))


def test_logits_to_keep_gives_the_same_logits_for_fewer_tokens(model) -> None:
    ids = torch.arange(12).reshape(2, 6)
    everything = logits(model, ids)
    picked = torch.tensor([0, 4])
    for kept, expected in ((2, everything[:, -2:]), (picked, everything[:, picked])):
        assert_close(logits(model, ids, logits_to_keep=kept), expected, atol=1e-5, rtol=0.0)


def test_embeddings_can_take_the_place_of_ids(model) -> None:
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        found = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(found, logits(model, ids))


FOUR = torch.ones(1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": FOUR, "attention_mask": torch.ones(1, 3)}, "expected one column"),
        ({"input_ids": FOUR, "output_attentions": True}, "not materialised"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(model, arguments: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        model(**arguments)
