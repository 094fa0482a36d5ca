"""The sampler against transformers' own temperature, top-k and top-p, and row by row.

Shapes: B rows, V vocabulary, G rows of a group, N candidates.
"""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen_ds.decode import sampling
from qwen_ds.decode.exceptions import InvalidSampling
from qwen_ds.decode.largest import in_order, most_probable, top_values
from qwen_ds.decode.sampling import (
    SamplingGroup,
    SamplingParams,
    candidates,
    draw,
    only_tokens,
    row_seed,
    sampling_groups,
)

CPU = torch.device("cpu")
NUMBERS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
)  # fmt: skip


def same(n: int, temperature: float, top_p: float, top_k: int) -> tuple[SamplingGroup, ...]:
    return sampling_groups([SamplingParams(True, temperature, top_p, top_k)] * n, CPU)


def distribution(logits_GV: torch.Tensor, group: SamplingGroup) -> torch.Tensor:
    """Probabilities of all tokens as they are drawn."""
    found_GV, seen = torch.zeros_like(logits_GV), []
    for found in candidates(logits_GV / group.temperature_G1, group):
        seen += found.place_C.tolist()
        for row, ids_N, probs_N, kept in zip(
            found.place_C, found.ids_CN, found.probs_CN, found.kept_C1[:, 0], strict=True
        ):
            found_GV[row, ids_N[:kept]] = probs_N[:kept] / probs_N[:kept].sum()
    assert sorted(seen) == list(range(len(logits_GV)))
    return found_GV


@pytest.mark.parametrize("top_k", [0, 1, 50, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.8, 1.0])
@pytest.mark.parametrize("spread", [0.3, 4.0], ids=["flat", "peaked"])
def test_candidates_are_those_of_transformers(top_k: int, top_p: float, spread: float) -> None:
    # The flat rows need more tokens than are sorted at first; 3,000 tokens are more than that.
    logits_BV = torch.randn(3, 3000, generator=torch.Generator().manual_seed(7)) * spread
    expected_BV = TemperatureLogitsWarper(0.8)(None, logits_BV)
    if top_k:
        expected_BV = TopKLogitsWarper(min(top_k, 3000))(None, expected_BV)
    if top_p < 1:
        expected_BV = TopPLogitsWarper(top_p)(None, expected_BV)
    (group,) = same(3, 0.8, top_p, top_k)
    found_BV = distribution(logits_BV, group)
    torch.testing.assert_close(found_BV, expected_BV.softmax(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_p", [0.05, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("spread", [0.3, 4.0], ids=["flat", "peaked"])
def test_the_prefilter_keeps_the_tokens_of_a_full_sort(top_p: float, spread: float) -> None:
    """Exactly those, of the whole vocabulary: a token more or less would be another candidate."""
    size = 151_936
    logits_BV = torch.randn(3, size, generator=torch.Generator().manual_seed(2)) * spread
    logits_BV[:, 151_851:] = -torch.inf
    (group,) = same(3, 0.8, top_p, 0)
    sorted_BV, ids_BV = (logits_BV / group.temperature_G1).sort(descending=True, stable=True)
    probs_BV = (sorted_BV - sorted_BV.logsumexp(-1, keepdim=True)).exp()
    before_BV = probs_BV.cumsum(-1) - probs_BV
    expected = [set(i[(b < top_p) & (p > 0)].tolist()) for i, b, p in zip(
        ids_BV, before_BV, probs_BV, strict=True)]  # fmt: skip
    found_BV = distribution(logits_BV, group)
    assert [set(row.nonzero()[:, 0].tolist()) for row in found_BV] == expected
    assert all(len(kept) <= 151_851 for kept in expected)


@pytest.mark.parametrize("min_p", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0])
def test_a_number_meets_the_token_that_it_meets_in_a_full_sort(
    monkeypatch: pytest.MonkeyPatch, temperature: float, top_p: float, min_p: float
) -> None:
    """Rows from flat to peaked; numbers everywhere, some of them where a token ends."""
    generator = torch.Generator().manual_seed(8)
    spread_B1 = torch.linspace(0.2, 5.0, 40).unsqueeze(1)
    logits_BV = (torch.randn(40, 6000, generator=generator) * spread_B1).bfloat16().float()
    params = [SamplingParams(True, temperature, top_p, 0, min_p=min_p)] * 40
    groups = sampling_groups(params, CPU)
    (whole,) = groups
    for _ in range(12):
        uniform_B = torch.rand(40, generator=generator)
        for found in candidates(logits_BV / whole.temperature_G1, whole):
            ends_CN = found.cumulative_CN / found.total_C1
            some = torch.randint(200, (1,), generator=generator).clamp(max=ends_CN.shape[1] - 1)
            uniform_B[found.place_C[::2]] = ends_CN[::2, some[0]].clamp(max=1 - 2**-24)
        quick_B = draw(logits_BV, groups, uniform_B)
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "PREFILTERS", ())
            assert torch.equal(quick_B, draw(logits_BV, groups, uniform_B))


