"""The streamed merge against the official model's merged weights and against peft's own merge."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_ds.export.merge import MergeOptions, merge
from tests.export.folders import peft_adapter, shard


@pytest.mark.parametrize("name", ["lora", "lora_base"])
@pytest.mark.parametrize("block_bytes", [100, 1 << 20])
def test_merged_weights_are_the_official_ones(
    small_dir: Path, golden: Path, tmp_path: Path, name: str, block_bytes: int
) -> None:
    adapter = golden / name / "adapter"
    report = merge(
        small_dir, [adapter], tmp_path / "out", MergeOptions(proof="off", block_bytes=block_bytes)
    )
    base, merged = (
        load_file(small_dir / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert list(merged) == list(base)
    expected = load_file(golden / name / "merged_changed.safetensors")
    for tensor, value in expected.items():
        torch.testing.assert_close(merged[tensor], value, rtol=0, atol=1e-6)
    stored = load_file(adapter / "adapter_model.safetensors")
    for tensor in report.changed:
        if report.changed[tensor].kind == "saved":
            assert torch.equal(merged[tensor], stored[f"base_model.model.{tensor}"])
        change = float(torch.linalg.vector_norm(merged[tensor] - base[tensor]))
        assert report.changed[tensor].norm_of_change == pytest.approx(change, rel=1e-5)
    assert {"lora": 15, "lora_base": 17}[name] == len(report.changed)
    for tensor in set(base) - set(report.changed):
        assert merged[tensor].numpy().tobytes() == base[tensor].numpy().tobytes(), tensor
    assert report.untouched == len(base) - len(report.changed)


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"use_rslora": True}, {"lora"}),
        ({"use_dora": True}, {"dora"}),
        ({"use_dora": True, "use_rslora": True, "r": 3}, {"dora"}),
        (
            {
                "rank_pattern": {"attn.c_proj": 2, r"h\.1\..*w1": 5},
                "alpha_pattern": {r"h\.[02].*c_proj": 30},
            },
            {"lora"},
        ),
        (
            {"target_modules": ["attn.c_proj", "w2"], "modules_to_save": ["ln_f", "lm_head"]},
            {"lora", "saved"},
        ),
        ({"bias": "lora_only"}, {"lora", "saved"}),
        (
            {"target_modules": ["w1"], "trainable_token_indices": {"wte": [511, 0, 304]}},
            {"lora", "rows"},
        ),
    ],
)
def test_every_variant_merges_as_in_peft(
    small_dir: Path, tmp_path: Path, options: dict[str, Any], kinds: set[str]
) -> None:
    expected = peft_adapter(small_dir, tmp_path / "adapter", **options)
    report = merge(
        small_dir,
        [tmp_path / "adapter"],
        tmp_path / "out",
        MergeOptions(proof="off", block_bytes=2000),
    )
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {facts.kind for facts in report.changed.values()} == kinds
    assert set(merged) == set(expected)
    base = load_file(small_dir / "model.safetensors")
    for tensor, value in expected.items():
        torch.testing.assert_close(merged[tensor], value, rtol=1e-6, atol=2e-6)
        assert (tensor in report.changed) == (not torch.equal(merged[tensor], base[tensor]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_made_in_fp32_and_rounded_once(
    base_dir: Path, golden: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = {
        name: tensor.to(dtype) for name, tensor in load_file(base_dir / "model.safetensors").items()
    }
    save_file(base, base_dir / "model.safetensors", metadata={"format": "pt"})
    merge(
        base_dir,
        [golden / "lora" / "adapter"],
        tmp_path / "out",
        MergeOptions(proof="off", block_bytes=4000),
    )
    merged = load_file(tmp_path / "out" / "model.safetensors")
    adapter = load_file(golden / "lora" / "adapter" / "adapter_model.safetensors")
    module = "transformer.h.1.mlp.c_proj"
    a, b = (adapter[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    exact = base[f"{module}.weight"].double() + 2.0 * (b.double() @ a.double())
    rounded = exact.to(dtype)
    assert merged[f"{module}.weight"].dtype == dtype
    # fp32's own error decides where the exact sum lies within 2**-20 of the middle between two
    # values of the dtype.
    assert (merged[f"{module}.weight"] != rounded).float().mean() < 1e-3
    assert all(tensor.dtype == dtype for tensor in merged.values())


def test_shards_and_index_are_the_base_s(base_dir: Path, golden: Path, tmp_path: Path) -> None:
    tensors = load_file(base_dir / "model.safetensors")
    merge(base_dir, [golden / "lora" / "adapter"], tmp_path / "single", MergeOptions(proof="off"))
    shard(base_dir, tensors, 3)
    merge(base_dir, [golden / "lora" / "adapter"], tmp_path / "out", MergeOptions(proof="off"))
    files = sorted(path.name for path in base_dir.glob("model*"))
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == files
    single = load_file(tmp_path / "single" / "model.safetensors")
    for file in files[:3]:
        merged = load_file(tmp_path / "out" / file)
        assert list(merged) == list(load_file(base_dir / file))
        assert all(torch.equal(tensor, single[name]) for name, tensor in merged.items())
    base_index = json.loads((base_dir / "model.safetensors.index.json").read_text())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == base_index["weight_map"]
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"] == {"made_by": "someone", "total_size": total}


def test_settings_tokenizer_and_legal_texts_travel_but_no_code(
    base_dir: Path, golden: Path, tmp_path: Path
) -> None:
    legal = ["LICENSE", "NOTICE.md", "Tongyi Qianwen LICENSE AGREEMENT.txt", "use_policy.md"]
    code = ["modeling_qwen.py", "license.py", "cache_autogptq_cuda_256.cpp", "notice.bin"]
    for name in [*legal, *code, "README.md", ".gitattributes"]:
        (base_dir / name).write_text(name)
    auto_map = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    settings = {"tokenizer_class": "QWenTokenizer", "auto_map": auto_map}
    (base_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    old_mask = os.umask(0o077)
    try:
        report = merge(
            base_dir, [golden / "lora" / "adapter"], tmp_path / "out", MergeOptions(proof="off")
        )
    finally:
        os.umask(old_mask)
    carried = [
        "config.json",
        "generation_config.json",
        "qwen.tiktoken",
        "tokenizer_config.json",
        *legal,
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *carried, "README.md", "model.safetensors", "merge_report.json"
    }  # fmt: skip
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644, path.name
    for name in ("generation_config.json", "qwen.tiktoken", *legal):
        assert (tmp_path / "out" / name).read_bytes() == (base_dir / name).read_bytes()
    config = json.loads((base_dir / "config.json").read_text())
    del config["auto_map"]
    # llama.cpp loads what it converted only where the epsilon has this name, too.
    config["rms_norm_eps"] = config["layer_norm_epsilon"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "QWenTokenizer"
    }
    assert set(report.edits) == {"config.json", "tokenizer_config.json"}


def test_dtype_converts_every_tensor_and_says_so(
    small_dir: Path, golden: Path, tmp_path: Path
) -> None:
    base = load_file(small_dir / "model.safetensors")
    merge(small_dir, [golden / "lora" / "adapter"], tmp_path / "fp32", MergeOptions(proof="off"))
    report = merge(
        small_dir,
        [golden / "lora" / "adapter"],
        tmp_path / "out",
        MergeOptions(dtype="bfloat16", proof="off"),
    )
    merged, exact = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "fp32"))
    assert all(torch.equal(merged[name], exact[name].bfloat16()) for name in base)
    assert (report.converted, report.untouched) == (len(base) - 15, 0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"

    back = merge(
        tmp_path / "out", [], tmp_path / "back", MergeOptions(dtype="float32", proof="off")
    )
    wide = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(wide[name], merged[name].float()) for name in base)
    assert back.adapters == [] and back.converted == len(base)


def test_the_report_is_stored_with_checksums(small_dir: Path, golden: Path, tmp_path: Path) -> None:
    report = merge(
        small_dir, [golden / "lora" / "adapter"], tmp_path / "out", MergeOptions(proof="off")
    )
    stored = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert stored["changed"] == {name: asdict(after) for name, after in report.changed.items()}
    assert stored["inputs"]["adapter/adapter_model.safetensors"]["bytes"] > 0
    for name, facts in stored["outputs"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": sha256(content).hexdigest()}, name
    assert set(stored["outputs"]) == {path.name for path in (tmp_path / "out").iterdir()} - {
        "merge_report.json"
    }


def test_a_base_model_that_an_adapter_is_merged_into_answers_in_chatml(
    base_dir: Path, golden: Path, tmp_path: Path
) -> None:
    path = base_dir / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_format": "raw"}))
    report = merge(
        base_dir, [golden / "lora" / "adapter"], tmp_path / "out", MergeOptions(proof="off")
    )
    assert json.loads((tmp_path / "out" / path.name).read_text())["chat_format"] == "chatml"
    assert report.edits[path.name] == "chat_format set to chatml"
    merge(base_dir, [], tmp_path / "bare", MergeOptions(dtype="float16", proof="off"))
    assert json.loads((tmp_path / "bare" / path.name).read_text())["chat_format"] == "raw"


@pytest.mark.parametrize(
    ("said", "warned"),
    [
        ("Qwen/Qwen-7B-Chat", True),
        ("Qwen/BASE", False),
        ("/somewhere/models--Qwen--base/snapshots/0123", False),
        ("C:\\models\\base\\", False),
        (None, False),
    ],
)
def test_an_adapter_that_names_another_base_is_told_of(
    base_dir: Path, golden: Path, tmp_path: Path, said: str | None, warned: bool
) -> None:
    adapter = Path(shutil.copytree(golden / "lora" / "adapter", tmp_path / "adapter"))
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": said
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    report = merge(base_dir, [adapter], tmp_path / "out", MergeOptions(proof="off"))
    expected = (
        ["adapter says that it was trained on Qwen-7B-Chat; the base here is base"]
        if warned
        else []
    )
    assert report.warnings == expected
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "\n".join(report.in_words()),
        card,
        (tmp_path / "out" / "merge_report.json").read_text(),
    ):
        assert all(line in text for line in expected)


def test_a_single_file_goes_before_an_index(base_dir: Path, golden: Path, tmp_path: Path) -> None:
    (base_dir / "model.safetensors.index.json").write_text("{}")
    merge(base_dir, [golden / "lora" / "adapter"], tmp_path / "out", MergeOptions(proof="off"))
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
