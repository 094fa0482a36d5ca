"""Scores of answers against references under named profiles, so different that a number means
nothing without its profile, and the general measures. Each has a signature that says exactly what
was computed. A row with an empty answer scores 0, and counts."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence

from serve.scores.bleu import bleu_4, sacrebleu_zh
from serve.scores.measured import Measured, means, signature, versions
from serve.scores.rates import general_measures
from serve.scores.rouge import (
    RougeScore,
    best,
    figures,
    names,
    rouge_1_0_1,
    rouge_chinese,
)
from serve.scores.rows import ScoredRow
from serve.scores.segmentation import Words, characters

_BEST = "the best by F, for each ROUGE"
_ALL = "all, by nltk's rule for BLEU"
_CHINESE = "F of sets of words by the arithmetic of rouge-chinese 1.0.3, L over all words"


def measure(rows: Sequence[ScoredRow], training: Container[str] | None = None) -> list[Measured]:
    """Scores of the rows, at least one, under all profiles, and the general measures.

    `training` tells of a stripped answer whether a training row has it.
    """
    assert rows, "no rows to score"
    words = Words()
    return [
        seed(rows, words),
        chatglm(rows, words),
        chatglm3(rows, words),
        rouge_score(rows, words),
        sacrebleu_zh(rows),
        *general_measures(rows, words, training),
    ]


def _refs(rows: Sequence[ScoredRow], bleu: bool) -> str:
    """How several references count; a single one needs no words."""
    counts = {len(row.references) for row in rows}
    nrefs = str(counts.pop()) if len(counts) == 1 else "var"
    return nrefs if nrefs == "1" else f"{nrefs} ({_BEST}{f'; {_ALL}' if bleu else ''})"


def _told(
    rows: Sequence[ScoredRow],
    package: str,
    computed: Mapping[str, str],
    tok: str = Words.signature,
    empty: str = "0",
    **further: str,
) -> str:
    """A profile's signature: what is `computed` by which package, of which words, and how."""
    return signature(
        **computed,
        tok=tok,
        **further,
        mean="rows",
        empty=empty,
        nrefs=_refs(rows, bleu="bleu" in computed),
        version=versions(package),
    )


def seed(rows: Sequence[ScoredRow], words: Words) -> Measured:
    """The original project's scores."""
    cut = "L over sentences cut at full stops"
    computed = {
        "rouge": f"sets of words by the arithmetic of rouge 1.0.1, {cut}",
        "bleu": "4 orders of characters without spaces, sentences, nltk method1",
    }
    case = "prediction stripped and lower-cased, reference as it is"
    told = _told(rows, "nltk", computed, case=case, scale="0..1")
    return means("seed", told, (*names(), "bleu-4"), [_seed_row(row, words) for row in rows])


def _seed_row(row: ScoredRow, words: Words) -> list[float]:
    predicted = " ".join(words.of(row.prediction.strip().lower()))
    expected = [" ".join(words.of(reference)) for reference in row.references]
    rouges = [rouge_1_0_1(predicted, text) if predicted.strip() else None for text in expected]
    # As in the original project, BLEU is 0 where ROUGE is not defined.
    targets = [
        list(text.replace(" ", ""))
        for text, rouge in zip(expected, rouges, strict=True)
        if rouge is not None
    ]
    bleu = bleu_4(list(predicted.replace(" ", "")), targets, "method1") if targets else 0.0
    return [*figures(best(rouges)), bleu]


def chatglm(rows: Sequence[ScoredRow], words: Words) -> Measured:
    """The scores of ChatGLM-6B's and LLaMA-Factory's evaluation, which differ from these by their
    rounding of each row to 4 digits."""
    computed = {"rouge": _CHINESE, "bleu": "4 orders of characters, sentences, nltk method3"}
    told = _told(rows, "nltk", computed, case="mixed", scale="0..100, rows not rounded")
    found = [
        [
            *_rouge_chinese_row(row.prediction, row.references, words),
            100 * bleu_4(list(row.prediction), [list(r) for r in row.references], "method3"),
        ]
        for row in rows
    ]
    return means("chatglm", told, (*names(), "bleu-4"), found)


def chatglm3(rows: Sequence[ScoredRow], words: Words) -> Measured:
    """The scores of ChatGLM3's finetune_hf.py: as `chatglm`, but texts are stripped and BLEU is
    over words. ms-swift differs: it skips empty rows, and its ROUGE-L is that of rouge 1.0.1."""
    told = _told(
        rows,
        "nltk",
        {"rouge": _CHINESE, "bleu": "4 orders of words, sentences, nltk method3"},
        empty="0, and counted (ms-swift skips such rows)",
        case="mixed, texts stripped",
        scale="0..100, rows not rounded (ChatGLM3 prints BLEU as 0..1)",
    )
    found = []
    for row in rows:
        prediction, references = row.prediction.strip(), [r.strip() for r in row.references]
        bleu = bleu_4(words.of(prediction), [words.of(r) for r in references], "method3")
        found.append([*_rouge_chinese_row(prediction, references, words), 100 * bleu])
    return means("chatglm3", told, (*names(), "bleu-4"), found)


def _rouge_chinese_row(prediction: str, references: Sequence[str], words: Words) -> list[float]:
    predicted = " ".join(words.of(prediction))
    expected = [" ".join(words.of(reference)) for reference in references]
    return [100 * figure for figure in figures(best(rouge_chinese(predicted, t) for t in expected))]


def rouge_score(rows: Sequence[ScoredRow], words: Words) -> Measured:
    """The package rouge-score over jieba's words, and over characters ("rouge-1-char" ..)."""
    told = _told(
        rows,
        "rouge-score",
        {"rouge": "n-grams with multiplicity, L of the whole text"},
        tok=f"{Words.signature}, punctuation dropped; char: Han characters and other words",
        case="lower",
        stem="no",
        scale="0..1",
    )
    cuts: tuple[Callable[[str], list[str]], ...] = (words.alphanumeric, characters)
    scorers = [RougeScore(cut) for cut in cuts]

    def figures_of(row: ScoredRow, scorer: RougeScore) -> list[float]:
        return figures(best(scorer.score(row.prediction, r) for r in row.references))

    found = [[f for scorer in scorers for f in figures_of(row, scorer)] for row in rows]
    return means("rouge-score", told, (*names(), *names("-char")), found)
