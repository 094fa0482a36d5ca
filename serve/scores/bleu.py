"""BLEU: of single answers by nltk, and of the whole set by sacrebleu, with chrF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from serve.scores.measured import Figures, Measured
from serve.scores.rows import ScoredRow

_SMOOTHING = SmoothingFunction()


def bleu_4(
    predicted: Sequence[str],
    expected: Sequence[Sequence[str]],
    smoothing: Literal["method1", "method3"],
) -> float:
    """BLEU-4 of one answer's tokens, 0..1, by nltk with its rule for several references: each
    n-gram counts as often as in the reference that has it most; the closest length counts."""
    method = _SMOOTHING.method1 if smoothing == "method1" else _SMOOTHING.method3
    return float(sentence_bleu(expected, predicted, smoothing_function=method))


def sacrebleu_zh(rows: Sequence[ScoredRow]) -> Measured:
    """Corpus BLEU with the tokenizer `zh`, and chrF2, of all rows; 0..100.

    The statistics are sacrebleu's own, so that its arithmetic is behind every resample, too.
    """
    # Any: their statistics are annotated as integers, but sums of rows drawn again are floats.
    # force: no advice on texts that end in " .", which are nobody's mistake here.
    scorers: tuple[Any, Any] = (BLEU(tokenize="zh", force=True), CHRF())
    predictions = [row.prediction for row in rows]
    most = max(len(row.references) for row in rows)
    # One list for each place of a reference; None where a row has fewer.
    references = [
        [row.references[k] if k < len(row.references) else None for row in rows]
        for k in range(most)
    ]
    parts = [scorer._extract_corpus_statistics(predictions, references) for scorer in scorers]
    ends = np.cumsum([len(part[0]) for part in parts])[:-1]

    def combine(sums: Figures) -> Figures:
        flat = sums.reshape(-1, sums.shape[-1])
        found = [
            [scorer._compute_score_from_stats(row).score for row in part.tolist()]
            for scorer, part in zip(scorers, np.split(flat, ends, axis=1), strict=True)
        ]
        return np.array(found).T.reshape(*sums.shape[:-1], 2)

    signature = "; ".join(
        f"{name}|{scorer.get_signature()}"
        for name, scorer in zip(("BLEU", "chrF2"), scorers, strict=True)
    )
    statistics_NK = np.hstack([np.asarray(part, dtype=np.float64) for part in parts])
    return Measured(
        "sacrebleu-zh", signature, ("bleu", "chrf"), statistics_NK, combine, (True, True)
    )
