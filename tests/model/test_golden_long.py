"""Beyond seq_length: dynamic NTK and LogN against the official code's numbers (golden/long).

Two official results are bugs and not matched: LogN in left-padded batches counts the padding (the
truth is the row alone), and several tokens on a cache are not causal (see test_golden_generate).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache

import qwen_ds
from qwen_ds.model.cache import declare_prompt_lens
from qwen_ds.model.rotary import logn_factors, ntk_alpha, rotary_tables

TOLERANCE = {"atol": 3e-5, "rtol": 0.0}
FLAGS = [(ntk, logn) for ntk in (False, True) for logn in (False, True)]


@pytest.fixture
def model(small_dir: Path) -> qwen_ds.QWenLMHeadModel:
    model = AutoModelForCausalLM.from_pretrained(small_dir).eval()
    model.generation_config = GenerationConfig(eos_token_id=304, pad_token_id=304, do_sample=False)
    return model


@pytest.fixture(scope="module")
def single(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "long/single.safetensors")


@pytest.fixture(scope="module")
def batch(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "long/batch.safetensors")


@pytest.fixture(scope="module")
def generated(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "long/generate.safetensors")


@torch.no_grad()
def logits(model: torch.nn.Module, ids_BT: Tensor, **kwargs: object) -> Tensor:
    return model(ids_BT, **kwargs).logits


def at(values_BTV: Tensor, positions_BN: Tensor) -> Tensor:
    return values_BTV.gather(1, positions_BN.unsqueeze(-1).expand(-1, -1, values_BTV.shape[-1]))


def test_alpha_is_official_at_every_length(golden: Path) -> None:
    table = json.loads((golden / "long/tables.json").read_text())["ntk_alpha"]
    for seq_length in {row[0] for row in table}:
        lens, alphas = zip(*(row[1:] for row in table if row[0] == seq_length), strict=True)
        assert ntk_alpha(torch.tensor(lens), seq_length).tolist() == list(alphas)


def test_logn_factors_are_official(golden: Path) -> None:
    tables = json.loads((golden / "long/tables.json").read_text())
    for seq_length, position, factor in tables["logn"]:
        found = logn_factors(torch.tensor([[position]]), seq_length)
        assert_close(found, torch.tensor([[factor]]), atol=0.0, rtol=1e-6)
    for seq_length, position, factor in tables["logn_bf16_model"]:
        assert logn_factors(torch.tensor([[position]]), seq_length).bfloat16().item() == factor


@pytest.mark.parametrize(
    "shape, head_dim, base",
    [("small", 16, 10000), ("hd128", 128, 10000), ("hd128_base1e6", 128, 1e6)],
)
def test_rotary_tables_are_official(golden: Path, shape: str, head_dim: int, base: float) -> None:
    data = load_file(golden / "long/rope_tables.safetensors")
    positions = data[f"{shape}.positions"].unsqueeze(0)
    for alpha in (1, 3, 7, 15):
        cos, sin = rotary_tables(positions, head_dim, base, torch.tensor([alpha]))
        for name, half in (("cos", cos), ("sin", sin)):
            expected = data[f"{shape}.alpha{alpha}.{name}"]
            assert_close(torch.cat((half, half), -1)[0], expected, atol=1e-6, rtol=1e-6)
    cos, _ = rotary_tables(positions, head_dim, base)
    expected = data[f"{shape}.alpha1.cos"]
    assert_close(torch.cat((cos, cos), -1)[0], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("ntk, logn", FLAGS)
@pytest.mark.parametrize("length", [100, 150])
def test_a_long_row_has_official_logits(model, single, length: int, ntk: bool, logn: bool) -> None:
    model.config.use_dynamic_ntk, model.config.use_logn_attn = ntk, logn
    ids, positions = single[f"L{length}.input_ids"].unsqueeze(0), single[f"L{length}.positions"]
    found = logits(model, ids)[0, positions]
    assert_close(found, single[f"L{length}.ntk{ntk:d}_logn{logn:d}.logits"], **TOLERANCE)
    expected = single[f"L{length}.train_mode.logits"]
    found = logits(model, ids, extend_context=False)[0, positions]
    assert_close(found, expected, **TOLERANCE)
    model.train()
    assert_close(logits(model, ids)[0, positions], expected, **TOLERANCE)


@pytest.mark.parametrize("ntk, logn", FLAGS)
def test_right_padded_long_rows_have_official_logits_each_with_its_own_alpha(
    model, batch, ntk, logn
) -> None:
    model.config.use_dynamic_ntk, model.config.use_logn_attn = ntk, logn
    ids, mask = batch["right.input_ids"], batch["right.attention_mask"]
    found = at(logits(model, ids, attention_mask=mask), batch["right.positions"])
    assert_close(found, batch[f"right.ntk{ntk:d}_logn{logn:d}.logits_mask"], **TOLERANCE)
    for row, length in enumerate(mask.sum(-1).tolist()):
        alone = logits(model, ids[row : row + 1, :length])[0, batch["right.positions"][row]]
        assert_close(alone, found[row], **TOLERANCE)


@pytest.mark.parametrize("ntk, logn", FLAGS)
def test_left_padded_long_rows_are_the_rows_alone(model, batch, ntk, logn) -> None:
    model.config.use_dynamic_ntk, model.config.use_logn_attn = ntk, logn
    ids, mask = batch["left.input_ids"], batch["left.attention_mask"]
    found = at(logits(model, ids, attention_mask=mask), batch["left.positions"])
    if not logn:
        assert_close(found, batch[f"left.ntk{ntk:d}_logn0.logits_mask"], **TOLERANCE)
    for row, length in enumerate(mask.sum(-1).tolist()):
        positions = batch["left.positions"][row] - (140 - length)
        alone = logits(model, ids[row : row + 1, -length:])[0, positions]
        assert_close(alone, found[row], **TOLERANCE)


def test_without_a_mask_alpha_comes_from_the_padded_length(model, batch) -> None:
    for side in ("left", "right"):
        found = at(logits(model, batch[f"{side}.input_ids"]), batch[f"{side}.positions"])
        assert_close(found, batch[f"{side}.ntk1_logn1.logits_nomask"], **TOLERANCE)


def test_right_padded_rows_without_a_mask_are_right_once_their_lengths_are_given(
    model, batch
) -> None:
    ids, positions = batch["right.input_ids"], batch["right.positions"]
    lens_B, cache = batch["right.attention_mask"].sum(-1), DynamicCache()
    declare_prompt_lens(cache, lens_B)
    for known in ({"past_key_values": cache}, {"prompt_lens": lens_B}):
        found = at(logits(model, ids, **known), positions)
        assert_close(found, batch["right.ntk1_logn1.logits_mask"], **TOLERANCE)


def test_a_4d_mask_beyond_seq_length_needs_the_prompts_lengths(model) -> None:
    """Such a mask does not show them, and the longest row's alpha for all is off by 1 and more."""
    generator, lens = torch.Generator().manual_seed(3), (32, 128)  # 0.5 and 2 times seq_length
    ids = torch.randint(0, 256, (2, 128), generator=generator)
    causal = torch.ones(128, 128, dtype=torch.bool).tril()
    mask = torch.stack([causal & (torch.arange(128) < length) for length in lens]).unsqueeze(1)
    with pytest.raises(ValueError, match="4-D attention mask and 128 tokens.*expected prompt_lens"):
        logits(model, ids, attention_mask=mask)
    found = logits(model, ids, attention_mask=mask, prompt_lens=torch.tensor(lens))
    longest = logits(model, ids, attention_mask=mask, prompt_lens=128)
    for row, length in enumerate(lens):
        alone = logits(model, ids[row : row + 1, :length])[0]
        assert_close(found[row, :length], alone, **TOLERANCE)
    assert (longest[0, :32] - found[0, :32]).abs().max() > 1
    # Nothing depends on the lengths there: no row exceeds seq_length, or NTK does not act.
    logits(model, ids[:, :64], attention_mask=mask[..., :64, :64])
    logits(model, ids, attention_mask=mask, extend_context=False)


