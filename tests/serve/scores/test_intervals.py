"""Bootstrap intervals and the paired test of measures, by hand and against sacrebleu."""

from __future__ import annotations

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest

from serve.scores.bleu import sacrebleu_zh
from serve.scores.intervals import bootstrap, paired
from serve.scores.measured import Figures, Measured, divided, means
from serve.scores.rows import ScoredRow
from tests.serve.scores.pairs import text_pairs
from tests.test_resampling import scores_like_rouge

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def of_values(values_NM: Figures) -> Measured:
    names = [f"m{k}" for k in range(values_NM.shape[1])]
    return means("", "", names, values_NM.tolist())


def test_quotients_are_of_sums_and_not_means_of_quotients() -> None:
    # 1 of 1 and 0 of 9: the quotient is 1/10; drawn again 1, 1/10 or 0. A mean of quotients is 1/2.
    measured = Measured("", "", ("x",), np.array([[1.0, 1.0], [0.0, 9.0]]), divided, (True,))
    assert measured.values_M == [0.1]
    low, high = bootstrap(measured)
    assert (low, high) == ([0.0], [1.0])
    # One resample in four draws the first row twice: 0.2 there, 1 here.
    other = Measured("", "", ("x",), np.array([[0.2, 1.0], [0.2, 1.0]]), divided, (True,))
    difference, low, high, _ = paired(measured, other)
    np.testing.assert_allclose([difference, low, high], [[0.1], [-0.8], [0.2]])


def test_the_same_seed_gives_the_same_interval() -> None:
    measured = of_values(scores_like_rouge(np.random.default_rng(2), 40, 1))
    np.testing.assert_array_equal(bootstrap(measured, seed=5), bootstrap(measured, seed=5))
    assert bootstrap(measured, seed=5)[0] != bootstrap(measured, seed=6)[0]


def test_both_sides_of_a_pair_are_drawn_alike() -> None:
    values = scores_like_rouge(np.random.default_rng(3), 100, 1)
    a, b = of_values(values), of_values(values + 0.01)
    difference, low, high, p = paired(a, b)
    np.testing.assert_allclose([difference, low, high], 0.01, rtol=1e-9)
    assert p == pytest.approx(1 / 1001)
    assert (bootstrap(a)[1] > bootstrap(b)[0]).all()  # alone they overlap
    assert paired(a, a)[3] == [1.0]
    np.testing.assert_allclose(paired(b, a)[0], -0.01, rtol=1e-9)


def test_a_measure_that_is_nowhere_defined_has_no_interval() -> None:
    nothing = Measured("", "", ("x",), np.zeros((3, 2)), divided, (True,))
    assert np.isnan(bootstrap(nothing)).all()
    assert np.isnan(paired(nothing, nothing)).all()


def test_resamples_in_which_a_measure_is_not_defined_do_not_count() -> None:
    # Known of one row of two: a quarter of the resamples know nothing.
    half = Measured("", "", ("x",), np.array([[1.0, 1.0], [0.0, 0.0]]), divided, (True,))
    np.testing.assert_array_equal(bootstrap(half), [[1.0], [1.0]])
    assert paired(half, half)[3] == [1.0]


def test_an_endless_perplexity_has_an_endless_interval() -> None:
    def exp_divided(sums: Figures) -> Figures:
        with np.errstate(over="ignore"):
            return np.exp(divided(sums))

    endless = Measured("", "", ("x",), np.array([[1e6, 1.0], [0.0, 1.0]]), exp_divided, (False,))
    low, high = bootstrap(endless)  # a quarter of the resamples is exp(0)
    assert low == [1.0] and not np.isfinite(high).any()
    assert np.isnan(paired(endless, endless)[0]).all()
    assert np.isnan(paired(endless, endless)[3]).all()


def test_intervals_and_tests_of_bleu_are_those_of_sacrebleu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The draws are the same, so what differs is the definition alone: of a percentile, and of p,
    which there is of one side: half of ours where a difference is sure. For a normal difference of
    0 it is P(|z| > E|z|) = 0.42, where ours is 1: 2.4 times as much."""
    monkeypatch.setenv("SACREBLEU_SEED", "77")
    pairs = text_pairs(150, seed=51)
    references = [reference for _, reference in pairs]
    first = [prediction for prediction, _ in pairs]
    # Every k-th answer is cut by half: the fewer, the less certain the difference.
    systems = {
        k: [text[: len(text) // 2] if i % k == 0 else text for i, text in enumerate(first)]
        for k in (1, 2, 60)
    }
    base = sacrebleu_zh([ScoredRow(p, (r,)) for p, r in zip(first, references, strict=True)])
    bleu = BLEU(tokenize="zh")
    score = bleu.corpus_score(first, [references], n_bootstrap=1000)
    low, high = bootstrap(base, seed=77)
    assert (high[0] - low[0]) / 2 == pytest.approx(score._ci, rel=0.01)
    small = []
    for answers in systems.values():
        named = [("first", first), ("second", answers)]
        test = PairedTest(named, {"BLEU": bleu}, [references], test_type="bs", n_samples=1000)
        theirs = test()[1]["BLEU"][1]
        other = sacrebleu_zh([ScoredRow(p, (r,)) for p, r in zip(answers, references, strict=True)])
        difference, low, high, p = paired(base, other, seed=77)
        assert difference[0] == pytest.approx(theirs.score - score.score, abs=1e-9)
        assert theirs.p_value <= p[0] <= 2.6 * theirs.p_value + 0.01
        small.append(bool(p[0] < 0.05))
    assert small == [True, True, False]
