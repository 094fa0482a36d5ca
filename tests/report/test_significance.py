"""The paired bootstrap of two sets of answers to the same rows."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_ds.report.significance import compare, matched, paired
from serve.scores import intervals
from serve.scores.measured import means


def test_a_shift_of_all_rows_is_significant_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(400, 1))
    shift, none = paired(np.concatenate([noise + 1, noise - noise.mean()], axis=1))
    assert shift.is_significant and shift.p < 0.01 and shift.low < shift.difference < shift.high
    assert not none.is_significant and none.p > 0.9


def test_equal_models_are_called_different_in_about_one_of_twenty_sets() -> None:
    rng = np.random.default_rng(1)
    found = [paired(rng.normal(size=(60, 1)), resamples=200)[0] for _ in range(200)]
    assert 2 <= sum(each.is_significant for each in found) <= 22


def test_the_mean_of_one_row_is_itself() -> None:
    (only,) = paired(np.array([[0.25]]))
    assert (only.difference, only.low, only.high) == (0.25, 0.25, 0.25)


def test_the_verdicts_are_those_of_the_evaluation() -> None:
    rng = np.random.default_rng(2)
    scores = [np.c_[rng.beta(k, 5, 50), rng.random((50, 6)) < 0.5] for k in (2, 3)]
    first, second = scores
    names = ("rouge", *"abcdef")
    measured = [means("", "", names, side.tolist()) for side in scores]
    theirs = np.transpose(intervals.paired(*measured))
    ours = [(each.difference, each.low, each.high, each.p) for each in paired(second - first)]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_rows_are_matched_by_source_or_else_by_id() -> None:
    one = [{"id": 0, "source": "a:1"}, {"id": 1, "source": "a:2"}]
    other = [{"id": 7, "source": "a:2"}, {"id": 0, "source": "b:1"}]
    assert matched(one, other) == [(one[1], other[0])]
    elsewhere = [{"id": 1, "source": "/x/a:2"}]
    assert matched(one, elsewhere) == [(one[1], elsewhere[0])]
    assert matched(one, [{"id": 5}]) == [] and matched([], other) == []


def test_rows_that_share_a_source_are_told_apart_by_their_id() -> None:
    one = [{"id": i, "source": "a.json:1", "side": 0} for i in range(3)]
    other = [{"id": i, "source": "a.json:1", "side": 1} for i in (2, 0, 1)]
    assert [(a["id"], b["id"]) for a, b in matched(one, other)] == [(0, 0), (1, 1), (2, 2)]
    assert matched(one, [{"source": "a.json:1"}]) == [], "it could be any of the three"


def test_only_measures_that_are_means_over_rows_get_a_verdict() -> None:
    first = [{"id": i, "rouge": 0.1 * i, "bleu": 0.5, "part": 1.0} for i in range(4)]
    second = [{"id": i, "rouge": 0.1 * i + 0.2, "bleu": 0.6} for i in range(4)]
    means = {"rouge": (0.15, 0.35), "bleu": (0.31, 0.4), "part": (1.0, 1.0)}
    found = compare(list(zip(first, second, strict=True)), means)
    assert list(found) == ["rouge"] and found["rouge"].difference == pytest.approx(0.2)
    assert compare([], means) == {}
