"""The table of two profiles for the terminal."""

from __future__ import annotations

from serve.scores import metrics


def test_the_table_and_the_json_hold_every_measure() -> None:
    scores = metrics.score_all(["这款裙子"], ["这款裙子很好看"])
    text = metrics.table(scores)
    assert len(text.splitlines()) == 1 + 4 + 6
    assert len({len(line) for line in text.splitlines() if "bleu" not in line}) == 1
    assert list(scores["seed"].as_dict()) == ["rouge-1", "rouge-2", "rouge-l", "bleu-4"]
    assert list(scores["rouge-score"].as_dict()) == [
        f"rouge-{kind}{tokens}" for tokens in ("", "-char") for kind in "12l"
    ]
