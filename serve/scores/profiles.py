"""The profiles: a number means nothing without its definition, so each comes with a signature that
says what was computed."""

from __future__ import annotations

from collections.abc import Container, Sequence

from serve.scores import metrics
from serve.scores.measured import Measured, means, signature, versions
from serve.scores.rows import ScoredRow

PRF_NAMES = tuple(
    f"rouge-{kind}{figure}" for kind in ("1", "2", "l") for figure in ("", ".p", ".r")
)


def measure(rows: Sequence[ScoredRow], training: Container[str] | None = None) -> list[Measured]:
    """Scores of the rows, at least one, under all profiles, and the general measures.

    `training` holds the answers of the training rows, stripped.
    """
    assert rows, "no rows to score"
    return [_seed(rows), _rouge_score(rows)]


def _figures(scores: metrics.Scores) -> list[float]:
    rouges = [figure for prf in scores.rouges.values() for figure in (prf.f, prf.p, prf.r)]
    return rouges if scores.bleu_4 is None else [*rouges, scores.bleu_4]


def _seed(rows: Sequence[ScoredRow]) -> Measured:
    told = signature(
        rouge="rouge 1.0.1", bleu="nltk method1", scale=1, with_=versions("jieba", "nltk")
    )
    found = [_figures(metrics.score_seed(row.prediction, row.references[0])) for row in rows]
    return means("seed", told, (*PRF_NAMES, "bleu-4"), found)


def _rouge_score(rows: Sequence[ScoredRow]) -> Measured:
    told = signature(tok="jieba", scale=1, with_=versions("rouge-score", "jieba"))
    found = [_figures(metrics.score_rouge_score(row.prediction, row.references[0])) for row in rows]
    return means("rouge-score", told, PRF_NAMES, found)
