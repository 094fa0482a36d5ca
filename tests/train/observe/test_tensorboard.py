"""TensorBoard's own reader finds in the files what a run has written, also after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from qwen_ds.train.observe.evaluation import Sample
from qwen_ds.train.observe.progress import Progress
from qwen_ds.train.observe.trackers import open_writers
from qwen_ds.train.observe.writers import Settings, TrackedRun
from tests.train.observe.test_progress import HARDWARE, lines, train


def opened(folder: Path, settings: Settings, saved: dict[str, Any] | None = None) -> Progress:
    first = saved["outcome"]["steps"] if saved else 0
    writers = open_writers(TrackedRun(folder, None, "run", settings, first, {}), [])
    if first == 0:
        writers.lengths(np.array([3, 5, 5]), np.array([1, 2, 2]))
    return Progress(folder, 6, 1, HARDWARE, writers, saved)


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0})
    return found.Reload()


def settings_shown(board: EventAccumulator) -> dict[str, Any]:
    """The one session of the HParams tab."""
    content = board.PluginTagToContent("hparams")
    session = plugin_data_pb2.HParamsPluginData.FromString(
        content["_hparams_/session_start_info"]
    ).session_start_info
    values = {key: value for key, value in session.hparams.items()}
    kinds = {"number_value", "string_value", "bool_value"}
    return {k: getattr(v, next(x for x in kinds if v.HasField(x))) for k, v in values.items()}


def test_everything_is_there(tmp_path: Path) -> None:
    settings: Settings = {"optim.lr": 0.5, "lora.targets": "a, b", "model.compile": True}
    with opened(tmp_path, settings) as progress:
        train(progress, 1, 6)
        progress.sampled(6, [Sample("question", "answer", "reference")])
    board = read(tmp_path)
    assert settings_shown(board) == settings
    experiment = plugin_data_pb2.HParamsPluginData.FromString(
        board.PluginTagToContent("hparams")["_hparams_/experiment"]
    ).experiment
    shown = {info.name.tag for info in experiment.metric_infos}
    assert shown == {"train/loss", "eval/loss"} <= set(board.Tags()["scalars"])
    assert "_hparams_/session_end_info" in board.PluginTagToContent("hparams")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name, tag in (("loss", "train/loss"), ("lr", "train/lr"), ("eval_loss", "eval/loss")):
        points = {event.step: event.value for event in board.Scalars(tag)}
        wanted = {row["step"]: row[name] for row in rows if name in row}
        assert points == pytest.approx(wanted) and wanted, tag  # it stores 32 bits
    (text,) = board.Tensors("samples/1/text_summary")
    assert b"question" in text.tensor_proto.string_val[0]
    (lengths,) = board.Histograms("data/tokens")
    (targets,) = board.Histograms("data/target_tokens")
    assert (lengths.histogram_value.num, lengths.histogram_value.sum) == (3, 13)
    assert targets.histogram_value.sum == 5


def test_a_resumed_run_has_one_session_and_each_step_once(tmp_path: Path) -> None:
    """Resumed after step 3, with other settings, when steps up to 5 had been written."""
    with opened(tmp_path, {"optim.epochs": 3.0, "optim.lr": 0.5}) as first:
        train(first, 1, 3)
        saved = json.loads(json.dumps(first.state()))
        train(first, 4, 5)
        first.summary().stopped_by = "SIGTERM"
    assert "_hparams_/session_end_info" not in read(tmp_path).PluginTagToContent("hparams")
    with opened(tmp_path, {"optim.epochs": 4.0, "optim.lr": 0.5}, saved) as second:
        train(second, 4, 6)
    board = read(tmp_path)
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in board.Scalars("eval/loss")] == [4]
    assert settings_shown(board) == {"optim.epochs": 4.0, "optim.lr": 0.5}
    assert len(board.Histograms("data/tokens")) == 1
    assert "_hparams_/session_end_info" in board.PluginTagToContent("hparams")


def test_a_run_that_begins_anew_takes_all_of_it_back(tmp_path: Path) -> None:
    """Killed before its first checkpoint."""
    for _ in range(2):
        with opened(tmp_path, {"seed": 1}) as progress:
            train(progress, 1, 2)
    board = read(tmp_path)
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]
    assert len(board.Histograms("data/tokens")) == 1
    assert len(lines(tmp_path)) == 2
