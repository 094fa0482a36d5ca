"""The result of a run: a folder that is complete or absent, cut into files one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen_ds.errors import UserError
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.train.survive import result
from qwen_ds.train.survive.watchdog import Watchdog


def test_a_large_model_lies_in_several_files(
    small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What 4 GB are to a 7B: files with the usual names, an index, and the whole loads."""
    monkeypatch.setattr(result, "plan_shards", partial(result.plan_shards, max_bytes=200_000))
    tensors = load_file(small_dir / "model.safetensors")
    output = result.Output(tmp_path, small_dir, torch.float32, None)
    written = output.write_values(tmp_path, tensors)
    model = tmp_path / "model"
    index = json.loads((model / "model.safetensors.index.json").read_text())
    files = sorted(model.glob("model-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(written) == {f"model/{f.name}" for f in model.iterdir()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    loaded = dict(QWenLMHeadModel.from_pretrained(model).named_parameters())
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], tensors[k]) for k in tensors)


@pytest.fixture
def engine(small_dir: Path) -> Any:
    """Gathers the tensors of `small` one by one."""
    tensors = load_file(small_dir / "model.safetensors")

    def all_tensors(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            made.gathered.append(name)
            yield name, tensor.to(dtype)

    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    made = SimpleNamespace(all_tensors=all_tensors, sizes=lambda: sizes, gathered=[])
    return made


def test_a_file_is_written_before_the_next_ones_tensors_are_gathered(
    engine: Any, small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result, "plan_shards", partial(result.plan_shards, max_bytes=200_000))
    real, written = result.save_tensors, []

    def save(path: Path, tensors: dict[str, Tensor]) -> str:
        written.extend(tensors)
        assert engine.gathered == written
        return real(path, tensors)

    monkeypatch.setattr(result, "save_tensors", save)
    output = result.Output(tmp_path, small_dir, torch.bfloat16, None)
    output.save_final(engine, Watchdog(10, launched=False))
    loaded = dict(QWenLMHeadModel.from_pretrained(tmp_path / "model").named_parameters())
    assert written == list(engine.sizes()) and set(loaded) == set(written)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_told_and_leaves_the_old_result(
    engine: Any, small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors are gathered none the less: the other ranks are in those collectives."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()

    def full(path: Path, tensors: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result, "save_tensors", full)
    output = result.Output(tmp_path, small_dir, torch.bfloat16, None)
    with pytest.raises(UserError, match="No space left on device.*the newest checkpoint holds it"):
        output.save_final(engine, Watchdog(10, launched=False))
    assert engine.gathered == list(engine.sizes())
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["model", "model/old"]
