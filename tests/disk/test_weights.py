"""Files of weights: the header, dtypes, and files by the safetensors library."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from qwen_ds.disk.weights import (
    DTYPE_NAMES,
    FLOAT_DTYPES,
    TORCH_DTYPES,
    file_facts,
    file_sha256,
    header_bytes,
    open_tensors,
    read_header,
    save_tensors,
)
from qwen_ds.errors import UserError

TENSORS = {
    "matrix": torch.arange(35, dtype=torch.float32).reshape(7, 5),
    "scalar": torch.tensor(3.25),
    "empty": torch.zeros(0, 4),
    "ids": torch.tensor([[1, 2], [3, 2**40]]),
}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt", "note": "x"})
    return tmp_path / "a.safetensors"


def with_header(path: Path, entries: dict[str, object], num_bytes: int) -> Path:
    raw = json.dumps(entries).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(num_bytes))
    return path


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_every_dtype_has_the_library_s_name_and_size(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(3, 2).to(dtype)}, path)
    with safe_open(path, framework="pt") as file:
        assert file.get_slice("x").get_dtype() == DTYPE_NAMES[dtype]
    (spec,) = read_header(path).tensors
    assert (spec.dtype, spec.num_bytes) == (DTYPE_NAMES[dtype], 6 * dtype.itemsize)


def test_a_recipe_s_dtypes_are_those_that_weights_may_have() -> None:
    assert set(TORCH_DTYPES.values()) == set(FLOAT_DTYPES.values())
    assert all(str(dtype) == f"torch.{name}" for name, dtype in TORCH_DTYPES.items())


def test_a_header_is_read_as_the_library_wrote_it_and_written_again(stored: Path) -> None:
    header, raw = read_header(stored), stored.read_bytes()
    assert {spec.name: spec.shape for spec in header.tensors} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }
    assert header.metadata == {"format": "pt", "note": "x"}
    start = header.starts["matrix"]
    assert raw[start : start + 140] == TENSORS["matrix"].numpy().tobytes()
    again = stored.with_name("b.safetensors")
    again.write_bytes(header_bytes(header.tensors, header.metadata) + raw[header.data_start :])
    read = load_file(again)
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_saved_tensors_are_on_the_disk_readable_by_all_and_hashed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = save_tensors(path, {"x": TENSORS["matrix"].T}, {"note": "y"})
    assert digest == file_sha256(path) == file_facts(path)["sha256"]
    assert file_facts(path)["bytes"] == path.stat().st_size
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert torch.equal(load_file(path)["x"], TENSORS["matrix"].T)
    assert read_header(path).metadata == {"format": "pt", "note": "y"}


def test_a_refusal_of_the_system_is_an_oserror_and_not_the_library_s(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory"):
        save_tensors(tmp_path / "nowhere" / "a.safetensors", TENSORS)


def test_a_pointer_of_git_lfs_is_no_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"a\.safetensors: a Git LFS pointer"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_file_is_refused(stored: Path, keep: int) -> None:
    whole = stored.read_bytes()
    stored.write_bytes(whole[:keep])
    with pytest.raises(UserError, match=r"a\.safetensors: .*expected a whole safetensors file"):
        read_header(stored)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "at 0..4, not where its shape"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "x lies at 4..8"),
        ({"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}, "x has dtype Q4"),
        ({"dtype": "F32", "data_offsets": [0, 4]}, "a broken header"),
        ([], "a broken header"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    tmp_path: Path, entry: object, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        read_header(with_header(tmp_path / "a.safetensors", {"x": entry}, 8))


@pytest.mark.parametrize(
    "raw",
    [
        '{"__metadata__":{"by":"\\ud800"}}',
        '{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        '{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"y":Infinity}}',
    ],
)
def test_a_header_that_only_python_can_read_is_refused(tmp_path: Path, raw: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw.encode())
    with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
        pass
    with pytest.raises(UserError, match=r"a\.safetensors: .*expected a whole safetensors file$"):
        read_header(path)


def test_what_the_library_refuses_to_read_is_one_line_that_names_the_file(stored: Path) -> None:
    with (
        pytest.raises(UserError, match=r"a\.safetensors: .*nothing.*expected a whole") as caught,
        open_tensors(stored) as file,
    ):
        file.get_tensor("nothing")
    assert "\n" not in str(caught.value)


def test_a_header_may_have_no_metadata(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path = with_header(tmp_path / "a.safetensors", {"__metadata__": None, "x": entry}, 4)
    assert read_header(path).metadata == {}
