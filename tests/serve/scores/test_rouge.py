"""ROUGE against the packages that define it, and hand-computed cases.

rouge 1.0.1 cannot be installed beside rouge-chinese: its scores come from seed_scores.jsonl, see
make_seed_scores.py and test_profiles.py.
"""

from __future__ import annotations

import random

import pytest
from rouge_chinese import Rouge as RougeChinese
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from serve.scores.rouge import (
    NOTHING,
    ZERO,
    Prf,
    Rouge,
    RougeScore,
    best,
    figures,
    names,
    rouge_1_0_1,
    rouge_chinese,
)
from serve.scores.segmentation import Words, characters
from tests.serve.scores.pairs import text_pairs
from tests.serve.scores.test_subsequence import walked_back


def test_repeated_words_count_once_in_sets_and_each_time_in_rouge_score() -> None:
    # By hand. "a b a b" has the sets {a, b} and {ab, ba}; against "a b" both words and one of two
    # pairs are found.
    for of_sets in (rouge_1_0_1, rouge_chinese):
        scores = of_sets("a b a b", "a b")
        assert scores is not None
        assert scores.one.p == scores.one.r == 1.0
        assert (scores.two.p, scores.two.r) == (0.5, 1.0)
        assert scores.two.f == pytest.approx(2 / 3, abs=1e-7)
    # rouge-score counts: 2 of the 4 words, 1 of the 3 pairs.
    counted = RougeScore(str.split).score("a b a b", "a b")
    assert (counted.one.p, counted.one.r) == (0.5, 1.0)
    assert counted.two.p == pytest.approx(1 / 3)


def test_rouge_l_of_1_0_1_unites_the_subsequences_of_the_sentences() -> None:
    # By hand: the reference "a b c d e" shares "a b" with one sentence and "c e" with the other: 4
    # of its 5 words, and 4 of the prediction's 6. Taken as one long sentence, the second prediction
    # would share only two words with it.
    for prediction in ("a b x. c e y", "c e y. a b x"):
        scores = rouge_1_0_1(prediction, "a b c d e")
        assert scores is not None
        assert (scores.lcs.p, scores.lcs.r) == (4 / 6, 4 / 5)
    assert rouge_1_0_1("...", "a") is None


def test_a_pair_longer_than_the_stack_of_rouge_1_0_1_is_scored() -> None:
    # That package recurses once per word; the original project then counts 0.
    scores = rouge_1_0_1(" ".join(map(str, range(1200))), "0 x")
    assert scores is not None
    assert (scores.one.r, scores.lcs.r, scores.lcs.p) == (0.5, 0.5, 1 / 1200)
    draw = random.Random(3)
    left, right = ([str(draw.randrange(300)) for _ in range(900)] for _ in "12")
    scores = rouge_1_0_1(" ".join(left), " ".join(right))
    assert scores is not None
    union = set(walked_back(right, left))
    assert (scores.lcs.p, scores.lcs.r) == (len(union) / len({*left}), len(union) / len({*right}))


def test_rouge_chinese_is_that_of_the_package() -> None:
    oracle, words, undefined = RougeChinese(), Words(), 0
    for pair in text_pairs(200, seed=21):
        predicted, expected = (" ".join(words.of(text)) for text in pair)
        ours = rouge_chinese(predicted, expected)
        if not predicted.split() or not expected.split():
            undefined += 1
            assert ours is None
            continue
        (theirs,) = oracle.get_scores(predicted, expected)
        assert ours is not None
        for name, prf in zip(("rouge-1", "rouge-2", "rouge-l"), ours, strict=True):
            assert {"p": prf.p, "r": prf.r, "f": prf.f} == pytest.approx(theirs[name], abs=1e-9)
    assert undefined > 3


