"""The four trackers, by their own libraries and without a network: what they store are the numbers
of metrics.jsonl, in one run that a resumed training continues."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_ds.train.observe.evaluation import Sample
from qwen_ds.train.observe.progress import Progress
from qwen_ds.train.observe.trackers import open_writers
from qwen_ds.train.observe.writers import TrackedRun
from tests.train.observe.test_progress import HARDWARE, train

ROOT = Path(__file__).parents[3]
NAMES = ["wandb", "swanlab", "mlflow", "trackio"]
SETTINGS = {"optim.lr": 0.5, "lora.targets": "c_attn, c_proj", "model.compile": True}
Series = dict[str, dict[int, float]]


def write(folder: Path) -> None:
    """Six steps, resumed after the third, when five had been written."""

    def opened(saved: dict[str, Any] | None) -> Progress:
        first, ids = (saved["outcome"]["steps"], saved["trackers"]) if saved else (0, {})
        run = TrackedRun(folder, "a-project", "a run", SETTINGS, first, ids)
        writers = open_writers(run, NAMES)
        if saved is None:
            writers.lengths(np.array([3, 5]), np.array([1, 2]))
        return Progress(folder, 6, 1, HARDWARE, writers, saved)

    with opened(None) as progress:
        train(progress, 1, 3)
        saved = json.loads(json.dumps(progress.state()))
        train(progress, 4, 5)
        progress.summary().stopped_by = "SIGTERM"
    assert saved["trackers"].keys() == set(NAMES), saved
    with opened(saved) as progress:
        train(progress, 4, 6)
        progress.sampled(6, [Sample("question", "answer", "reference")])
    assert not [t.name for t in threading.enumerate() if t.name.startswith("tracker")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, written by a process of its own, which leaves no other behind."""
    folder = tmp_path_factory.mktemp("run")
    home = tmp_path_factory.mktemp("home")
    words = ("WANDB_", "SWANLAB_", "MLFLOW_", "TRACKIO_", "HF_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(words)}
    environment = clean | {
        "HOME": str(home), "TRACKIO_DIR": str(folder / "trackio"), "PYTHONPATH": str(ROOT),
        # Whoever tries the network fails at once.
        "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9",
    }  # fmt: skip
    script = f"from pathlib import Path; from {__name__} import write; write(Path({str(folder)!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=home, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "given up" not in output and "not taken" not in output, output
    with pytest.raises(ProcessLookupError):  # nobody is left in its group
        os.killpg(process.pid, 0)
    assert [path.name for path in home.iterdir() if not path.name.startswith(".")] == []
    return folder


@pytest.fixture
def wanted(folder: Path) -> Series:
    """Every number of metrics.jsonl, by tag and step."""
    found: Series = defaultdict(dict)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            group = "eval" if name.startswith("eval_") else "train"
            found[f"{group}/{name.removeprefix('eval_')}"][step] = value
    assert list(found["train/loss"]) == [1, 2, 3, 4, 5, 6] and list(found["eval/loss"]) == [4]
    return found


# Steps 4 and 5 are there twice, from before and after the resume, with the seconds that each took.
# Trackers differ in which one they show.
TIMED = ("seconds", "second", "memory_gb")


def check(found: Series, wanted: Series) -> None:
    assert found.keys() == wanted.keys()
    for tag, points in wanted.items():
        assert found[tag].keys() == points.keys(), tag
        twice = (4, 5) if any(word in tag for word in TIMED) else ()
        for step, value in points.items():
            assert found[tag][step] == value or step in twice, (tag, step)


def test_mlflow_has_the_numbers(folder: Path, wanted: Series) -> None:
    (metrics,) = folder.glob("mlruns/*/*/metrics")
    found: Series = defaultdict(dict)
    for file in metrics.glob("*/*"):
        for line in file.read_text().splitlines():
            _, value, step = line.split()
            found[f"{file.parent.name}/{file.name}"][int(step)] = float(value)
    check(found, wanted)
    run = metrics.parent
    params = {file.name: file.read_text() for file in (run / "params").iterdir()}
    assert params == {key: str(value) for key, value in SETTINGS.items()}
    assert (run / "tags" / "mlflow.runName").read_text() == "a run"
    assert "name: a-project" in (run.parent / "meta.yaml").read_text()
    assert "status: 3\n" in (run / "meta.yaml").read_text(), "FINISHED"


def test_trackio_has_the_numbers(folder: Path, wanted: Series) -> None:
    with sqlite3.connect(folder / "trackio" / "a-project.db") as store:
        rows = list(store.execute("select run_id, run_name, step, metrics from metrics"))
        ((config,),) = store.execute("select config from configs")
    assert len({run for run, *_ in rows}) == 1
    assert {name[:-6] for _, name, *_ in rows} == {"a run-"}
    found: Series = defaultdict(dict)
    texts = set()
    for _, _, step, metrics in rows:
        for tag, value in json.loads(metrics).items():
            if isinstance(value, int | float):
                found[tag][step] = value
            else:
                texts.add((tag, step))
    check(found, wanted)
    assert texts == {("data/tokens", 0), ("data/target_tokens", 0), ("samples/1", 6)}
    assert SETTINGS.items() <= json.loads(config).items()


def test_wandb_has_the_numbers(folder: Path, wanted: Series) -> None:
    from swanlab.converter.wb.wbdatastore import WBDataStoreReader
    from wandb.proto.wandb_internal_pb2 import Record

    found: Series = defaultdict(dict)
    others, ids, ends = set(), set(), []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        with WBDataStoreReader() as reader:
            reader.open(file)
            while data := reader.scan():
                record = Record.FromString(data)
                if record.HasField("run"):
                    ids.add((record.run.run_id, record.run.project, record.run.display_name))
                    config = {e.key: json.loads(e.value_json) for e in record.run.config.update}
                    assert SETTINGS.items() <= config.items()
                if record.HasField("exit"):
                    ends.append(record.exit.exit_code)
                step = record.history.step.num
                for item in record.history.item:
                    tag, *inner = [item.key] if item.key else item.nested_key
                    value = json.loads(item.value_json)
                    if inner or not isinstance(value, int | float):
                        others.add((tag, step))
                    elif not tag.startswith("_"):
                        found[tag][step] = value
    check(found, wanted)
    assert others == {("data/tokens", 0), ("data/target_tokens", 0), ("samples", 6)}
    assert len(ids) == 1 and ids.pop()[1:] == ("a-project", "a run") and ends == [1, 0]


def test_swanlab_has_the_numbers(folder: Path, wanted: Series) -> None:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.proto.swanlab.run.v1.run_pb2 import RunState
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    found: Series = defaultdict(dict)
    files = sorted(folder.glob("swanlog/run-*/*.swanlab"))
    assert len(files) == 2 and len({file.name for file in files}) == 1, "one id"
    states, texts = [], set()
    for file in files:
        reader = DataStoreReader()
        reader.open(file)
        for record in map(Record.FromString, reader):
            if record.HasField("scalar"):
                found[record.scalar.key][record.scalar.step] = record.scalar.value.number
            elif record.HasField("media"):
                texts.add((record.media.key, record.media.step))
            elif record.HasField("start"):
                assert (record.start.project, record.start.name) == ("a-project", "a run")
            elif record.HasField("finish"):
                states.append(RunState.Name(record.finish.state))
        reader.close()
        config = (file.parent / "files" / "config.yaml").read_text()
        assert all(name in config for name in SETTINGS)
    check(found, wanted)
    assert texts == {("samples", 6)}
    assert states == ["RUN_STATE_ABORTED", "RUN_STATE_FINISHED"]
