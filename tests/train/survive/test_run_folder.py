"""A run folder is ours, new, or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from qwen_ds.errors import UserError
from qwen_ds.plan.resolve import resolve
from qwen_ds.plan.run import Base, Machine
from qwen_ds.recipe.loading import load_recipe
from qwen_ds.train.lora import ParameterCount
from qwen_ds.train.survive import run_folder
from qwen_ds.train.survive.identity import Began


def test_a_folder_with_anything_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds 'thesis.tex' and is no run folder"):
        run_folder.claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_leftovers_of_a_killed_start_are_no_strangers(small_dir: Path, tmp_path: Path) -> None:
    """Killed before recipe.yaml, or while it was written: such a folder holds no run yet."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0.log").touch()
    for name in ("ds_config.json", ".environment.json.unfinished", ".recipe.yaml.unfinished"):
        (tmp_path / name).write_text("{")
    (tmp_path / "environment.json").touch()
    run_folder.claim(tmp_path)
    assert not run_folder.holds_run(tmp_path)
    asked = load_recipe(["--model.path", str(small_dir), "--output_dir", str(tmp_path)])
    machine = Machine(ranks=1, ranks_per_machine=1, on_gpu=False, memory=1e10, memory_source="")
    run = resolve(asked, machine, Base.read(small_dir), rows=False)
    began = Began.of(run)
    run_folder.write_resolved(run, torch.device("cpu"), ParameterCount(1, 2), {}, began)
    assert run_folder.holds_run(tmp_path)
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]


def test_a_run_is_finished_once_result_and_report_are_there(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    assert not run_folder.is_finished(tmp_path)
    (tmp_path / "report.html").touch()
    assert run_folder.is_finished(tmp_path)


def test_a_second_run_on_the_folder_is_refused_before_it_writes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with run_folder.claimed(folder):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        told = f"output_dir .*run is being written by process {os.getpid()} on "
        with pytest.raises(UserError, match=told), run_folder.claimed(folder):
            pass
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert not list(folder.iterdir())
    with run_folder.claimed(folder):
        pass


def test_a_folder_that_is_no_run_folder_gets_no_lock(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="no run folder"), run_folder.claimed(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_lock_of_a_killed_run_is_no_stranger(tmp_path: Path) -> None:
    holder = {"host": os.uname().nodename, "pid": 2**22 + 1, "since": "2026-01-01 00:00:00"}
    (tmp_path / run_folder.LOCK).write_text(json.dumps(holder))
    with run_folder.claimed(tmp_path):
        assert json.loads((tmp_path / run_folder.LOCK).read_text())["pid"] == os.getpid()