@pytest.mark.parametrize("prompt", ["L58", "L120"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_decoding_across_a_doubling_gives_official_tokens_and_scores(
    model, generated, prompt, use_cache
) -> None:
    ids = generated[f"{prompt}.input_ids"].unsqueeze(0)
    name = f"{prompt}.{'cache' if use_cache else 'nocache'}"
    options = {"output_logits": True, "return_dict_in_generate": True, "use_cache": use_cache}
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=24, **options)
    assert torch.equal(out.sequences[0, ids.shape[1] :], generated[f"{name}.new_tokens"])
    assert_close(torch.stack(out.logits)[:, 0], generated[f"{name}.scores"], **TOLERANCE)


OPTIONS = [
    {},
    {"prefill_chunk_size": 32},
    {"cache_implementation": "static", "disable_compile": True},
    {"num_beams": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_left_padded_long_batch_decodes_as_its_rows_alone(
    model, generated, options: dict
) -> None:
    ids, options = generated["batch.input_ids"], options | {"max_new_tokens": 24}
    mask = generated["batch.attention_mask"]
    found = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    for row, length in enumerate(mask.sum(-1).tolist()):
        expected = generated[f"batch.single.{row}.new_tokens"]
        if "num_beams" in options:
            alone = ids[row : row + 1, -length:]
            mask_1T = torch.ones_like(alone)
            expected = model.generate(alone, attention_mask=mask_1T, **options)[0, length:]
        assert torch.equal(found[row], expected)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_long_prompt_in_chunks_is_the_prompt_at_once_when_its_length_is_given(
    model, single, kind: str
) -> None:
    ids = single["L150.input_ids"].unsqueeze(0)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=160)
    for _ in range(2):  # the second time on the same cache after a reset
        lens, chunks = 150, []
        for chunk in ids.split(40, dim=1):
            chunks.append(logits(model, chunk, past_key_values=cache, prompt_lens=lens))
            lens = None  # the cache remembers it
        found = torch.cat(chunks, 1)[0, single["L150.positions"]]
        assert_close(found, single["L150.ntk1_logn1.logits"], **TOLERANCE)
        cache.reset()


def test_chunks_of_a_prompt_of_unknown_length_are_refused_beyond_seq_length(model) -> None:
    ids, cache = torch.arange(90).unsqueeze(0), DynamicCache()
    logits(model, ids[:, :40], past_key_values=cache)
    logits(model, ids[:, 40:64], past_key_values=cache)
    logits(model, ids[:, 64:65], past_key_values=cache)  # one token: decoding, alpha stays
    with pytest.raises(ValueError, match="25 tokens follow 65 cached ones.*expected prompt_lens"):
        logits(model, ids[:, 65:], past_key_values=cache)


def test_lengths_that_cannot_be_or_that_change_on_the_way_are_refused(model) -> None:
    ids, cache = torch.arange(40).unsqueeze(0), DynamicCache()
    for impossible in (-1, 2.5, torch.tensor([40.0])):
        with pytest.raises(ValueError, match="^prompt_lens is .*; expected the tokens of each row"):
            logits(model, ids, prompt_lens=impossible)
    logits(model, ids, past_key_values=cache, prompt_lens=40)
    logits(model, ids[:, :1], past_key_values=cache, prompt_lens=torch.tensor([40]))
    with pytest.raises(ValueError, match=r"^prompt_lens is 41; expected \[40\] as in the first"):
        logits(model, ids[:, :1], past_key_values=cache, prompt_lens=41)
    lens_B = torch.tensor([40, 30])  # `generate` hands them on at every step, repeated for beams
    options = {"prompt_lens": lens_B, "num_beams": 2, "max_new_tokens": 3}
    assert model.generate(ids.repeat(2, 1), **options).shape == (2, 43)


def test_keys_that_a_static_cache_has_in_reserve_are_no_tokens_of_a_prompt(model) -> None:
    ids, cache = torch.arange(40).unsqueeze(0), StaticCache(model.config, max_cache_len=160)
    assert_close(logits(model, ids, past_key_values=cache), logits(model, ids), **TOLERANCE)


def test_alpha_is_frozen_by_the_first_forward_and_forgotten_by_a_reset(model, single) -> None:
    ids, positions = single["L100.input_ids"].unsqueeze(0), single["L100.positions"]
    cache = DynamicCache()
    short = logits(model, ids[:, :40], past_key_values=cache, prompt_lens=40)
    later = logits(model, ids[:, 40:], past_key_values=cache)
    model.config.use_dynamic_ntk = False  # alpha 1 throughout, as for the 40 tokens
    assert_close(torch.cat((short, later), 1), logits(model, ids), **TOLERANCE)
    model.config.use_dynamic_ntk = True
    cache.reset()
    found = logits(model, ids, past_key_values=cache)[0, positions]
    assert_close(found, single["L100.ntk1_logn1.logits"], **TOLERANCE)


def test_a_cache_with_other_rows_than_it_was_filled_with_is_refused(model, batch) -> None:
    cache, mask = DynamicCache(), batch["right.attention_mask"]
    logits(model, batch["right.input_ids"], attention_mask=mask, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="filled with 4 rows and is used with 2"):
        logits(model, torch.tensor([[5], [6]]), past_key_values=cache)


def test_logn_follows_position_ids_that_the_caller_chose(model) -> None:
    ids = torch.arange(10).unsqueeze(0)
    far = torch.arange(200, 210).unsqueeze(0)
    with_logn = logits(model, ids, position_ids=far)
    model.config.use_logn_attn = False
    without = logits(model, ids, position_ids=far)
    assert_close(without, logits(model, ids), atol=1e-4, rtol=0.0)  # rotation alone is relative
    assert (with_logn - without).abs().max() > 0.01
