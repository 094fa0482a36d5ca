"""What a run begins with: whatever changes in it is found, and what does not matter is not."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_ds.disk.read import read_json
from qwen_ds.errors import UserError
from qwen_ds.plan.resolve import resolve
from qwen_ds.plan.run import Base, Machine, Run
from qwen_ds.recipe.loading import load_recipe
from qwen_ds.train.survive import identity
from qwen_ds.train.survive.identity import Began, WholeFiles, changes, files_of, other_versions


def run_of(base: Path, *options: str) -> Run:
    asked = load_recipe(["--model.path", str(base), "--output_dir", "unused", *options])
    machine = Machine(1, 1, False, 1e10, "")
    return resolve(asked, machine, Base.read(base), rows=False)


@pytest.fixture
def base(small_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_dir, tmp_path / "base"))


def test_the_same_files_begin_the_same_run_and_come_back_from_json(base: Path) -> None:
    began = Began.of(run_of(base))
    stored = Began.stored(json.loads(json.dumps(began.as_json())))
    assert stored == began == Began.of(run_of(base))
    assert list(began.files) == ["base/model.safetensors"] and began.settings["hidden_size"] == 64


@pytest.mark.parametrize("found", [None, {}, {"unknown": 1}, [], "text"])
def test_another_releases_record_is_known_as_one(found: object) -> None:
    assert Began.stored(found) is None


def test_keys_that_change_no_number_may_change(base: Path) -> None:
    began = Began.of(run_of(base))
    config = read_json(base / "config.json")
    config |= {"transformers_version": "9", "use_cache": False, "auto_map": {}, "new_key": 1}
    config["n_layer_unused"] = 7
    (base / "config.json").write_text(json.dumps(config, indent=7))
    generation = read_json(base / "generation_config.json") | {"temperature": 0.1}
    (base / "generation_config.json").write_text(json.dumps(generation))
    assert not list(changes(began, Began.of(run_of(base))))


def test_every_tensor_that_changes_is_found_at_once(tmp_path: Path) -> None:
    """Of a file too large to be read whole."""
    file = tmp_path / "model.safetensors"
    tensors = {f"t{i}": torch.randn(100 + i, 1000) for i in range(9)}
    save_file(tensors, file)
    assert file.stat().st_size > identity.BLOCKS_OF_A_PICKLE * identity.BLOCK_BYTES
    first = identity.quick_sha256(file)
    assert identity.quick_sha256(file) == first
    for name in tensors:
        save_file(tensors | {name: tensors[name] * 2}, file)
        assert identity.quick_sha256(file) != first, name
    save_file(tensors, file, metadata={"format": "pt"})
    assert identity.quick_sha256(file) != first


def test_a_pickle_is_sampled_and_a_small_file_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    for size, step in ((8 << 20, 1 << 16), (1000, 99)):
        content = bytearray(os.urandom(size))
        file.write_bytes(content)
        first = identity.quick_sha256(file)
        for start in range(0, size, step):
            changed = content[:start] + bytes(step) + content[start + step :]
            file.write_bytes(changed[:size])
            assert identity.quick_sha256(file) != first
        file.write_bytes(content + b"x")
        assert identity.quick_sha256(file) != first


def test_little_is_read_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    save_file({f"t{i}": torch.zeros(1000, 1000) for i in range(20)}, file)
    read: list[int] = []
    pread = os.pread

    def counting(descriptor: int, length: int, start: int) -> bytes:
        read.append(length)
        return pread(descriptor, length, start)

    monkeypatch.setattr(os, "pread", counting)
    identity.quick_sha256(file)
    assert sum(read) < file.stat().st_size / 100


def test_other_libraries_are_named(base: Path) -> None:
    began = Began.of(run_of(base))
    assert other_versions(began, began) is None
    old = replace(began, versions=began.versions | {"torch": "2.0", "gone": "1"})
    told = f"gone was 1 and is none, torch was 2.0 and is {began.versions['torch']}"
    assert other_versions(old, began) == told


def test_a_kernel_library_is_named_where_it_computes(base: Path) -> None:
    run = run_of(base, "--model.compile", "false")
    fused = replace(run, machine=replace(run.machine, liger="0.8.5"))
    told = "liger-kernel was 0.8.5 and is none"
    assert other_versions(Began.of(fused), Began.of(run)) == told
    compiled = run_of(base, "--model.compile", "true")
    compiled = replace(compiled, machine=fused.machine)
    assert other_versions(Began.of(compiled), Began.of(run)) is None


def whole(base: Path, tmp_path: Path, known: dict[str, str] | None = None) -> WholeFiles:
    run = run_of(base)
    began = replace(Began.of(run), whole=known or {})
    return WholeFiles(began, files_of(run), tmp_path / "identity.json")


def test_every_byte_is_recorded_and_compared_by_the_next_start(base: Path, tmp_path: Path) -> None:
    with whole(base, tmp_path) as first:
        first.wait()  # nothing to compare with: no save waits
        first._thread.join()
        first.wait()
    stored = Began.stored(read_json(tmp_path / "identity.json"))
    assert stored == first.began and list(stored.whole) == ["base/model.safetensors"]
    with whole(base, tmp_path, stored.whole) as again:
        again.wait()
    # A byte that no quick hash of a large file would see.
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-1000] ^= 1
    (base / "model.safetensors").write_bytes(content)
    with (
        whole(base, tmp_path, stored.whole) as changed,
        pytest.raises(UserError, match=r"model\.safetensors: was sha256 .*nothing was saved"),
    ):
        changed.wait()


def test_a_base_that_cannot_be_read_again_ends_no_run(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"base/model.safetensors": "0" * 64}
    reader = whole(base, tmp_path, known)
    (base / "model.safetensors").unlink()
    with reader:
        reader.wait()
    assert "No such file or directory; its bytes are not compared" in capsys.readouterr().out


def test_a_run_that_ends_early_leaves_no_reader_behind(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, ends = threading.Event(), threading.Event()

    def slow(self: WholeFiles, path: Path) -> None:
        reading.set()
        assert self._ends.wait(20)
        ends.set()

    monkeypatch.setattr(WholeFiles, "_sha256", slow)
    with whole(base, tmp_path) as reader:
        assert reading.wait(20)
        reader.wait()
    assert ends.is_set() and not reader._thread.is_alive()
    assert not (tmp_path / "identity.json").exists()


def test_a_save_at_a_stop_waits_for_some_seconds_only(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And tells a base that was compared from one that was not."""
    goes_on, sha256 = threading.Event(), WholeFiles._sha256

    def slow(self: WholeFiles, path: Path) -> str | None:
        assert goes_on.wait(20)
        return sha256(self, path)

    monkeypatch.setattr(WholeFiles, "_sha256", slow)
    file = files_of(run_of(base))["base/model.safetensors"]
    known = {"base/model.safetensors": hashlib.sha256(file.read_bytes()).hexdigest()}
    with whole(base, tmp_path, known) as reader:
        reader.wait(0.05)
        assert not reader.compared
        goes_on.set()
        reader.wait()
        assert reader.compared
    with whole(base, tmp_path, {}) as first:
        assert first.compared, "nothing is claimed where nothing is known"


