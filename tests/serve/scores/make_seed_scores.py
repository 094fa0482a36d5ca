"""Write seed_scores.jsonl: pairs of texts and their scores by the original project's arithmetic.

    python tests/serve/scores/make_seed_scores.py FOLDER_OF_ROUGE_1_0_1 > seed_scores.jsonl

The package rouge 1.0.1 cannot be a test dependency beside rouge-chinese 1.0.3, whose wheel brings a
folder `rouge` of its own and so replaces it. FOLDER holds the files of rouge 1.0.1 alone, such as
`pip install --target FOLDER --no-deps rouge==1.0.1` leaves.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import jieba
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

sys.path[:0] = [sys.argv[1], str(Path(__file__).parents[3])]

from rouge import Rouge  # noqa: E402

from tests.serve.scores.pairs import text_pairs  # noqa: E402


def scores_of(prediction: str, reference: str) -> dict[str, object]:
    """The original's scores of one row; where its packages raise, it counts zeros."""
    predicted = " ".join(jieba.cut(prediction.strip().lower()))
    expected = " ".join(jieba.cut(reference))
    try:
        (rouge,) = Rouge().get_scores(predicted, expected)
    except ValueError:
        zero = {"f": 0.0, "p": 0.0, "r": 0.0}
        return {"rouge-1": zero, "rouge-2": zero, "rouge-l": zero, "bleu-4": 0.0}
    candidate, target = (list(text.replace(" ", "")) for text in (predicted, expected))
    bleu = sentence_bleu([target], candidate, smoothing_function=SmoothingFunction().method1)
    return {**rouge, "bleu-4": float(bleu)}


def main() -> None:
    assert not hasattr(Rouge, "cut_sent"), "these are the files of rouge-chinese"
    made = {"rouge": "1.0.1", "jieba": version("jieba"), "nltk": version("nltk")}
    print(json.dumps(made))
    for prediction, reference in text_pairs(240, seed=14):
        row = {"prediction": prediction, "reference": reference}
        print(json.dumps(row | scores_of(prediction, reference), ensure_ascii=False))


if __name__ == "__main__":
    main()
