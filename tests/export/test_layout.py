"""The streamed merge under another layout than the base's: rows split, stacked and renamed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_ds.disk.shards import StoredWeights, open_stored
from qwen_ds.errors import UserError
from qwen_ds.export import merge_plan as plan_module
from qwen_ds.export.formats import Format, write_own_files
from qwen_ds.export.layout import Layout, RowBlock, identity, inverse
from tests.export.folders import merge_with


def split_qkv(stored: StoredWeights) -> Layout:
    """c_attn as three tensors, all others renamed."""
    layout: dict[str, tuple[RowBlock, ...]] = {}
    for name, spec in stored.tensors.items():
        if "c_attn" not in name:
            layout[f"new.{name}"] = (RowBlock(name, 0, spec.num_rows),)
            continue
        width = spec.num_rows // 3
        for i, part in enumerate("qkv"):
            layout[name.replace("c_attn", part)] = (RowBlock(name, i * width, (i + 1) * width),)
    return layout


def join_qkv(stored: StoredWeights) -> Layout:
    layout: dict[str, tuple[RowBlock, ...]] = {}
    for name, spec in stored.tensors.items():
        if name.startswith("new."):
            layout[name.removeprefix("new.")] = (RowBlock(name, 0, spec.num_rows),)
        elif ".q." in name:
            parts = [name.replace(".q.", f".{part}.") for part in "qkv"]
            layout[name.replace(".q.", ".c_attn.")] = tuple(
                RowBlock(part, 0, spec.num_rows) for part in parts
            )
    return layout


SPLIT = Format("split", split_qkv, write_own_files)
JOIN = Format("join", join_qkv, write_own_files, from_qwen=False)


def test_split_and_joined_again_the_file_is_the_same(small_dir: Path, tmp_path: Path) -> None:
    report = merge_with(small_dir, [], tmp_path / "split", to=SPLIT, block_bytes=1000)
    base, split = (
        load_file(small_dir / "model.safetensors"),
        load_file(tmp_path / "split" / "model.safetensors"),
    )
    for i, part in enumerate("qkv"):
        for kind in ("weight", "bias"):
            whole = base[f"transformer.h.1.attn.c_attn.{kind}"]
            assert torch.equal(split[f"transformer.h.1.attn.{part}.{kind}"], whole.chunk(3)[i])
    assert report.untouched == len(base) and not report.left_out

    merge_with(tmp_path / "split", [], tmp_path / "back", to=JOIN, block_bytes=700)
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert again.keys() == base.keys() and all(
        torch.equal(again[name], base[name]) for name in base
    )


def test_an_adapter_s_change_follows_its_rows(
    small_dir: Path, golden: Path, tmp_path: Path
) -> None:
    adapter = golden / "lora" / "adapter"
    report = merge_with(small_dir, [adapter], tmp_path / "split", to=SPLIT, block_bytes=1000)
    plain = merge_with(small_dir, [adapter], tmp_path / "plain")
    split = load_file(tmp_path / "split" / "model.safetensors")
    merged = load_file(tmp_path / "plain" / "model.safetensors")
    name = "transformer.h.2.attn.c_attn.weight"
    parts = [split[name.replace("c_attn", part)] for part in "qkv"]
    torch.testing.assert_close(torch.cat(parts), merged[name], rtol=0, atol=1e-6)
    # The report speaks of the base's tensors, whatever they are cut into.
    assert report.changed.keys() == plain.changed.keys()
    assert report.changed[name].norm_of_change == pytest.approx(
        plain.changed[name].norm_of_change, rel=1e-5
    )


def test_the_inverse_finds_every_row_again(small_dir: Path) -> None:
    stored = open_stored(small_dir)
    layout = inverse(split_qkv(stored))
    assert layout["transformer.h.0.attn.c_attn.bias"] == tuple(
        RowBlock(f"transformer.h.0.attn.{p}.bias", 0, 64) for p in "qkv"
    )
    assert inverse(inverse(identity(stored))) == identity(stored)


def test_tensors_without_a_place_are_left_out_and_named(small_dir: Path, tmp_path: Path) -> None:
    def without_bias(stored: StoredWeights) -> Layout:
        return {name: rows for name, rows in identity(stored).items() if not name.endswith("bias")}

    report = merge_with(
        small_dir, [], tmp_path / "out", to=Format("less", without_bias, write_own_files)
    )
    assert report.left_out == [f"transformer.h.{i}.attn.c_attn.bias" for i in range(3)]
    assert not any(
        name.endswith("bias") for name in load_file(tmp_path / "out" / "model.safetensors")
    )


def test_files_that_would_be_too_large_are_cut(
    small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "MAX_SHARD_BYTES", 200_000)
    merge_with(small_dir, [], tmp_path / "out", dtype="float32")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 205_000 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    base, found = load_file(small_dir / "model.safetensors"), {}
    for file in files:
        for name, tensor in load_file(file).items():
            assert index["weight_map"][name] == file.name
            found[name] = tensor
    assert list(found) == list(base) and all(torch.equal(found[name], base[name]) for name in base)


def test_pieces_of_one_tensor_must_be_of_one_dtype(small_dir: Path, tmp_path: Path) -> None:
    merge_with(small_dir, [], tmp_path / "split", to=SPLIT)
    tensors = load_file(tmp_path / "split" / "model.safetensors")
    tensors["transformer.h.1.attn.k.weight"] = tensors["transformer.h.1.attn.k.weight"].bfloat16()
    save_file(tensors, tmp_path / "split" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"h\.1\.attn\.k\.weight is BF16 and .*h\.1\.attn\.q\.weight is F32"
    ):
        merge_with(tmp_path / "split", [], tmp_path / "out", to=JOIN)
    merge_with(tmp_path / "split", [], tmp_path / "out", to=JOIN, dtype="bfloat16")
