"""Scores: profile `seed` against the package it is defined by, `rouge-score` on Chinese, and
hand-computed cases.

`rouge` 1.0.1 itself is a test dependency and the oracle of ROUGE under profile `seed`;
hand-computed values say how.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

from serve.scores import metrics

PIECES = [
    "这款",
    "裙子",
    "简约",
    "半身裙",
    "。",
    "，",
    "！",
    "T恤",
    "BRAND",
    "the",
    "cat",
    "a",
    "b",
    "3.5",
    "A.B",
    "...",
    ".",
    "x. y",
] + [" ", "  ", "\n", "\t", "\u3000", "", "<UNK>", "😀"]


def random_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Chinese, English and mixed texts of 0 to 14 pieces; every third pair English words with full
    stops."""
    rng = random.Random(seed)
    pairs = []
    for k in range(count):
        if k % 3:
            pairs.append(
                (
                    "".join(rng.choices(PIECES, k=rng.randint(0, 14))),
                    "".join(rng.choices(PIECES, k=rng.randint(0, 14))),
                )
            )
        else:
            pairs.append(
                (
                    " ".join(rng.choices("abcde.fg", k=rng.randint(0, 30))),
                    " ".join(rng.choices("abcd.ef", k=rng.randint(0, 30))),
                )
            )
    return pairs


def test_rouge_of_the_seed_profile_is_that_of_rouge_1_0_1() -> None:
    oracle, undefined = Rouge(), 0
    for prediction, reference in random_pairs(600, seed=3):
        predicted, expected = (" ".join(metrics.words(text)) for text in (prediction, reference))
        ours = metrics.rouge_of_sets(predicted, expected)
        try:
            (theirs,) = oracle.get_scores(predicted, expected)
        except ValueError:  # a side without a sentence
            undefined += 1
            assert ours is None
            continue
        assert ours is not None
        for name, score in zip(("rouge-1", "rouge-2", "rouge-l"), ours, strict=True):
            assert {"p": score.p, "r": score.r, "f": score.f} == theirs[name], (
                predicted,
                expected,
                name,
            )
    assert 20 < undefined < 200


def test_repeated_words_count_once_in_the_seed_profile() -> None:
    # By hand. "a b a b" has the sets {a, b} and {ab, ba}; against "a b" both words and one of two
    # pairs are found.
    scores = metrics.score_seed("a b a b", "a b")
    assert scores.rouge_1.p == scores.rouge_1.r == 1.0
    assert (scores.rouge_2.p, scores.rouge_2.r) == (0.5, 1.0)
    assert scores.rouge_2.f == pytest.approx(2 / 3, abs=1e-7)
    # rouge-score counts: 2 of the 4 words, 1 of the 3 pairs.
    counted = metrics.score_rouge_score("a b a b", "a b")
    assert (counted.rouge_1.p, counted.rouge_1.r) == (0.5, 1.0)
    assert counted.rouge_2.p == pytest.approx(1 / 3)


def test_rouge_l_unites_the_subsequences_of_the_sentences() -> None:
    # By hand: the reference "a b c d e" shares "a b" with one sentence and "c e" with the other: 4
    # of its 5 words, and 4 of the prediction's 6. Taken as one long sentence, the second prediction
    # would share only two words with it.
    for prediction in ("a b x. c e y", "c e y. a b x"):
        scores = metrics.rouge_of_sets(prediction, "a b c d e")
        assert scores is not None
        assert (scores[2].p, scores[2].r) == (4 / 6, 4 / 5)


@pytest.mark.parametrize(
    "text",
    [
        "这款裙子设计简约而大方，显瘦。",
        "the cat sat on the mat",
        "这款brand针织衫 3.5 厘米, it's nice",
    ],
)
def test_equal_texts_score_one(text: str) -> None:
    seed, counted = metrics.score_seed(text, text), metrics.score_rouge_score(text, text)
    for prf in (
        seed.rouge_1,
        seed.rouge_2,
        seed.rouge_l,
        counted.rouge_1,
        counted.rouge_2,
        counted.rouge_l,
    ):
        assert (prf.p, prf.r) == (1.0, 1.0)
        assert prf.f == pytest.approx(1.0, abs=1e-8)
    assert seed.bleu_4 == pytest.approx(1.0)


def test_rouge_score_sees_chinese_text_and_not_only_its_digits() -> None:
    # With rouge-score's own tokenizer equal Chinese texts score 0, and texts that share nothing but
    # a digit score 1.
    blind = RougeScorer(["rouge1"])
    assert blind.score("裙子很好看", "裙子很好看")["rouge1"].fmeasure == 0.0
    assert blind.score("长裤5厘米", "卫衣5折")["rouge1"].fmeasure == 1.0
    assert metrics.score_rouge_score("卫衣5折", "长裤5厘米").rouge_1.f < 0.5
    assert metrics.score_rouge_score("卫衣", "长裤").rouge_1.f == 0.0


def test_english_text_gets_the_tokens_of_rouge_score() -> None:
    texts = [
        "It's a 3.5-inch, state-of-the-art TV; isn't it?",
        "snake_case, e-mail (a@b.com) & 100% C++",
        "The quick brown fox.",
    ]
    for prediction in texts:
        for reference in texts:
            (theirs,) = RougeScorer(["rougeL"]).score(reference, prediction).values()
            ours = metrics.score_rouge_score(prediction, reference).rouge_l
            assert (ours.p, ours.r, ours.f) == (theirs.precision, theirs.recall, theirs.fmeasure)


