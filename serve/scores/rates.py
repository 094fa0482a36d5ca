"""Measures that need no profile: how answers end, how much they repeat, how long they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Sequence

import numpy as np

from serve.scores.measured import Figures, Measured, divided, means, signature
from serve.scores.rouge import ngrams
from serve.scores.rows import ScoredRow
from serve.scores.segmentation import Words


def general_measures(
    rows: Sequence[ScoredRow], words: Words, training: Container[str] | None
) -> list[Measured]:
    """All general measures that these rows allow."""
    words_of = [[w for w in words.of(row.prediction) if w.strip()] for row in rows]
    found = [
        _stop_rate(rows),
        _exact_match(rows),
        _distinct(words_of, 1),
        _distinct(words_of, 2),
        _length_ratio(rows),
        _repetition_rate(words_of),
        None if training is None else _verbatim_share(rows, training),
        _perplexity(rows),
    ]
    return [measured for measured in found if measured is not None]


def _one(
    name: str, told: str, pairs_N2: Sequence[tuple[float, float]], better: bool | None
) -> Measured:
    """A measure that is a quotient of two sums."""
    statistics = np.asarray(pairs_N2, dtype=np.float64)
    return Measured("", told, (name,), statistics, divided, (better,))


def _stop_rate(rows: Sequence[ScoredRow]) -> Measured | None:
    known = [row.finish_reason is not None for row in rows]
    if not any(known):
        return None
    stopped = [row.finish_reason == "stop" for row in rows]
    told = signature(
        share="answers with finish_reason stop", of=f"{sum(known)} of {len(rows)} rows"
    )
    return _one("stop_rate", told, list(zip(stopped, known, strict=True)), True)


def _exact_match(rows: Sequence[ScoredRow]) -> Measured:
    equal = [
        [bool(text := row.prediction.strip()) and text in {r.strip() for r in row.references}]
        for row in rows
    ]
    told = signature(
        share="answers equal to a reference", case="mixed", space="stripped", empty="0"
    )
    return means("", told, ("exact_match",), equal)


def _distinct(words_of: Sequence[Sequence[str]], n: int) -> Measured:
    """Different n-grams of all answers by the number of n-grams (Li et al., "A diversity-promoting
    objective function for neural conversation models", 2016).

    An n-gram that stands in k answers counts 1 / k to each: over all rows that gives the measure
    itself, and rows drawn again do not count as repetition.
    """
    runs = [ngrams(words, n) for words in words_of]
    answers = Counter(ngram for each in runs for ngram in set(each))
    # Exact, since the order of a set differs from process to process.
    share = [math.fsum(1 / answers[ngram] for ngram in set(each)) for each in runs]
    told = signature(
        quotient=f"different {n}-grams by {n}-grams, over all answers",
        tok=f"{Words.signature}, without white space",
        case="mixed",
        shared="an n-gram in k answers counts 1/k to each",
    )
    return _one(f"distinct-{n}", told, [*zip(share, map(len, runs), strict=True)], True)


def _length_ratio(rows: Sequence[ScoredRow]) -> Measured:
    """Like brevity in BLEU: of several references the closest in length, then the shorter."""
    pairs = []
    for row in rows:
        length = _length(row.prediction)
        closest = min(map(_length, row.references), key=lambda r: (abs(r - length), r))
        pairs.append((length, closest))
    told = signature(
        quotient="characters of the answers by those of the references",
        space="not counted",
        nrefs="the closest in length",
    )
    return _one("length_ratio", told, pairs, None)


def _length(text: str) -> int:
    return len("".join(text.split()))


def _repetition_rate(words_of: Sequence[Sequence[str]]) -> Measured:
    """The share of an answer's 4-grams that stood in it before (Welleck et al., "Neural text
    generation with unlikelihood training", 2020: seq-rep-4)."""
    shares = []
    for words in words_of:
        runs = ngrams(words, 4)
        shares.append([1 - len(set(runs)) / len(runs) if runs else 0.0])
    told = signature(
        share="4-grams of an answer that stood in it before",
        tok=f"{Words.signature}, without white space",
        mean="rows",
        short="0",
    )
    return means("", told, ("repetition_rate",), shares, higher_is_better=False)


def _verbatim_share(rows: Sequence[ScoredRow], training: Container[str]) -> Measured:
    found = [[bool(text := row.prediction.strip()) and text in training] for row in rows]
    told = signature(
        share="answers that are the answer of a training row",
        case="mixed",
        space="stripped",
        empty="0",
    )
    return means("", told, ("verbatim_share",), found, higher_is_better=False)


def _perplexity(rows: Sequence[ScoredRow]) -> Measured | None:
    known = [
        (row.reference_nll, row.reference_tokens)
        if row.reference_nll is not None and row.reference_tokens
        else None
        for row in rows
    ]
    told = signature(
        exp="nats by target tokens of the first reference of each row",
        of=f"{sum(pair is not None for pair in known)} of {len(rows)} rows",
    )
    if not any(known):
        return None
    statistics = np.array([pair or (0, 0) for pair in known], dtype=np.float64)
    return Measured("", told, ("perplexity",), statistics, _exp_divided, (False,))


def _exp_divided(sums: Figures) -> Figures:
    with np.errstate(over="ignore"):
        return np.exp(divided(sums))