def test_no_more_is_sorted_than_a_number_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """At top_p 1 every token is a candidate; nearly always an early one is met."""
    logits_BV = torch.randn(50, 20_000, generator=torch.Generator().manual_seed(2)) * 4
    sorted_rows: list[int] = []
    full = sampling.in_order
    monkeypatch.setattr(
        sampling, "in_order", lambda values: (sorted_rows.append(len(values)), full(values))[1]
    )
    uniform_B = torch.linspace(0, 0.98, 50)
    draw(logits_BV, same(50, 1.0, 1.0, 0), uniform_B)
    assert sum(sorted_rows) < 10
    draw(logits_BV, same(50, 1.0, 1.0, 0), torch.full((50,), 0.99999))
    assert sum(sorted_rows) >= 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_most_probable_is_the_first_of_the_largest(dtype: torch.dtype) -> None:
    logits_BV = torch.randn(9, 700, generator=torch.Generator().manual_seed(2)).round().to(dtype)
    logits_BV[3, 40:] = torch.nan
    logits_BV[4] = -torch.inf
    logits_BV[5, 600] = torch.inf
    largest_B, ids_B = most_probable(logits_BV[:, :650])
    expected_B, expected_ids_B = logits_BV[:, :650].max(-1)
    torch.testing.assert_close(largest_B, expected_B, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ids_B, expected_ids_B)


def test_equal_logits_come_in_one_order_whatever_the_batch() -> None:
    """The prefilter does for the first row and not for the others; rounding makes many equal."""
    generator = torch.Generator().manual_seed(3)
    spread_B1 = torch.tensor([[3.0], [0.2], [0.0]])
    logits_BV = (torch.randn(3, 3000, generator=generator) * spread_B1).bfloat16().float()
    rows = [SamplingParams(True, 1.0, 0.9, 0)] * 3
    for _ in range(50):
        uniform_B = torch.rand(3, generator=generator)
        together_B = draw(logits_BV, sampling_groups(rows, CPU), uniform_B)
        for i in range(3):
            alone = draw(logits_BV[i : i + 1], same(1, 1.0, 0.9, 0), uniform_B[i : i + 1])
            assert alone.item() == together_B[i].item()


def test_the_quick_sort_is_torchs_stable_one() -> None:
    values = torch.randn(3, 5000, generator=torch.Generator().manual_seed(4)).bfloat16().float()
    values[0, ::7], values[0, 1::7], values[1, ::3] = 0.0, -0.0, -torch.inf
    found, places = in_order(values)
    expected, expected_places = values.sort(descending=True, stable=True)
    assert torch.equal(found, expected) and torch.equal(places, expected_places)


@pytest.mark.parametrize("size", [1, 7, 1024])
def test_the_quick_selection_is_the_beginning_of_the_sort(size: int) -> None:
    values = torch.randn(6, 2500, generator=torch.Generator().manual_seed(4)).bfloat16().float()
    values[1, 40:] = -torch.inf  # fewer than are asked for
    values[2] = values[2].sort().values  # all the largest in the last blocks
    values[3] = 1.0
    values[4, 2499] = 9.0  # behind the last whole block
    values[5, ::2] = -torch.inf
    found, places = top_values(values, size)
    expected, expected_places = values.sort(descending=True, stable=True)
    assert torch.equal(found, expected[:, :size])
    finite = found.isfinite()
    assert torch.equal(places[finite], expected_places[:, :size][finite])
    values[0, 5] = torch.nan  # who decodes on with it gets any token, but no crash
    assert top_values(values, size)[0].shape == (6, size)


@pytest.mark.parametrize("top_k", [0, 50])
def test_min_p_is_a_share_of_the_most_probable_token(top_k: int) -> None:
    logits_BV = torch.randn(3, 3000, generator=torch.Generator().manual_seed(7)) * 2
    expected_BV = TemperatureLogitsWarper(0.8)(None, logits_BV)
    if top_k:
        expected_BV = TopKLogitsWarper(top_k)(None, expected_BV)
    expected_BV = MinPLogitsWarper(0.1)(None, TopPLogitsWarper(0.9)(None, expected_BV))
    (group,) = sampling_groups([SamplingParams(True, 0.8, 0.9, top_k, min_p=0.1)] * 3, CPU)
    found_BV = distribution(logits_BV, group)
    assert 1 < (found_BV[0] > 0).sum() < 50
    torch.testing.assert_close(found_BV, expected_BV.softmax(-1), rtol=1e-4, atol=1e-6)


