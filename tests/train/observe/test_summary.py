"""The line that a run ends with."""

from __future__ import annotations

from qwen_ds.train.observe.summary import RunSummary


def test_a_summary_tells_what_happened_and_nothing_else() -> None:
    plain = RunSummary(steps=4, first_loss=3.0, last_loss=1.5, seconds=2.0, tokens=5000)
    assert str(plain) == "4 steps in 2 s, 2,500 tokens/s; loss 3.000 -> 1.500"
    eventful = RunSummary(
        steps=4, eval_losses=[(2, 2.0), (4, 1.0)], seconds=2.0, skipped=1, overflows=2,
        out_of_patience=True,
    )  # fmt: skip
    text = str(eventful)
    assert "evaluation loss 2.000 -> 1.000 (stopped early: eval.patience)" in text
    assert "1 steps had nothing to learn; 2 fp16 overflows" in text and "None" not in text
