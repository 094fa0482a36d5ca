"""Metrics files: a resumed run writes the lines that an undisturbed one writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.model.configuration import QWenConfig
from qwen_ds.plan.shape import Shape
from qwen_ds.train.observe import progress as progress_module
from qwen_ds.train.observe.metrics import Hardware
from qwen_ds.train.observe.progress import Progress
from qwen_ds.train.observe.writers import Writers
from tests.train.observe.test_metrics import step

HARDWARE = Hardware(1, Shape.of(QWenConfig()), "lora", None)


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "memory_gb")
    return [{k: v for k, v in row.items() if k not in timed and "second" not in k} for row in found]


def train(progress: Progress, first: int, last: int) -> None:
    for number in range(first, last + 1):
        progress.begin_step()
        progress.end_step(step(number))
        if number == 4:
            progress.evaluated(number, 1.5)


def test_a_resumed_run_writes_the_same_lines(tmp_path: Path) -> None:
    """Stopped in the middle of a line's steps, after lines that the checkpoint does not know."""
    for name in ("calm", "stopped"):
        (tmp_path / name).mkdir()
    with Progress(tmp_path / "calm", 6, 2, HARDWARE, Writers()) as calm:
        train(calm, 1, 6)
    with Progress(tmp_path / "stopped", 6, 2, HARDWARE, Writers()) as first:
        train(first, 1, 3)
        saved = json.loads(json.dumps(first.state()))
        train(first, 4, 5)
    with Progress(tmp_path / "stopped", 6, 2, HARDWARE, Writers(), saved) as second:
        train(second, 4, 6)
    assert lines(tmp_path / "calm") == lines(tmp_path / "stopped")
    assert [row["step"] for row in lines(tmp_path / "calm")] == [2, 4, 4, 6]
    assert second.summary().tokens == calm.summary().tokens
    assert second.summary().eval_losses == [(4, 1.5)]


def test_tensorboard_on_a_full_disk_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with Progress(tmp_path, 2, 1, HARDWARE, Writers()) as progress:
        train(progress, 1, 2)
    assert len(lines(tmp_path)) == 2


def test_the_metrics_files_are_closed_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Progress(tmp_path, 2, 1, HARDWARE, Writers()) as progress:
        raise RuntimeError("a peer is gone")
    with pytest.raises(ValueError, match="closed"):
        progress.state()


def test_an_evaluation_loss_that_is_not_finite_is_null(tmp_path: Path) -> None:
    with Progress(tmp_path, 2, 1, HARDWARE, Writers()) as progress:
        progress.evaluated(1, float("nan"))
        progress.evaluated(2, 800.0)
    first, second = lines(tmp_path)
    assert first["eval_loss"] is None and first["eval_perplexity"] is None
    assert second["eval_loss"] == 800.0 and second["eval_perplexity"] is None


def test_the_end_is_estimated_from_the_steps_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute of compiling before ten steps of two seconds; 90 of them are left."""
    now, said = [0.0], list[str]()
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress_module, "say", said.append)
    with Progress(tmp_path, 100, 1, HARDWARE, Writers()) as progress:
        now[0] += 60
        for number in range(1, 11):
            progress.begin_step()
            now[0] += 2
            progress.end_step(step(number))
    assert len(said) == 1 and said[0].endswith("(3 min left)")
