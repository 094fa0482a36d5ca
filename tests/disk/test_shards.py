"""The weight files of a folder: how they are found, and how new ones are cut and indexed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen_ds.disk.shards import (
    INDEX_NAME,
    SINGLE_NAME,
    find_weight_files,
    open_stored,
    plan_shards,
    write_index,
)
from qwen_ds.errors import UserError


def test_files_are_filled_in_order_and_a_large_tensor_gets_one_of_its_own() -> None:
    assert plan_shards({"a": 4, "b": 6, "c": 1}, 10) == {
        "model-00001-of-00002.safetensors": ["a", "b"],
        "model-00002-of-00002.safetensors": ["c"],
    }
    assert plan_shards({"a": 4, "b": 6}, 10) == {SINGLE_NAME: ["a", "b"]}
    files = plan_shards({"a": 4, "large": 20, "b": 6}, 10)
    assert sorted(files.values()) == [["a", "b"], ["large"]]


def test_an_index_that_was_written_is_found_with_its_files(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(2) for name in ("b", "a", "c")}
    members = plan_shards({name: tensor.nbytes for name, tensor in tensors.items()}, 16)
    for file, group in members.items():
        save_file({name: tensors[name] for name in group}, tmp_path / file)
    write_index(tmp_path, members, 24, {"made_by": "someone", "total_size": 0})
    found = find_weight_files(tmp_path)
    assert found is not None and found.names == tuple(members)
    assert found.metadata == {"made_by": "someone", "total_size": 24}
    assert found.weight_map is not None and list(found.weight_map) == ["a", "b", "c"]
    stored = open_stored(tmp_path)
    assert sorted(stored.tensors) == ["a", "b", "c"] and stored.index_name == INDEX_NAME


def test_a_single_file_goes_before_an_index_and_safetensors_before_pickles(tmp_path: Path) -> None:
    assert find_weight_files(tmp_path) is None
    (tmp_path / "pytorch_model.bin").touch()
    assert find_weight_files(tmp_path, allow_pickle=False) is None
    found = find_weight_files(tmp_path)
    assert found is not None and found.names == ("pytorch_model.bin",)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    (tmp_path / "x.safetensors").touch()
    found = find_weight_files(tmp_path)
    assert found is not None and found.names == ("x.safetensors",)
    (tmp_path / SINGLE_NAME).touch()
    found = find_weight_files(tmp_path)
    assert found is not None and (found.names, found.weight_map) == ((SINGLE_NAME,), None)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not readable as JSON"),
        ("{}", "no weight_map; expected the file of every tensor"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "expected a .safetensors file in the same"),
        ('{"weight_map": {"a": "b.py"}}', "names the shard 'b.py'"),
        ('{"weight_map": {"a": "b.safetensors"}}', r"b\.safetensors is missing \(1 of 1 weight"),
    ],
)
def test_an_index_of_anything_but_whole_safe_files_is_refused(
    tmp_path: Path, index: str, message: str
) -> None:
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(UserError, match=message):
        find_weight_files(tmp_path)


def test_a_pickle_that_is_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="a Git LFS pointer, .* `git lfs pull`"):
        open_stored(tmp_path, allow_pickle=True)
