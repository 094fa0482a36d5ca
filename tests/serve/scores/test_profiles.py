"""The profiles, each against the packages that it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jieba
import numpy as np
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge as RougeChinese

from serve.scores import profiles, segmentation
from serve.scores.measured import Measured
from serve.scores.profiles import chatglm, chatglm3, measure, rouge_score, seed
from serve.scores.rows import ScoredRow
from serve.scores.segmentation import Words
from tests.serve.scores.pairs import text_pairs

SEED_SCORES = Path(__file__).with_name("seed_scores.jsonl")
PAIRS = text_pairs(200, seed=41)
ROWS = [ScoredRow(prediction, (reference,)) for prediction, reference in PAIRS]


def only(measured: Measured, row: int) -> dict[str, float]:
    return dict(zip(measured.names, measured.row_values_NM[row], strict=True))


def assert_equal(found: Measured, expected: list[dict[str, Any]]) -> None:
    """Each row, and the mean of all, to 1e-9; of ROUGE what is expected: F, or F, P and R."""
    assert len(expected) >= 200
    flat = []
    for row in expected:
        flat.append({})
        for name, value in row.items():
            if isinstance(value, dict):
                flat[-1] |= {name if k == "f" else f"{name}.{k}": v for k, v in value.items()}
            else:
                flat[-1][name] = value
    columns = [found.names.index(name) for name in flat[0]]
    figures = np.array([[row[name] for name in flat[0]] for row in flat])
    np.testing.assert_allclose(found.row_values_NM[:, columns], figures, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.values_M[columns], figures.mean(axis=0), rtol=0, atol=1e-9)
    assert (figures.mean(axis=0) > 0).all()


def test_seed_is_the_original_project_s_arithmetic() -> None:
    made, *lines = map(json.loads, SEED_SCORES.read_text(encoding="utf-8").splitlines())
    installed = {name: version(name) for name in ("jieba", "nltk")}
    assert made == {"rouge": "1.0.1", **installed}, "write seed_scores.jsonl again"
    texts = [(line.pop("prediction"), line.pop("reference")) for line in lines]
    assert sum(line["rouge-1"]["p"] == 0 for line in lines) > 10
    assert_equal(seed([ScoredRow(p, (r,)) for p, r in texts], Words()), lines)


def chinese_scores(prediction: str, reference: str, by_words: bool) -> dict[str, Any]:
    """LLaMA-Factory's scores of a row, or ChatGLM3's, before they are rounded."""
    if by_words:
        prediction, reference = prediction.strip(), reference.strip()
    cut = [list(jieba.cut(text)) for text in (prediction, reference)]
    predicted, expected = map(" ".join, cut)
    if predicted.split() and expected.split():
        (rouge,) = RougeChinese().get_scores(predicted, expected)
    else:
        rouge = {name: dict.fromkeys("fpr", 0.0) for name in ("rouge-1", "rouge-2", "rouge-l")}
    candidate, target = cut if by_words else (list(prediction), list(reference))
    bleu = sentence_bleu([target], candidate, smoothing_function=SmoothingFunction().method3)
    scaled = {name: {k: 100 * v for k, v in prf.items()} for name, prf in rouge.items()}
    return {**scaled, "bleu-4": 100 * bleu}


@pytest.mark.parametrize(("profile", "by_words"), [(chatglm, False), (chatglm3, True)])
def test_chatglm_is_rouge_chinese_and_nltk(
    profile: Callable[..., Measured], by_words: bool
) -> None:
    expected = [chinese_scores(prediction, reference, by_words) for prediction, reference in PAIRS]
    assert_equal(profile(ROWS, Words()), expected)


def test_bleu_of_chatglm_counts_characters_and_that_of_chatglm3_words() -> None:
    # By hand: 这|款|裙子 and 那|款|裙子 have two of three words in common and one of two pairs;
    # three of four characters, two of three pairs and one of two triples.
    row = ScoredRow("这款裙子", ("那款裙子",))
    by_characters, by_words = (p([row], Words()) for p in (chatglm, chatglm3))
    assert only(by_characters, 0)["bleu-4"] == pytest.approx(
        100 * (3 / 4 * 2 / 3 * 1 / 2 * 0.5 / 1) ** 0.25
    )
    # nltk takes no n-grams as 0 of 1: a half, and then a quarter.
    assert only(by_words, 0)["bleu-4"] == pytest.approx(
        100 * (2 / 3 * 1 / 2 * 0.5 / 1 * 0.25 / 1) ** 0.25
    )


@pytest.mark.parametrize(
    "text",
    [
        "这款裙子设计简约而大方，显瘦。",
        "the cat sat on the mat",
        "这款brand针织衫 3.5 厘米, it's nice",
    ],
)
def test_equal_texts_score_one(text: str) -> None:
    for measured in measure([ScoredRow(text, (text,), "stop")]):
        scale = 100 if measured.profile in ("chatglm", "chatglm3", "sacrebleu-zh") else 1
        if measured.profile or measured.names[0] in ("exact_match", "length_ratio", "stop_rate"):
            np.testing.assert_allclose(measured.values_M, scale, rtol=1e-8)


def test_only_the_prediction_is_lower_cased_in_the_seed_profile() -> None:
    rows = [ScoredRow("BRAND", ("brand",)), ScoredRow("brand", ("BRAND",))]
    assert [only(seed(rows, Words()), k)["rouge-1.r"] for k in (0, 1)] == [1.0, 0.0]
    assert [only(rouge_score(rows, Words()), k)["rouge-1.r"] for k in (0, 1)] == [1.0, 1.0]
    assert [only(chatglm(rows, Words()), k)["rouge-1.r"] for k in (0, 1)] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [("", "裙子"), (" \n", "裙子"), ("裙子", ""), ("...", "裙子"), ("", ""), (".", ".")],
)
def test_a_row_with_an_empty_side_counts_zero(prediction: str, reference: str) -> None:
    row = ScoredRow(prediction, (reference,))
    assert not seed([row], Words()).values_M.any()
    assert not rouge_score([row], Words()).values_M.any()
    if not prediction.strip() or not reference.strip():
        assert not chatglm([row], Words()).values_M.any()
        assert not chatglm3([row], Words()).values_M.any()


def test_empty_predictions_stay_in_the_mean() -> None:
    rows = [ScoredRow("这款裙子很好看", ("这款裙子很好看",)), ScoredRow("", ("上衣",))]
    for measured in measure(rows):
        if measured.profile and measured.profile != "sacrebleu-zh":
            np.testing.assert_allclose(measured.values_M, measured.row_values_NM[0] / 2)
            assert "empty:0" in measured.signature


def test_of_several_references_the_best_counts_and_the_signature_says_so() -> None:
    text, other = "这款裙子设计简约大方", "上衣配牛仔裤"
    single = measure([ScoredRow(text, (text,))])
    several = measure([ScoredRow(text, (other, text))])
    turned = measure([ScoredRow(text, (text, other, "")), ScoredRow(text, (text,))])
    for one, two, three in zip(single, several, turned, strict=True):
        if one.profile:
            np.testing.assert_allclose(one.values_M, two.values_M, rtol=1e-12)
            np.testing.assert_allclose(one.values_M, three.row_values_NM[0], rtol=1e-12)
            assert "nrefs:1|" in one.signature
            assert "nrefs:2" in two.signature
            assert "nrefs:var" in three.signature
    assert "best by F" in several[0].signature


def test_one_reference_of_no_sentence_leaves_the_others_in_the_seed_profile() -> None:
    rows = [ScoredRow("这款裙子", ("...", "这款裙子")), ScoredRow("这款裙子", ("这款裙子",))]
    first, second = seed(rows, Words()).row_values_NM
    np.testing.assert_array_equal(first, second)


def test_a_text_is_cut_once_for_all_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[str] = []
    segmenter = segmentation._segmenter()
    real = segmenter.cut
    monkeypatch.setattr(segmenter, "cut", lambda text: cut.append(text) or real(text))
    measure([ScoredRow("这款裙子很好看", ("这款裙子",)), ScoredRow("上衣", ("这款裙子",))])
    assert sorted(cut) == sorted(["这款裙子很好看", "这款裙子", "上衣"])


def test_every_measure_has_a_name_of_its_own_and_a_signature_with_versions() -> None:
    found = measure([ScoredRow("裙子", ("裙子",), "stop", 1.0, 2)], training={"裙子"})
    names = [name for measured in found for name in measured.full_names]
    assert len(names) == len(set(names))
    assert {"seed.rouge-l", "chatglm.bleu-4", "rouge-score.rouge-2-char.p", "sacrebleu-zh.chrf",
            "stop_rate", "verbatim_share", "perplexity", "distinct-2"} <= set(names)  # fmt: skip
    told = {measured.profile: measured.signature for measured in found if measured.profile}
    assert list(told) == ["seed", "chatglm", "chatglm3", "rouge-score", "sacrebleu-zh"]
    for profile in ("seed", "chatglm", "chatglm3"):
        assert f"jieba {version('jieba')}" in told[profile]
        assert f"nltk {version('nltk')}" in told[profile]
    assert f"rouge-score {version('rouge-score')}" in told["rouge-score"]
    assert f"version:{version('sacrebleu')}" in told["sacrebleu-zh"]
    assert profiles.measure is measure