def test_bleu_is_over_characters_with_four_orders_and_smoothing_method_1() -> None:
    # By hand: prediction 甲乙丙丁戊, reference 甲乙丙己戊辛: 4 of 5 characters match, 2 of 4 pairs,
    # 1 of 3 triples and 0 of 2 quadruples, which method1 takes as 0.1 of 2; the prediction is
    # shorter: brevity penalty exp(1 - 6/5).
    expected = math.exp(1 - 6 / 5) * (4 / 5 * 2 / 4 * 1 / 3 * 0.1 / 2) ** 0.25
    assert metrics.score_seed("甲乙丙丁戊", "甲乙丙己戊辛").bleu_4 == pytest.approx(
        expected, rel=1e-12
    )
    assert metrics.score_seed("甲 乙丙 丁戊", "甲乙丙 己戊辛").bleu_4 == pytest.approx(
        expected, rel=1e-12
    )


def test_only_the_prediction_is_lower_cased_in_the_seed_profile() -> None:
    assert metrics.score_seed("BRAND", "brand").rouge_1.r == 1.0
    assert metrics.score_seed("brand", "BRAND").rouge_1.r == 0.0
    assert metrics.score_rouge_score("brand", "BRAND").rouge_1.r == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [("", "裙子"), (" \n", "裙子"), ("裙子", ""), ("...", "裙子"), ("", ""), (".", ".")],
)
def test_a_row_with_an_empty_side_counts_zero(prediction: str, reference: str) -> None:
    assert metrics.score_seed(prediction, reference) == metrics.Scores(
        metrics.ZERO, metrics.ZERO, metrics.ZERO, 0.0
    )
    assert metrics.score_rouge_score(prediction, reference).rouge_l == metrics.ZERO


def test_empty_predictions_stay_in_the_mean() -> None:
    scores = metrics.score_all(["这款裙子很好看", ""], ["这款裙子很好看", "上衣"])
    assert scores["seed"].bleu_4 == pytest.approx(0.5)
    assert scores["seed"].rouge_l.r == scores["rouge-score"].rouge_l.r == 0.5


@pytest.fixture
def usual_recursion() -> Iterator[None]:
    """Python's own limit, which torch's compiler raises for the whole process."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("usual_recursion")
def test_a_long_pair_is_scored() -> None:
    # `rouge` 1.0.1 recurses once per word and dies on such a pair; the original project then counts
    # 0.
    prediction, reference = " ".join(map(str, range(1200))), "0 x"
    with pytest.raises(RecursionError):
        Rouge().get_scores(prediction, reference)
    scores = metrics.rouge_of_sets(prediction, reference)
    assert scores is not None
    assert (scores[0].r, scores[2].r, scores[2].p) == (0.5, 0.5, 1 / 1200)


def test_scoring_says_nothing_and_leaves_no_file(tmp_path: Path) -> None:
    code = f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}\n"
    code += "from serve.scores import metrics; print(metrics.words('简约大方'))"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['简约', '大方']"
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
    assert tempfile.gettempdir() != str(tmp_path)


def test_the_table_and_the_json_hold_every_measure() -> None:
    scores = metrics.score_all(["这款裙子"], ["这款裙子很好看"])
    text = metrics.table(scores)
    assert len(text.splitlines()) == 1 + 4 + 3
    assert len({len(line) for line in text.splitlines() if "bleu" not in line}) == 1
    assert list(scores["seed"].as_dict()) == ["rouge-1", "rouge-2", "rouge-l", "bleu-4"]
    assert list(scores["rouge-score"].as_dict()) == ["rouge-1", "rouge-2", "rouge-l"]


def table_of_lengths(reference: list[str], prediction: list[str]) -> list[list[int]]:
    table = [[0] * (len(prediction) + 1) for _ in range(len(reference) + 1)]
    for i, left in enumerate(reference, 1):
        for j, right in enumerate(prediction, 1):
            longest = max(table[i - 1][j], table[i][j - 1])
            table[i][j] = table[i - 1][j - 1] + 1 if left == right else longest
    return table


def walked_back(reference: list[str], prediction: list[str]) -> list[str]:
    """The subsequence that the package `rouge` 1.0.1 finds, by the whole table."""
    table, found = table_of_lengths(reference, prediction), []
    i, j = len(reference), len(prediction)
    while i and j:
        if reference[i - 1] == prediction[j - 1]:
            i, j = i - 1, j - 1
            found.append(reference[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def test_the_subsequence_is_the_one_that_a_walk_through_the_whole_table_finds() -> None:
    draw = random.Random(7)
    for _ in range(600):
        words = "abcdefgh"[: draw.randint(1, 8)]
        left, right = (draw.choices(words, k=draw.randint(0, 40)) for _ in "12")
        assert metrics.common_subsequence(left, right) == walked_back(left, right)
        assert metrics.common_length(left, right) == table_of_lengths(left, right)[-1][-1]
    often, seldom = ["a", "b"] * 100, [draw.choice("abcd") for _ in range(150)]
    assert metrics.common_subsequence(seldom, often) == walked_back(seldom, often)


def test_answers_of_20_000_words_take_little_memory() -> None:
    draw = random.Random(7)
    texts = [" ".join(str(draw.randint(0, 20_000)) for _ in range(20_000)) for _ in "12"]
    words = [text.split() for text in texts]
    tracemalloc.start()
    try:
        assert metrics.common_length(*words) == len(metrics.common_subsequence(*words))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6, f"{peak} bytes; a table of 20,000 by 20,000 takes 1.6e9"
