"""BLEU of answers by hand, and corpus BLEU and chrF against sacrebleu."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from serve.scores.bleu import bleu_4, sacrebleu_zh
from serve.scores.rows import ScoredRow
from tests.serve.scores.pairs import text_pairs

ROWS = [ScoredRow(prediction, (reference,)) for prediction, reference in text_pairs(200, seed=31)]


def test_smoothing_methods_by_hand() -> None:
    # Prediction 甲乙丙丁戊, reference 甲乙丙己戊辛: 4 of 5 characters match, 2 of 4 pairs, 1 of 3
    # triples and 0 of 2 quadruples, which method1 takes as 0.1 of 2, and method3 as 1/2 of 2; the
    # prediction is shorter: brevity penalty exp(1 - 6/5).
    for method, last in (("method1", 0.1 / 2), ("method3", 0.5 / 2)):
        expected = math.exp(1 - 6 / 5) * (4 / 5 * 2 / 4 * 1 / 3 * last) ** 0.25
        assert bleu_4("甲乙丙丁戊", ["甲乙丙己戊辛"], method) == pytest.approx(expected, rel=1e-12)
    # Two n-grams without a match: method3 halves each time. 2 of 4, 1 of 3, 0 of 2, 0 of 1.
    expected = (2 / 4 * 1 / 3 * 0.5 / 2 * 0.25 / 1) ** 0.25
    assert bleu_4("甲乙丙丁", ["甲乙"], "method3") == pytest.approx(expected, rel=1e-12)


def test_several_references_of_an_answer_count_together() -> None:
    # By hand: all four characters stand in one reference or the other, no pair spans both; the
    # closest length is 4.
    found = bleu_4("甲乙丙丁", ["甲乙戊己庚辛", "丙丁壬癸"], "method1")
    assert found == pytest.approx((4 / 4 * 2 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25, rel=1e-12)
    assert bleu_4("", ["甲"], "method1") == bleu_4("甲", ["", ""], "method3") == 0.0


def test_corpus_scores_and_signatures_are_those_of_sacrebleu() -> None:
    ours = sacrebleu_zh(ROWS)
    predictions = [row.prediction for row in ROWS]
    references = [[row.references[0] for row in ROWS]]
    bleu, chrf = BLEU(tokenize="zh"), CHRF()
    expected = [scorer.corpus_score(predictions, references).score for scorer in (bleu, chrf)]
    assert min(expected) > 10
    np.testing.assert_allclose(ours.values_M, expected, rtol=0, atol=1e-9)
    assert ours.signature == f"BLEU|{bleu.get_signature()}; chrF2|{chrf.get_signature()}"
    for row, values in list(zip(ROWS, ours.row_values_NM, strict=True))[:40]:
        expected = [s.sentence_score(row.prediction, row.references).score for s in (bleu, chrf)]
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-9)


def test_references_of_different_number_count_as_in_sacrebleu() -> None:
    rows = [
        ScoredRow(row.prediction, row.references + ROWS[k - 1].references * (k % 3))
        for k, row in enumerate(ROWS[:60])
    ]
    references = [
        [row.references[k] if k < len(row.references) else None for row in rows] for k in range(3)
    ]
    ours = sacrebleu_zh(rows)
    predictions = [row.prediction for row in rows]
    expected = [
        scorer.corpus_score(predictions, references).score
        for scorer in (BLEU(tokenize="zh"), CHRF())
    ]
    np.testing.assert_allclose(ours.values_M, expected, rtol=0, atol=1e-9)
    assert "nrefs:var" in ours.signature
    assert ours.values_M[0] > sacrebleu_zh(ROWS[:60]).values_M[0]


def test_texts_that_end_in_a_full_stop_of_its_own_bring_no_advice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sacrebleu_zh([ScoredRow("a dress .", ("a dress",))] * 100)
    assert not caplog.records