def test_a_temperature_near_0_takes_the_most_probable_token() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 2.0], [-1.0, -3.0, -2.0]])
    for top_k in (0, 2):
        (group,) = same(2, 1e-300, 1.0, top_k)
        assert draw(logits_BV, [group], torch.tensor([0.9, 0.9])).tolist() == [1, 0]


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    n = 4000
    logits_BV = torch.tensor([0.5, 0.1, 0.3, 0.1]).log().repeat(n, 1)
    uniform_B = (torch.arange(n) + 0.5) / n
    # 0.5 + 0.3 < 0.85: one token of 0.1 stays, too.
    drawn_B = draw(logits_BV, same(n, 1.0, 0.85, 0), uniform_B)
    counts = torch.bincount(drawn_B, minlength=4)
    assert counts[0].item() == pytest.approx(n * 0.5 / 0.9, abs=2)
    assert counts[2].item() == pytest.approx(n * 0.3 / 0.9, abs=2)
    assert sorted((counts[1].item(), counts[3].item()))[0] == 0
    for largest in (1 - 2**-24, 1.0):  # its product with the sum may be rounded up to the sum
        last = draw(logits_BV[:1], same(1, 1.0, 0.6, 0), torch.tensor([largest]))
        assert last.item() == 2  # not a token that top-p dropped


@pytest.mark.parametrize("size", [50, 3000], ids=["prefilter", "sort"])
def test_a_token_of_no_probability_is_never_drawn(size: int) -> None:
    """Even by the largest number, where the probabilities sum up to less than 1."""
    logits_BV = torch.randn(40, size, generator=torch.Generator().manual_seed(6))
    logits_BV[:, ::2] = -torch.inf
    for largest in (1 - 2**-24, 1.0):
        drawn_B = draw(logits_BV, same(40, 1.0, 1.0, 0), torch.full((40,), largest))
        assert (drawn_B % 2 == 1).all()


def test_every_row_of_a_mixed_batch_draws_what_it_draws_alone() -> None:
    rows = [
        SamplingParams(),
        SamplingParams(True, 0.5, 0.9, 50),
        SamplingParams(True, 2.0, 0.3, 7),
        SamplingParams(True, 1.0, 1.0, 0),
        SamplingParams(True, 0.9, 0.6, 50),
        SamplingParams(do_sample=False, top_k=3),
    ]
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        logits_BV = torch.randn(len(rows), 3000, generator=generator) * 3
        uniform_B = torch.rand(len(rows), generator=generator)
        together_B = draw(logits_BV, sampling_groups(rows, CPU), uniform_B)
        for i, row in enumerate(rows):
            alone = draw(logits_BV[i : i + 1], sampling_groups([row], CPU), uniform_B[i : i + 1])
            assert alone.item() == together_B[i].item()
        assert together_B[0] == logits_BV[0].argmax() and together_B[5] == logits_BV[5].argmax()


def test_nearby_seeds_and_rows_share_no_stream() -> None:
    assert len({row_seed(seed, row) for seed in range(20) for row in range(20)}) == 400
    assert SamplingParams(seed=3).of_row(4).seed == row_seed(3, 4)


def test_logits_of_padding_ids_are_masked_in_fp32_and_the_models_own_stay() -> None:
    logits_BV = torch.ones(2, 6, dtype=torch.bfloat16)
    masked_BV = only_tokens(logits_BV, 4)
    assert masked_BV.dtype == torch.float32
    assert masked_BV.isinf().sum() == 4 and logits_BV.isfinite().all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0}, {"temperature": inf}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1},
        {"max_new_tokens": 0}, {"min_p": 1.1}, {"repetition_penalty": 0.0},
        {"presence_penalty": 2.1}, {"frequency_penalty": -2.1}, {"min_tokens": -1},
        {"min_tokens": 129}, {"logprobs": 21}, {"logprobs": -1}, {"prompt_logprobs": 21},
        {"logit_bias": ((3, 100.5),)}, {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((3, nan),)}, {"logit_bias": ((3, 1.0), (3, 2.0))},
        *({name: nan} for name in NUMBERS),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidSampling, match=f"{next(iter(wrong))} is .*; expected"):
        SamplingParams(**wrong)  # type: ignore[arg-type]
