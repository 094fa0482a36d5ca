"""Checkpoints on disk: damaged ones are found and passed over, the right ones are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen_ds.disk.weights import save_tensors
from qwen_ds.train.survive import checkpoint


def save(run: Path, step: int) -> Path:
    folder = checkpoint.unfinished_folder(run, step)
    tensors = {"a": torch.arange(6.0) + step, "b": torch.tensor([step], dtype=torch.uint8)}
    files = {"x.safetensors": save_tensors(folder / "x.safetensors", tensors)}
    target = checkpoint.finish(run, step, {"step": step}, files)
    checkpoint.tidy(run, step, None, 99)
    return target


def newest_step(run: Path) -> int:
    found = checkpoint.newest(run)
    assert found is not None
    return found.step


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "x.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "x.safetensors").write_bytes(data)


DAMAGES = {
    "flipped byte": (flip_a_byte, "x.safetensors is not what was saved"),
    "truncated": (lambda f: (f / "x.safetensors").write_bytes(b"12345"), "5 bytes"),
    "missing file": (lambda f: (f / "x.safetensors").unlink(), "x.safetensors is missing"),
    "no state": (lambda f: (f / "state.json").unlink(), "no state.json"),
    "half a state": (lambda f: (f / "state.json").write_text('{"step": 2, "f'), "is damaged"),
    "another format": (lambda f: (f / "state.json").write_text('{"format": 99}'), "format 99"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_line(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    do, said = DAMAGES[damage]
    do(save(tmp_path, 2))
    assert newest_step(tmp_path) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "step_000002 is passed over: " in line and said in line


def test_latest_is_for_people_and_may_be_missing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert (tmp_path / "latest").read_text() == "step_000002\n"
    (tmp_path / "latest").unlink()
    assert newest_step(tmp_path) == 2


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
        checkpoint.tidy(tmp_path, step, 2, 2)
    assert checkpoint.steps_saved(tmp_path) == [2, 4, 5]
    assert (tmp_path / "best").read_text() == "step_000002\n"


def test_a_run_that_steps_back_keeps_what_it_goes_on_from(tmp_path: Path) -> None:
    """Steps 2 and 3 are damaged and newer than what is saved now; a folder of the user's is none of
    ours."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (2, 3):
        flip_a_byte(checkpoint.step_folder(tmp_path, step))
    (tmp_path / "checkpoints" / "step_000001_mine").mkdir()
    assert newest_step(tmp_path) == 1
    checkpoint.tidy(tmp_path, 1, None, 1)
    assert newest_step(tmp_path) == 1
    assert (tmp_path / "checkpoints" / "step_000001_mine").is_dir()


def test_a_save_of_the_same_step_replaces_a_damaged_one(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "x.safetensors").unlink()
    save(tmp_path, 1)
    assert newest_step(tmp_path) == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