@pytest.mark.parametrize(
    "text",
    [
        "好。 \n 看？” x",
        "a.......b c",
        "a......b c",
        "x……y z",
        "a?b c。a",
        "a?”b c",
        "。”a",
        "？？ ” 。x",
        " \n。 \n \n a",
        ". 。 。” ，",
    ],
)
def test_sentences_of_rouge_chinese_are_cut_where_the_package_cuts(text: str) -> None:
    other = "好 看 x a . b c y z …… ?"
    for predicted, expected in ((text, other), (other, text), (text, text)):
        (theirs,) = RougeChinese().get_scores(predicted, expected)
        ours = rouge_chinese(predicted, expected)
        assert ours is not None
        told = [theirs[name][key] for name in ("rouge-1", "rouge-2", "rouge-l") for key in "fpr"]
        assert figures(ours) == pytest.approx(told, abs=1e-9)


class _Given(Tokenizer):
    def tokenize(self, text: str) -> list[str]:
        return Words().alphanumeric(text)


def test_rouge_score_is_that_of_the_package_with_the_same_words() -> None:
    kinds = ["rouge1", "rouge2", "rougeL"]
    oracle, ours = RougeScorer(kinds, tokenizer=_Given()), RougeScore(Words().alphanumeric)
    for prediction, reference in text_pairs(200, seed=22):
        theirs = oracle.score(reference, prediction)
        told = [(theirs[k].fmeasure, theirs[k].precision, theirs[k].recall) for k in kinds]
        found = figures(ours.score(prediction, reference))
        assert found == pytest.approx([figure for each in told for figure in each], abs=1e-9)


def test_rouge_score_sees_chinese_text_and_not_only_its_digits() -> None:
    # With rouge-score's own tokenizer equal Chinese texts score 0, and texts that share nothing but
    # a digit score 1.
    blind = RougeScorer(["rouge1"])
    assert blind.score("裙子很好看", "裙子很好看")["rouge1"].fmeasure == 0.0
    assert blind.score("长裤5厘米", "卫衣5折")["rouge1"].fmeasure == 1.0
    for cut in (Words().alphanumeric, characters):
        assert RougeScore(cut).score("裙子很好看", "裙子很好看").one.f == 1.0
        assert RougeScore(cut).score("卫衣5折", "长裤5厘米").one.f < 0.5
        assert RougeScore(cut).score("卫衣", "长裤").one.f == 0.0


def test_english_text_gets_the_tokens_of_rouge_score() -> None:
    texts = [
        "It's a 3.5-inch, state-of-the-art TV; isn't it?",
        "snake_case, e-mail (a@b.com) & 100% C++",
        "The quick brown fox.",
    ]
    for prediction in texts:
        for reference in texts:
            (theirs,) = RougeScorer(["rougeL"]).score(reference, prediction).values()
            for cut in (Words().alphanumeric, characters):
                ours = RougeScore(cut).score(prediction, reference).lcs
                assert ours == (theirs.precision, theirs.recall, theirs.fmeasure)


def test_of_several_references_each_measure_takes_its_best() -> None:
    def prf(f: float) -> Prf:
        return Prf(1 - f, f / 3, f)

    first, second = Rouge(prf(0.5), prf(0.1), prf(0.3)), Rouge(prf(0.2), prf(0.4), prf(0.3))
    assert best([first, None, second]) == Rouge(prf(0.5), prf(0.4), prf(0.3))
    assert best([None]) == best([]) == NOTHING == Rouge(ZERO, ZERO, ZERO)
    assert dict(zip(names(), figures(first), strict=True))["rouge-2.r"] == 0.1 / 3
    assert names("-char")[:3] == ("rouge-1-char", "rouge-1-char.p", "rouge-1-char.r")
    # As rouge-score itself does it.
    references, prediction = ["a b c d", "b a x", "c d e"], "a b c e"
    scorer = RougeScore(str.split)
    kinds = ["rouge1", "rouge2"]
    theirs = RougeScorer(kinds).score_multi(references, prediction)
    ours = best(scorer.score(prediction, reference) for reference in references)
    for kind, found in zip(kinds, ours, strict=False):
        assert (found.p, found.r, found.f) == tuple(theirs[kind])
