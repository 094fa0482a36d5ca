"""ROUGE as the packages rouge 1.0.1, rouge-chinese 1.0.3 and rouge-score 0.1.2 define it, of texts
of any length: the first overflows the stack at 600 words, and the tables of the others take seconds
at 2,000."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rouge_score import rouge_scorer, scoring
from rouge_score.tokenizers import Tokenizer

from serve.scores.subsequence import WordPlaces, common_length, common_subsequence


class Prf(NamedTuple):
    """Precision, recall and F of one measure, 0..1."""

    p: float
    r: float
    f: float


ZERO = Prf(0.0, 0.0, 0.0)


class Rouge(NamedTuple):
    """ROUGE-1, -2 and -L of one answer."""

    one: Prf
    two: Prf
    lcs: Prf


NOTHING = Rouge(ZERO, ZERO, ZERO)


def names(tokens: str = "") -> tuple[str, ...]:
    """The names of `figures`: "rouge-1", "rouge-1.p", "rouge-1.r", "rouge-2" .."""
    return tuple(f"rouge-{kind}{tokens}{figure}" for kind in "12l" for figure in ("", ".p", ".r"))


def figures(rouge: Rouge) -> list[float]:
    """F, precision and recall of each measure."""
    return [figure for prf in rouge for figure in (prf.f, prf.p, prf.r)]


def best(found: Iterable[Rouge | None]) -> Rouge:
    """Of each measure the reference with the highest F, as rouge-score's `score_multi` takes it;
    zeros if there is none."""
    defined = [rouge for rouge in found if rouge is not None]
    if not defined:
        return NOTHING
    return Rouge(*(max(each, key=lambda prf: prf.f) for each in zip(*defined, strict=True)))


def _prf(overlap: int, predicted: int, expected: int) -> Prf:
    p = overlap / predicted if predicted else 0.0
    r = overlap / expected if expected else 0.0
    # The packages' guard against 0 / 0: equal texts get 1 - 5e-9.
    return Prf(p, r, 2.0 * (p * r / (p + r + 1e-8)))


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n tokens, in order."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def _of_sets(predicted: Sequence[str], expected: Sequence[str], n: int) -> Prf:
    found, wanted = set(ngrams(predicted, n)), set(ngrams(expected, n))
    return _prf(len(found & wanted), len(found), len(wanted))


def sentences_of_words(text: str) -> list[list[str]]:
    """Sentences of a text of space-separated words, as `rouge` 1.0.1 sees them.

    Every full stop ends one, even that inside "3.5". A sentence of blanks alone is one empty word.
    """
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def rouge_1_0_1(prediction: str, reference: str) -> Rouge | None:
    """ROUGE of two texts of space-separated words as `rouge` 1.0.1 defines it: sets of n-grams;
    ROUGE-L over the union of the sentences' longest common subsequences.

    None if one side has no sentence (only full stops), where that package raises.
    """
    pred_sentences, ref_sentences = sentences_of_words(prediction), sentences_of_words(reference)
    if not pred_sentences or not ref_sentences:
        return None
    pred_words = [w for s in pred_sentences for w in s]
    ref_words = [w for s in ref_sentences for w in s]
    union: set[str] = set()
    for pred in pred_sentences:
        places = WordPlaces(pred)
        for ref in ref_sentences:
            if places.share(ref):
                union.update(common_subsequence(ref, pred, places))
    return Rouge(
        _of_sets(pred_words, ref_words, 1),
        _of_sets(pred_words, ref_words, 2),
        _prf(len(union), len(set(pred_words)), len(set(ref_words))),
    )


# Ends of sentences: each pattern's second group begins the next one. rouge-chinese cuts here,
# which matters only inside a word ("......x") and for sentences of blanks, one empty word each.
_ENDS = tuple(
    re.compile(f"({end})({after})")
    for end, after in (
        ("[。！？?]", "[^”’]"),
        (r"\.{6}", "[^”’]"),
        ("…{2}", "[^”’]"),
        ("[。！？?][”’]", "[^，。！？?]"),
    )
)


def _words_of_sentences(text: str) -> list[str]:
    for end in _ENDS:
        text = end.sub("\\1\n\\2", text)
    sentences = text.rstrip().split("\n")
    return [word for part in sentences if part for word in " ".join(part.split()).split(" ")]


def rouge_chinese(prediction: str, reference: str) -> Rouge | None:
    """ROUGE of two texts of space-separated words as `rouge-chinese` 1.0.3 defines it: sets of
    n-grams; ROUGE-L over all words, repeated ones included.

    None if one side has no word, where that package raises.
    """
    predicted, expected = _words_of_sentences(prediction), _words_of_sentences(reference)
    if not prediction.strip() or not reference.strip():
        return None
    return Rouge(
        _of_sets(predicted, expected, 1),
        _of_sets(predicted, expected, 2),
        _prf(common_length(expected, predicted), len(predicted), len(expected)),
    )


class _TokenizedBy(Tokenizer):
    """A way to cut a text, as rouge-score takes one."""

    def __init__(self, cut: Callable[[str], list[str]]) -> None:
        self._cut = cut

    def tokenize(self, text: str) -> list[str]:
        return self._cut(text)


class RougeScore:
    """The package rouge-score with a tokenizer of ours, since its own knows only a-z and 0-9:
    identical Chinese texts score 0 with it, and texts that share only a digit score 1.

    N-grams are counted with multiplicity. ROUGE-L is the package's, without its table.
    """

    def __init__(self, cut: Callable[[str], list[str]]) -> None:
        self._cut = cut
        self._scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2"], tokenizer=_TokenizedBy(cut))

    def score(self, prediction: str, reference: str) -> Rouge:
        """ROUGE of two texts."""
        found = self._scorer.score(reference, prediction)  # its first argument is the target
        one, two = (Prf(*map(float, found[kind])) for kind in ("rouge1", "rouge2"))
        return Rouge(one, two, self._lcs(self._cut(reference), self._cut(prediction)))

    @staticmethod
    def _lcs(expected: list[str], predicted: list[str]) -> Prf:
        if not expected or not predicted:
            return ZERO
        length = common_length(expected, predicted)
        p, r = length / len(predicted), length / len(expected)
        return Prf(p, r, scoring.fmeasure(p, r))
