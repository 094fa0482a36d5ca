"""Decoding against the official code's: golden/generate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
)

import qwen_ds

TOLERANCE = {"atol": 3e-5, "rtol": 0.0}
WITH_LOGITS = {"output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def prompts(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "generate/greedy.safetensors")


@pytest.fixture(scope="module")
def model(small_dir: Path) -> qwen_ds.QWenLMHeadModel:
    model = AutoModelForCausalLM.from_pretrained(small_dir).eval()
    model.generation_config = GenerationConfig(eos_token_id=304, pad_token_id=304, do_sample=False)
    return model


def new_tokens(model: qwen_ds.QWenLMHeadModel, ids_BT: Tensor, n: int, **kwargs: object) -> Tensor:
    kwargs.setdefault("attention_mask", torch.ones_like(ids_BT))
    return model.generate(ids_BT, max_new_tokens=n, **kwargs)[:, ids_BT.shape[1] :]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_greedy_batch_gives_official_tokens_and_scores(
    model, prompts, monkeypatch, implementation: str
) -> None:
    monkeypatch.setattr(model.config, "_attn_implementation", implementation)
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    out = model.generate(ids, attention_mask=mask, max_new_tokens=24, **WITH_LOGITS)
    assert torch.equal(out.sequences[:, 26:], prompts["new_tokens"])
    assert_close(torch.stack(out.logits), prompts["scores"], **TOLERANCE)


@pytest.mark.parametrize("row", range(4))
def test_a_row_alone_gives_its_official_tokens_with_and_without_cache(
    model, prompts, row: int
) -> None:
    ids = prompts[f"single.{row}.input_ids"].unsqueeze(0)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, **WITH_LOGITS}
    for use_cache in (True, False):
        out = model.generate(ids, use_cache=use_cache, **options)
        assert torch.equal(out.sequences[0, ids.shape[1] :], prompts[f"single.{row}.new_tokens"])
        scores = torch.stack(out.logits)[[0, -1], 0]
        assert_close(scores, prompts[f"single.{row}.scores_first_last"], **TOLERANCE)


def test_a_padded_batch_of_one_is_the_unpadded_prompt(model, golden: Path) -> None:
    """The official generate() drops the mask of a single row; honouring it is deliberate."""
    data = load_file(golden / "generate/batch_of_one.safetensors")
    found = new_tokens(model, data["input_ids"], 8, attention_mask=data["attention_mask"])
    assert torch.equal(found[0], data["unpadded_new_tokens"])
    assert not torch.equal(found[0], data["official_new_tokens"])
    with torch.no_grad():
        last = model(data["input_ids"], attention_mask=data["attention_mask"]).logits[0, -1]
    assert_close(last, data["forward_with_mask_last_logits"], **TOLERANCE)


def test_stop_words_end_rows_as_in_the_official_generate(model, prompts, golden: Path) -> None:
    for case in json.loads((golden / "generate/stop_words.json").read_text())["cases"]:
        if case["rows"] == "all":
            ids, mask = prompts["input_ids"], prompts["attention_mask"]
        else:
            ids = prompts[f"single.{case['rows']}.input_ids"].unsqueeze(0)
            mask = torch.ones_like(ids)
        options = {name: case[name] for name in ("stop_words_ids", "eos_token_id", "pad_token_id")}
        found = new_tokens(model, ids, case["max_new_tokens"], attention_mask=mask, **options)
        assert found.tolist() == case["new_tokens"], case["name"]


def test_stop_words_may_come_from_the_generation_config(model, prompts) -> None:
    ids = prompts["single.3.input_ids"].unsqueeze(0)
    config = GenerationConfig(**model.generation_config.to_diff_dict(), max_new_tokens=24)
    config.stop_words_ids = [[224]]
    found = model.generate(ids, config, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :]
    assert found.tolist() == [454, 149, 224, 304]


def test_a_stop_word_that_is_the_eos_token_or_longer_than_the_prompt_changes_nothing(model) -> None:
    ids = torch.tensor([[7, 304]])  # what ends here is the prompt, not the answer
    found = new_tokens(model, ids, 4, stop_words_ids=[[304], [1, 2, 3, 4, 5]])
    assert torch.equal(found, new_tokens(model, ids, 4))


def test_stop_words_end_with_the_eos_token_of_the_call_and_leave_other_processors_alone(
    model, prompts
) -> None:
    class Never(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.index_fill(1, torch.tensor([224]), -torch.inf)

    ids = prompts["single.3.input_ids"].unsqueeze(0)
    found = new_tokens(model, ids, 6, stop_words_ids=[[149]], eos_token_id=[311, 304])
    assert found[0].tolist() == [454, 149, 311]
    options = {"stop_words_ids": [[224]], "logits_processor": LogitsProcessorList([Never()])}
    found = new_tokens(model, ids, 6, **options)[0].tolist()
    assert found[:2] == [454, 149] and len(found) == 6 and 224 not in found


@pytest.mark.parametrize("words", [[[]], [[-1]], [["a"]]])
def test_stop_words_that_are_no_token_ids_are_refused(model, words: list) -> None:
    with pytest.raises(ValueError, match="stop_words_ids"):
        new_tokens(model, torch.tensor([[1, 2]]), 2, stop_words_ids=words)


def test_stop_words_need_an_eos_token(model, monkeypatch) -> None:
    monkeypatch.setattr(model, "generation_config", GenerationConfig(do_sample=False))
    with pytest.raises(ValueError, match="no eos_token_id"):
        new_tokens(model, torch.tensor([[1, 2]]), 2, stop_words_ids=[[5]])


@pytest.mark.parametrize("chunk", [1, 10])
def test_several_tokens_on_a_cache_are_causal(model, golden: Path, chunk: int) -> None:
    """The official code forgets the causal mask when several tokens meet a cache; full.logits is
    the truth."""
    data = load_file(golden / "long/chunked.safetensors")
    ids = data["input_ids"].unsqueeze(0)
    with torch.no_grad():
        cache = model(ids[:, :30], use_cache=True).past_key_values
        found = model(ids[:, 30 : 30 + chunk], past_key_values=cache).logits[0]
    assert_close(found, data["full.logits"][:chunk], **TOLERANCE)
    if chunk == 1:
        assert_close(found, data["one_token.logits"], **TOLERANCE)


@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": 7}, {"cache_implementation": "static"}, {"num_beams": 2}]
)
def test_other_ways_to_decode_give_each_row_what_it_gets_alone(
    model, prompts, options: dict
) -> None:
    options = options | {"disable_compile": True}
    mask = prompts["attention_mask"]
    batch = new_tokens(model, prompts["input_ids"], 8, attention_mask=mask, **options)
    for row in range(4):
        ids = prompts[f"single.{row}.input_ids"].unsqueeze(0)
        assert torch.equal(batch[row], new_tokens(model, ids, 8, **options)[0])
    if "num_beams" not in options:
        assert torch.equal(batch, prompts["new_tokens"][:, :8])


def test_a_hole_in_the_mask_keeps_its_position_while_generating(model) -> None:
    """As in forward and in the official code, where a position is an index; transformers would
    count the hole out."""
    ids = torch.arange(30, 40).unsqueeze(0)
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 1, 1]])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=3, **WITH_LOGITS)
    for step, scores in enumerate(out.logits):
        seen = torch.cat((mask, torch.ones(1, step, dtype=torch.int64)), 1)
        with torch.no_grad():
            expected = model(out.sequences[:, : 10 + step], attention_mask=seen).logits[:, -1]
        assert_close(scores, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_masked_cache_can_be_filled_in_pieces(model, golden: Path, kind: str) -> None:
    data = load_file(golden / "forward/left_pad.safetensors")
    ids, mask = data["input_ids"], data["attention_mask"]
    cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=32)
    pieces = []
    with torch.no_grad():
        for start, end in ((0, 6), (6, 13), (13, 14), (14, 21)):
            known = {"attention_mask": mask[:, :end], "past_key_values": cache}
            pieces.append(model(ids[:, start:end], **known).logits)
    real = mask.bool()
    assert_close(torch.cat(pieces, 1)[real], data["logits"][real], **TOLERANCE)


def test_training_mode_makes_no_cache_unless_asked(model) -> None:
    ids = torch.tensor([[1, 2, 3]])
    assert model(ids).past_key_values is not None
    model.train()
    try:
        assert model(ids).past_key_values is None
        assert model(ids, use_cache=True).past_key_values is not None
    finally:
        model.eval()
