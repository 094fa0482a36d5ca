"""Scores of predictions against references, in two profiles so different that a number means
nothing without its profile:

`seed`: what the original project computes. jieba words; ROUGE-1/2/L precision, recall and F as the
package `rouge` 1.0.1 defines them (sets of n-grams; ROUGE-L over the union of the sentences'
longest common subsequences, sentences being what lies between full stops); BLEU-4 over characters
without spaces, nltk's sentence_bleu with smoothing method1. The prediction is stripped and
lower-cased, the reference is not. Every figure is the mean over all rows, 0..1.

`rouge-score`: the package `rouge-score` with a tokenizer of ours, since its own knows only a-z and
0-9: identical Chinese texts score 0 with it, and texts that share only a digit score 1. Both sides
are lower-cased, n-grams are counted with multiplicity, and punctuation is dropped.

In both, a row with an empty prediction or reference scores 0.
"""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Sequence
from math import isqrt
from typing import Any, NamedTuple

from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score import rouge_scorer, scoring
from rouge_score import tokenizers as rouge_tokenizers

with warnings.catch_warnings():
    # jieba imports pkg_resources and has unescaped patterns: both warn on stderr.
    warnings.simplefilter("ignore")
    import jieba

_ALPHANUMERIC = re.compile(r"[^\W_]+")


class Prf(NamedTuple):
    """Precision, recall and F of one measure, 0..1."""

    p: float
    r: float
    f: float


ZERO = Prf(0.0, 0.0, 0.0)


