"""Wrong input of a merge: one line, before anything is written, and all that was there stays."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_ds.errors import UserError
from qwen_ds.export.formats import find_format
from qwen_ds.export.qwen2.adapter import convert_adapter
from qwen_ds.export.stream.blocks import BlockWriter
from tests.export.folders import as_pickles, merge_with, peft_adapter, shard


def _not_an_adapter(base: Path, adapter: Path, output: Path) -> None:
    (adapter / "adapter_config.json").unlink()


def _other_method(base: Path, adapter: Path, output: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"peft_type": "LOHA"}')


def _other_base(base: Path, adapter: Path, output: Path) -> None:
    _replace(adapter, "transformer.h.0.mlp.w1.lora_B.weight", torch.zeros(200, 4))


def _deeper_base(base: Path, adapter: Path, output: Path) -> None:
    _replace(adapter, "transformer.h.7.mlp.w1.lora_A.weight", torch.zeros(4, 64))
    _replace(adapter, "transformer.h.7.mlp.w1.lora_B.weight", torch.zeros(176, 4))


def _other_rank(base: Path, adapter: Path, output: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 7}))


def _truncated_adapter(base: Path, adapter: Path, output: Path) -> None:
    os.truncate(adapter / "adapter_model.safetensors", 5000)


def _pickled_adapter(base: Path, adapter: Path, output: Path) -> None:
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()


def _rejected_in_the_way(base: Path, adapter: Path, output: Path) -> None:
    output.with_name("out.rejected").mkdir()
    (output.with_name("out.rejected") / "notes.txt").write_text("mine")


def _unknown_key(base: Path, adapter: Path, output: Path) -> None:
    _replace(adapter, "transformer.h.0.mlp.w1.hada_w1", torch.zeros(4, 64))


def _nan(base: Path, adapter: Path, output: Path) -> None:
    _replace(adapter, "transformer.h.2.mlp.w1.lora_B.weight", torch.full((176, 4), float("nan")))


def _replace(adapter: Path, name: str, value: Tensor) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({**tensors, f"base_model.model.{name}": value}, adapter / "adapter_model.safetensors")


def _occupied(base: Path, adapter: Path, output: Path) -> None:
    output.mkdir()
    (output / "notes.txt").write_text("mine")


def _in_the_way(base: Path, adapter: Path, output: Path) -> None:
    output.with_name("out.partial").mkdir()
    (output.with_name("out.partial") / "notes.txt").write_text("mine")


def _missing_shard(base: Path, adapter: Path, output: Path) -> None:
    shard(base, load_file(base / "model.safetensors"), 3)
    (base / "model-00002-of-00003.safetensors").unlink()


def _foreign_index(base: Path, adapter: Path, output: Path) -> None:
    shard(base, load_file(base / "model.safetensors"), 2)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["transformer.h.9.ln_1.weight"] = "model-00001-of-00002.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def _truncated(base: Path, adapter: Path, output: Path) -> None:
    os.truncate(base / "model.safetensors", 400_000)


def _only_pickles(base: Path, adapter: Path, output: Path) -> None:
    as_pickles(base)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_not_an_adapter, r"adapter: no adapter_config\.json; expected a PEFT adapter folder"),
        (_other_method, r"adapter_config\.json: peft_type is 'LOHA'; expected 'LORA'"),
        (
            _other_base,
            r"h\.0\.mlp\.w1\.lora_B\.weight is \[200, 4\]; expected \[176, 4\], since"
            r" .*w1\.weight is \[176, 64\]",
        ),
        (
            _deeper_base,
            r"h\.7\.mlp\.w1\.lora_A\.weight changes .*h\.7\.mlp\.w1\.weight, which this base"
            " does not have",
        ),
        (
            _other_rank,
            r"adapter: .*lora_A\.weight is \[4, \d+\]; expected rank 7, as adapter_config\.json"
            " says",
        ),
        (_truncated_adapter, r"adapter_model\.safetensors: .*the file is cut off or damaged"),
        (_pickled_adapter, r"adapter_model\.bin: a pickle; expected adapter_model\.safetensors"),
        (_unknown_key, r"unknown tensor base_model\.model\.transformer\.h\.0\.mlp\.w1\.hada_w1"),
        (_nan, r"transformer\.h\.2\.mlp\.w1\.weight: rows 0 to 176 hold NaN or infinity"),
        (_occupied, r"out: exists and is not empty"),
        (_in_the_way, r"out\.partial: in the way and not a killed merge's"),
        (_rejected_in_the_way, r"out\.rejected: in the way and not an earlier merge's"),
        (
            _missing_shard,
            r"model-00002-of-00003\.safetensors is missing \(1 of 3 weight files are\)",
        ),
        (_foreign_index, r"disagrees with its shards about transformer\.h\.9\.ln_1\.weight"),
        (_truncated, r"model\.safetensors: 400000 bytes, the header says \d+: the file is cut off"),
        (
            _only_pickles,
            r"base: only pytorch_model\*\.bin, which are pickles; .*\(--allow_pickle true reads",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    base_dir: Path,
    golden: Path,
    tmp_path: Path,
    spoil: Callable[[Path, Path, Path], None],
    message: str,
) -> None:
    adapter, output = (
        Path(shutil.copytree(golden / "lora" / "adapter", tmp_path / "adapter")),
        tmp_path / "out",
    )
    spoil(base_dir, adapter, output)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        merge_with(base_dir, [adapter], output)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_copy_of_the_head_beside_lora_on_it_must_be_the_base_s(
    base_dir: Path, tmp_path: Path
) -> None:
    """peft saves it unasked; it changes nothing, and says which base the adapter was trained on."""
    expected = peft_adapter(base_dir, tmp_path / "adapter", target_modules=["lm_head"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    assert "base_model.model.lm_head.base_layer.weight" in tensors
    report = merge_with(base_dir, [tmp_path / "adapter"], tmp_path / "out", block_bytes=3000)
    assert {name: after.kind for name, after in report.changed.items()} == {
        "lm_head.weight": "lora"
    }
    merged = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(merged, expected["lm_head.weight"], rtol=1e-6, atol=2e-6)
    tensors["base_model.model.lm_head.base_layer.weight"][100, 3] += 1
    save_file(tensors, path)
    with pytest.raises(
        UserError,
        match=r"its copy of lm_head\.weight differs from the base's in rows \d+ to \d+; exp",
    ):
        merge_with(base_dir, [tmp_path / "adapter"], tmp_path / "other", block_bytes=3000)
    assert not list(tmp_path.glob("other*"))


def test_pickles_are_read_where_they_are_allowed(
    base_dir: Path, golden: Path, tmp_path: Path
) -> None:
    """One file, shards, or an adapter: the output is that of the same weights in safetensors."""
    adapter, tensors = golden / "lora" / "adapter", load_file(base_dir / "model.safetensors")
    merge_with(base_dir, [adapter], tmp_path / "expected")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    single = Path(shutil.copytree(base_dir, tmp_path / "single"))
    as_pickles(single)
    pickled = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    _pickled_adapter(single, pickled, single)
    report = merge_with(
        single, [pickled], tmp_path / "out", proof="auto", allow_pickle=True, block_bytes=3000
    )
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        torch.allclose(merged[name], tensor, rtol=0, atol=1e-6) for name, tensor in expected.items()
    )
    assert report.verification is not None and report.verification.status == "passed"
    for name, path in (("pytorch_model.bin", single), ("adapter/adapter_model.bin", tmp_path)):
        assert (
            report.inputs[name]["sha256"] == hashlib.sha256((path / name).read_bytes()).hexdigest()
        )
    assert not list((tmp_path / "out").glob("*.bin"))

    shard(base_dir, tensors, 2)
    as_pickles(base_dir)
    report = merge_with(
        base_dir, [adapter], tmp_path / "sharded", allow_pickle=True, proof="sampled"
    )
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
    }
    assert report.verification is not None and report.verification.status == "passed"


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"x": torch.ones(2), "y": _Code()},
            r"pytorch_model\.bin: not a whole file of plain tensors",
        ),
        ([torch.ones(2)], r"pytorch_model\.bin: holds a list; expected a dict of tensors"),
        (
            {"x": torch.ones(2, dtype=torch.complex64)},
            r"x has dtype torch\.complex64; expected one",
        ),
    ],
)
def test_a_pickle_may_hold_nothing_but_tensors(
    base_dir: Path,
    golden: Path,
    tmp_path: Path,
    content: object,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (base_dir / "model.safetensors").unlink()
    torch.save(content, base_dir / "pytorch_model.bin")
    with pytest.raises(UserError, match=message) as caught:
        merge_with(
            base_dir,
            [golden / "lora" / "adapter"],
            tmp_path / "out",
            proof="auto",
            allow_pickle=True,
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists() and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("place", ["out", "out.rejected", "out.partial/model", "link"])
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_no_input_lies_where_the_output_is_built(
    base_dir: Path, golden: Path, tmp_path: Path, place: str, which: str
) -> None:
    """A merge removes an earlier `.rejected` and unfinished files: neither may be its input."""
    adapter = golden / "lora" / "adapter"
    given = tmp_path / ("real" if place == "link" else place)
    shutil.copytree(base_dir if which == "base" else adapter, given)
    (given / "merge_report.json").write_text("{}")
    if place == "link":
        (tmp_path / "out").symlink_to(given)
    before = {path: path.read_bytes() for path in given.iterdir()}
    base, adapters = (given, [adapter]) if which == "base" else (base_dir, [given])
    with pytest.raises(UserError, match="is an input"):
        merge_with(base, adapters, tmp_path / "out")
    assert {path: path.read_bytes() for path in given.iterdir()} == before


def test_a_rejected_output_stays_until_the_next_merge_is_known_to_be_possible(
    base_dir: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejected = tmp_path / "out.rejected"
    rejected.mkdir()
    (rejected / "merge_report.json").write_text("{}")
    adapters = [golden / "lora" / "adapter"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="free on the disk"):
            merge_with(base_dir, adapters, tmp_path / "out")
    assert (rejected / "merge_report.json").is_file()
    merge_with(base_dir, adapters, tmp_path / "out")
    assert not rejected.exists()


def test_an_adapter_without_a_configuration_is_told_of(
    base_dir: Path, golden: Path, tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    torch.save(
        load_file(golden / "lora" / "adapter" / "adapter_model.safetensors"),
        tmp_path / "bare" / "adapter_model.bin",
    )
    report = merge_with(base_dir, [tmp_path / "bare"], tmp_path / "out", allow_pickle=True)
    (told,) = report.warnings
    assert "bare has no adapter_config.json: lora_alpha is taken as 16" in told


def test_a_name_that_no_folder_can_be_renamed_to_is_refused_before_anything_is_written(
    base_dir: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    before = sorted(tmp_path.rglob("*"))
    for name, what in (
        ("link", "a symbolic link"),
        ("dangling", "a symbolic link"),
        ("disk", "a mount point"),
    ):
        for build in (
            lambda output: merge_with(base_dir, [golden / "lora" / "adapter"], output),
            lambda output: convert_adapter(base_dir, golden / "lora" / "adapter", output),
        ):
            with pytest.raises(UserError, match=rf"{name}: is {what}; expected a new folder"):
                build(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_folder_that_one_is_in_can_be_the_output(
    base_dir: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merge_with(base_dir, [golden / "lora" / "adapter"], Path("."))
    assert (tmp_path / "here" / "merge_report.json").is_file()


def test_a_bad_row_among_the_texts_is_found_before_anything_is_written(
    base_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        merge_with(
            base_dir,
            [],
            tmp_path / "out",
            to=find_format("qwen", "qwen2"),
            check_texts=[str(tmp_path / "rows.jsonl")],
            progress=lambda done, total: pytest.fail("was writing already"),
        )
    assert not list(tmp_path.glob("out*"))


def test_nothing_to_do_is_refused(base_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither an adapter nor a dtype"):
        merge_with(base_dir, [], tmp_path / "out")


def test_a_full_disk_is_seen_before_anything_is_written(
    base_dir: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=800_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        UserError,
        match=r"0\.0008 GB \(800000 bytes\) free on the disk; expected 0\.000\d+ GB"
        r" \(8\d{5} bytes\)",
    ):
        merge_with(base_dir, [golden / "lora" / "adapter"], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(
    base_dir: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(writer: BlockWriter, block: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "write", full)
        with pytest.raises(
            UserError, match=r"No space left on device; expected files .* takes .*out$"
        ) as caught:
            merge_with(base_dir, [golden / "lora" / "adapter"], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))
    merge_with(base_dir, [golden / "lora" / "adapter"], tmp_path / "out")
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_an_output_below_a_file_is_named_before_anything_is_made(
    base_dir: Path, golden: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: a file; expected a folder to write in"):
        merge_with(base_dir, [golden / "lora" / "adapter"], tmp_path / "file" / "a" / "out")
