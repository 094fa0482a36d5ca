"""The verdict on forgetting: what is worse is found, what differs by chance is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from qwen_ds.errors import UserError
from serve.scores import forgetting
from serve.scores.forgetting import Worsening, compare, mean_of, share_of_swaps

Line = dict[str, Any]


def texts(losses: Sequence[float], tokens: Sequence[int]) -> list[Line]:
    """Lines of texts that cost so many nats a token."""
    return [
        {"source": f"t:{i}", "nll": loss * n, "tokens": n}
        for i, (loss, n) in enumerate(zip(losses, tokens, strict=True))
    ]


def questions(right: Sequence[bool]) -> list[Line]:
    letters = dict.fromkeys("ABCD", -1.0)
    return [
        {"source": f"q:{i}", "logprobs": letters, "chosen": "A" if one else "B", "answer": "A"}
        for i, one in enumerate(right)
    ]


def sides(
    rng: np.random.Generator, rows: int, spread: float, worse: float = 0.0
) -> tuple[list[Line], list[Line]]:
    """Two models on texts and questions, each with errors of its own; the second is worse by so
    many nats a token, and loses that share of its right answers."""
    tokens = [int(n) for n in rng.integers(20, 400, rows)]
    base, errors = rng.normal(3, 0.5, rows), rng.normal(0, spread, (2, rows))
    known = rng.random(rows) < 0.8
    slips = rng.random((2, rows)) < spread
    lost = rng.random(rows) < worse
    before = texts(list(base + errors[0]), tokens) + questions(list(known ^ slips[0]))
    right = (known ^ slips[1]) & ~lost
    return before, texts(list(base + errors[1] + worse), tokens) + questions(list(right))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "FLIPS", 1000)
    monkeypatch.setattr(forgetting, "RESAMPLES", 300)


@pytest.mark.parametrize("rows", [8, 40])
def test_two_equal_models_are_not_flagged_in_95_of_100_seeds(quick: None, rows: int) -> None:
    verdicts = Counter(
        compare(*sides(np.random.default_rng(seed), rows, 0.3), seed)["verdict"]
        for seed in range(100)
    )
    assert verdicts["forgot"] <= 5, verdicts


def test_a_model_that_got_worse_is_flagged(quick: None) -> None:
    verdicts = [
        compare(*sides(np.random.default_rng(seed), 60, 0.1, worse=0.3), seed)["verdict"]
        for seed in range(20)
    ]
    assert verdicts == ["forgot"] * 20


def test_enough_rows_without_a_difference_show_no_sign_and_few_rows_tell_nothing(
    quick: None,
) -> None:
    same, _ = sides(np.random.default_rng(0), 20, 0.3)
    assert compare(same, same)["verdict"] == "no sign"
    found = compare(same[:19], same[:19])
    assert found["verdict"] == "cannot tell"
    assert "too few rows to tell" in found["texts"]["in_words"]


def test_the_figures_are_those_of_the_definitions(quick: None) -> None:
    before = texts([2.0, 3.0], [10, 30]) + questions([True, True, True, False])
    after = texts([2.5, 3.0], [10, 30]) + questions([True, False, True, True])
    found = compare(before, after)
    assert found["texts"]["before"] == pytest.approx(np.exp(110 / 40))
    assert found["texts"]["worsening"] == pytest.approx(np.exp(5 / 40) - 1)
    told = found["questions"]
    assert (told["before"], told["after"], told["worsening"]) == (0.75, 0.75, 0.0)
    assert (told["right_to_wrong"], told["wrong_to_right"]) == (1, 1)


def test_the_ends_of_the_interval_lie_on_either_side_of_the_change(quick: None) -> None:
    rng = np.random.default_rng(3)
    value, low, high = mean_of(rng.normal(0.5, 1, 200), np.ones(200), rng)
    half = 1.96 / 200**0.5
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.03)


def test_the_share_of_swaps_is_exact_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "FLIPS", 20_000)
    p = share_of_swaps(np.array([1.0, 1.0, 1.0, 1.0]), np.random.default_rng(0))
    assert p == pytest.approx(1 / 16, abs=0.01)  # one of 2^4 ways to swap is as large


def test_questions_that_were_only_guessed_tell_nothing(quick: None) -> None:
    guessed = questions([i % 4 == 0 for i in range(80)])  # a quarter, of four choices
    found = compare(guessed, questions([False] * 80))
    assert found["questions"]["guessed"] and found["verdict"] == "cannot tell"
    assert "the model guessed before" in found["questions"]["in_words"]


def test_two_questions_are_too_few_and_no_change_has_no_sign(quick: None) -> None:
    wrong = questions([False] * 2)
    told = compare(wrong, wrong)["questions"]["in_words"]
    assert told.endswith("0.0 % after, 0.0 points (95 %: 0.0 to 0.0): too few rows to tell")
    slight = Worsening("texts", 50, 10.0, 10.0, -1e-5, -0.004, 0.004, p=0.5)
    assert "0.0 % (95 %: -0.4 to +0.4)" in slight.in_words()


def test_texts_and_questions_share_what_chance_is_given() -> None:
    one = Worsening("texts", 50, 10.0, 11.0, 0.1, 0.01, 0.2, p=0.02)
    assert one.verdict == "forgot"
    both = Worsening("texts", 50, 10.0, 11.0, 0.1, 0.01, 0.2, p=0.02, kinds=2)
    assert both.verdict == "cannot tell"


def test_a_change_below_the_tolerance_is_no_sign_however_certain() -> None:
    small = Worsening("texts", 500, 10.0, 10.3, 0.03, 0.02, 0.04, p=0.0001)
    assert small.verdict == "no sign"
    assert "+3.0 % (95 %: +2.0 to +4.0)" in small.in_words()
    fall = Worsening("questions", 500, 0.8, 0.7, 0.1, 0.05, 0.15, p=0.0001)
    assert "80.0 % before, 70.0 % after, -10.0 points (95 %: -15.0 to -5.0)" in fall.in_words()


def test_rows_that_failed_on_one_side_are_left_out_of_both(quick: None) -> None:
    before = texts([2.0] * 30, [10] * 30)
    after = texts([2.0] * 30, [10] * 30)
    after[3] = {"source": "t:3", "error": "too long"}
    found = compare(before, after)
    assert (found["failed"], found["texts"]["rows"]) == (1, 29)


def test_models_with_different_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="t:1: 10 tokens before, 11 after; expected models with"):
        compare(texts([2.0, 2.0], [10, 10]), texts([2.0, 2.0], [10, 11]))
