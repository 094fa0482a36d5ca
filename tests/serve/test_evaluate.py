"""The command itself: scores go to a file and to the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from serve import evaluate


def test_the_command_scores_predictions_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = tmp_path / "p.jsonl"
    row = {"prediction": "裙子很好看。", "reference": "裙子很好看。"}
    predictions.write_text(json.dumps(row) + "\n", encoding="utf-8")
    arguments = ["--predictions", str(predictions), "--output_dir", str(tmp_path / "eval")]
    monkeypatch.setattr(sys, "argv", ["serve.evaluate", *arguments])
    assert evaluate.main() == 0
    report = json.loads((tmp_path / "eval" / "metrics.json").read_text(encoding="utf-8"))
    assert report["seed"]["bleu-4"] == pytest.approx(1.0)
    assert "rouge-l" in capsys.readouterr().out