def test_a_checkpoint_of_a_changed_base_is_named(base: Path, tmp_path: Path) -> None:
    run, step = run_of(base), tmp_path / "step_000007"
    began = replace(Began.of(run), whole={"base/model.safetensors": "0" * 64})
    with (
        WholeFiles(began, files_of(run), tmp_path / "identity.json", step) as changed,
        pytest.raises(UserError, match="step_000007 was saved before this was known: remove it"),
    ):
        changed.wait()


def test_the_first_adapter_counts_in_either_form(base: Path, golden: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(golden / "lora" / "adapter", tmp_path / "adapter"))
    config = read_json(adapter / "adapter_config.json")
    options = [
        "--lora.init_from", str(adapter), "--lora.r", str(config["r"]),
        "--lora.alpha", str(config["lora_alpha"]), "--lora.special_rows", "off",
        "--lora.targets", json.dumps(sorted(config["target_modules"])),
    ]  # fmt: skip
    began = Began.of(run_of(base, *options))
    assert {name for name in began.files if name.startswith("adapter/")} == {
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    }  # fmt: skip
    file = adapter / "adapter_model.safetensors"
    save_file({k: v + 1 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    (change,) = changes(began, Began.of(run_of(base, *options)))
    assert change.option == "lora.init_from" and change.what == file.name
    assert pickle.dumps(began)  # the ranks send it to each other