class Scores(NamedTuple):
    """One row's scores, or the means of rows, under one profile."""

    rouge_1: Prf
    rouge_2: Prf
    rouge_l: Prf
    bleu_4: float | None = None  # None: the profile has none

    @property
    def rouges(self) -> dict[str, Prf]:
        return {"rouge-1": self.rouge_1, "rouge-2": self.rouge_2, "rouge-l": self.rouge_l}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: {"rouge-1": {"f", "p", "r"}, "rouge-2": .., "rouge-l": .., "bleu-4": x}."""
        rouges = {name: {"f": s.f, "p": s.p, "r": s.r} for name, s in self.rouges.items()}
        return rouges if self.bleu_4 is None else {**rouges, "bleu-4": self.bleu_4}


@functools.cache
def _segmenter() -> jieba.Tokenizer:
    """Return jieba with its stock dictionary, which takes half a second once per process.

    It is an instance of our own, filled by hand: other code may have added words to jieba's shared
    one, which also caches its dictionary in the common temporary folder, where any user may have
    left a different one.
    """
    logging.getLogger("jieba").setLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter


def words(text: str) -> list[str]:
    """Words of a text by jieba, in order, white space and punctuation included."""
    return _segmenter().lcut(text)


def sentences_of_words(text: str) -> list[list[str]]:
    """Sentences of a text of space-separated words, as `rouge` 1.0.1 sees them.

    Every full stop ends one, even that inside "3.5". A sentence of blanks alone is one empty word.
    """
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _prf(overlap: int, predicted: int, expected: int) -> Prf:
    p = overlap / predicted if predicted else 0.0
    r = overlap / expected if expected else 0.0
    # The package's guard against 0 / 0: equal texts get 1 - 5e-9.
    return Prf(p, r, 2.0 * (p * r / (p + r + 1e-8)))


def _ngrams(tokens: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def common_subsequence(reference: Sequence[str], prediction: Sequence[str]) -> list[str]:
    """One longest common subsequence of two word lists, last words first.

    It matters which of several equally long ones is found, since ROUGE-L counts the set of its
    words: on a tie the walk back from the end skips the prediction's word.
    """
    matches = _Matches(prediction)
    # Of the table every step-th row is kept; those between are made again on the way back.
    step = isqrt(len(reference)) + 1
    kept = [_all_ones(len(prediction))]
    for start in range(0, len(reference), step):
        kept.append(_steps(kept[-1], reference[start : start + step], matches, len(prediction))[-1])
    found: list[str] = []
    i, j, first = len(reference), len(prediction), len(reference)
    rows: list[int] = []
    while i and j:
        if i <= first:
            block = (i - 1) // step
            first = block * step
            rows = _steps(kept[block], reference[first:i], matches, len(prediction))
        if reference[i - 1] == prediction[j - 1]:
            i, j = i - 1, j - 1
            found.append(reference[i])
        # If the words differ, L[i,j] is the larger of L[i-1,j] and L[i,j-1]; so the first is larger
        # than the second just where L rises at j.
        elif not rows[i - first - 1] >> (j - 1) & 1:
            i -= 1
        else:
            j -= 1
    return found


def common_length(reference: Sequence[str], prediction: Sequence[str]) -> int:
    """The length of the longest common subsequences of two word lists."""
    width = len(prediction)
    if not reference or not width:
        return 0
    matches, row = _Matches(prediction), _all_ones(width)
    for word in reference:
        row = _next_row(row, matches.of(word), width)
    return width - row.bit_count()


def _all_ones(width: int) -> int:
    return (1 << width) - 1


class _Matches:
    """The places of each word in a list, as bits. Those of rare words are made when asked for:
    kept, they would take the square of the list's length."""

    def __init__(self, words_M: Sequence[str]) -> None:
        self._bytes = len(words_M) // 8 + 1
        self._places: dict[str, list[int]] = {}
        for at, word in enumerate(words_M):
            self._places.setdefault(word, []).append(at)
        self._frequent = {
            word: self._bits(places) for word, places in self._places.items() if len(places) > 64
        }

    def of(self, word: str) -> int:
        frequent = self._frequent.get(word)
        return self._bits(self._places.get(word, ())) if frequent is None else frequent

    def _bits(self, places: Sequence[int]) -> int:
        if len(places) <= 2:
            return sum(1 << at for at in places)
        bits = bytearray(self._bytes)
        for at in places:
            bits[at // 8] |= 1 << at % 8
        return int.from_bytes(bits, "little")


def _next_row(row: int, matches: int, width: int) -> int:
    """One row of the table L of lengths from the row above.

    A row is kept as bits, 0 where L[i,j] is one more than L[i,j-1] (Crochemore et al., "A fast and
    practical bit-vector algorithm for the longest common subsequence problem", 2001).
    """
    return ((row + (row & matches)) | (row & ~matches)) & _all_ones(width)


def _steps(row: int, words_N: Sequence[str], matches: _Matches, width: int) -> list[int]:
    rows = []
    for word in words_N:
        row = _next_row(row, matches.of(word), width)
        rows.append(row)
    return rows


def rouge_of_sets(prediction: str, reference: str) -> tuple[Prf, Prf, Prf] | None:
    """ROUGE-1, -2, -L of two texts of space-separated words as `rouge` 1.0.1 defines them.

    None if one side has no sentence (only full stops), where that package raises. It recurses once
    per word; here any length is scored.
    """
    pred_sentences, ref_sentences = sentences_of_words(prediction), sentences_of_words(reference)
    if not pred_sentences or not ref_sentences:
        return None
    pred_words = [w for s in pred_sentences for w in s]
    ref_words = [w for s in ref_sentences for w in s]
    scores = []
    for n in (1, 2):
        predicted, expected = _ngrams(pred_words, n), _ngrams(ref_words, n)
        scores.append(_prf(len(predicted & expected), len(predicted), len(expected)))
    union = {
        w for ref in ref_sentences for pred in pred_sentences for w in common_subsequence(ref, pred)
    }
    scores.append(_prf(len(union), len(set(pred_words)), len(set(ref_words))))
    return scores[0], scores[1], scores[2]


def score_seed(prediction: str, reference: str) -> Scores:
    """One row under profile `seed`. As in the original project, BLEU is 0 if ROUGE is undefined."""
    predicted = " ".join(words(prediction.strip().lower()))
    expected = " ".join(words(reference))
    rouges = rouge_of_sets(predicted, expected) if predicted.strip() else None
    if rouges is None:
        return Scores(ZERO, ZERO, ZERO, 0.0)
    candidate, target = (list(text.replace(" ", "")) for text in (predicted, expected))
    smoothing = SmoothingFunction().method1
    bleu = sentence_bleu([target], candidate, smoothing_function=smoothing)
    return Scores(*rouges, float(bleu))


class JiebaTokenizer(rouge_tokenizers.Tokenizer):
    """For rouge-score: lower-cased jieba words without their punctuation.

    English text gives the same tokens as rouge-score's own tokenizer.
    """

    def tokenize(self, text: str) -> list[str]:
        return [token for word in words(text.lower()) for token in _ALPHANUMERIC.findall(word)]


@functools.cache
def _rouge_scorer() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rouge1", "rouge2"], tokenizer=JiebaTokenizer())


def score_rouge_score(prediction: str, reference: str) -> Scores:
    """One row under profile `rouge-score`.

    ROUGE-L is the package's, by a way that takes no table of the texts' lengths.
    """
    found = _rouge_scorer().score(reference, prediction)  # its first argument is the target
    one, two = (Prf(*map(float, found[kind])) for kind in ("rouge1", "rouge2"))
    expected, predicted = map(JiebaTokenizer().tokenize, (reference, prediction))
    return Scores(one, two, _rouge_l(expected, predicted))


def _rouge_l(expected: list[str], predicted: list[str]) -> Prf:
    if not expected or not predicted:
        return ZERO
    length = common_length(expected, predicted)
    p, r = length / len(predicted), length / len(expected)
    return Prf(p, r, scoring.fmeasure(p, r))


def _mean_prf(rows: Sequence[Prf]) -> Prf:
    return Prf(*(sum(figures) / len(rows) for figures in zip(*rows, strict=True)))


def mean(rows: Sequence[Scores]) -> Scores:
    """Means over rows (at least one) of one profile."""
    assert rows, "the mean of no rows"
    one, two, lcs, bleus = zip(*rows, strict=True)
    bleu = None if None in bleus else sum(bleus) / len(rows)
    return Scores(_mean_prf(one), _mean_prf(two), _mean_prf(lcs), bleu)


def score_all(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Scores]:
    """Mean scores of the rows under both profiles: {"seed": .., "rouge-score": ..}."""
    pairs = list(zip(predictions, references, strict=True))
    return {
        "seed": mean([score_seed(p, r) for p, r in pairs]),
        "rouge-score": mean([score_rouge_score(p, r) for p, r in pairs]),
    }


def table(scores: dict[str, Scores]) -> str:
    """Plain-text table: a line per profile and measure; F, P and R with 4 decimals."""
    lines = [f"{'profile':<13}{'measure':<10}{'F':>8}{'P':>8}{'R':>8}"]
    for profile, s in scores.items():
        for name, prf in s.rouges.items():
            lines.append(f"{profile:<13}{name:<10}{prf.f:>8.4f}{prf.p:>8.4f}{prf.r:>8.4f}")
        if s.bleu_4 is not None:
            lines.append(f"{profile:<13}{'bleu-4':<10}{s.bleu_4:>8.4f}")
    return "\n".join(lines)
