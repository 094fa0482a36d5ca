"""The sampler against transformers' own temperature, top-k and top-p, and row by row.

Shapes: B rows, V vocabulary, G rows of a group, N candidates.
"""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qwen_ds.decode.exceptions import InvalidSampling
from qwen_ds.decode.sampling import (
    SamplingGroup,
    SamplingParams,
    candidates,
    draw,
    only_tokens,
    row_seed,
    sampling_groups,
    uniforms,
)

CPU = torch.device("cpu")


def same(n: int, temperature: float, top_p: float, top_k: int) -> tuple[SamplingGroup, ...]:
    return sampling_groups([SamplingParams(True, temperature, top_p, top_k)] * n, CPU)


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
    probs_GN, ids_GN = candidates(logits_BV, group)
    found_BV = torch.zeros_like(logits_BV).scatter(
        1, ids_GN, probs_GN / probs_GN.sum(-1, keepdim=True)
    )
    torch.testing.assert_close(found_BV, expected_BV.softmax(-1), rtol=1e-4, atol=1e-6)


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


def test_random_numbers_are_a_rows_own() -> None:
    short, long = (SamplingParams(do_sample=True, max_new_tokens=n, seed=7) for n in (3, 30))
    uniform_BS = uniforms([long, short, SamplingParams(max_new_tokens=5)], CPU)
    assert uniform_BS.shape == (3, 30)
    torch.manual_seed(99)
    assert torch.equal(uniforms([long], CPU)[0], uniform_BS[0])
    assert torch.equal(uniform_BS[1, :3], uniform_BS[0, :3])  # the same seed, however long the row
    assert not uniform_BS[1, 3:].any() and not uniform_BS[2].any()
    other = uniforms([long.of_row(1), long.of_row(2)], CPU)
    assert not torch.equal(other[0], other[1])


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
    [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"max_new_tokens": 0}],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidSampling, match=f"{next(iter(wrong))} is .*; expected"):
        SamplingParams(**wrong)  # type: ignore[arg-type]
