"""The proof of a merge: passes where it should, with figures that mean something, and fails where it must."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_ds.export import changes, verify
from qwen_ds.export.changes import Change, LowRank, load_change
from qwen_ds.export.merge import merge
from qwen_ds.model.adapter import Adapter, load_adapter, read_adapter
from qwen_ds.model.modeling import QWenLMHeadModel

LAUNCH = Path(__file__).parents[2] / "launch" / "merge.py"


@pytest.fixture(scope="module")
def bf16_dir(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(small_dir, tmp_path_factory.mktemp("bf16") / "base"))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def scaled(factor: float) -> object:
    """A merge with a fault: every low-rank change is `factor` times what it should be."""

    def load(adapter: Adapter, name: str) -> Change:
        change = load_change(adapter, name)
        if not isinstance(change, LowRank):
            return change
        return dataclasses.replace(change, scaling=change.scaling * factor)

    return load


@pytest.mark.parametrize("name", ["lora", "lora_base"])
def test_an_fp32_merge_is_proven_to_fp32_noise(small_dir: Path, golden: Path, tmp_path: Path, name: str) -> None:
    proof = merge(small_dir, [golden / name / "adapter"], tmp_path / "out").verification
    assert proof is not None and proof.status == "passed"
    assert proof.max_difference < 3e-5 < 2e-4 > proof.bound  # golden's own unmerged against merged: 7.9e-6
    assert proof.adapter_effect > 1.0  # what is proven is there at all
    assert proof.top1_agreement == 1.0
    assert proof.positions >= 64


def test_the_noise_of_a_bf16_merge_is_that_of_one_rounding(bf16_dir: Path, golden: Path, tmp_path: Path) -> None:
    proof = merge(bf16_dir, [golden / "lora" / "adapter"], tmp_path / "out").verification
    assert proof is not None and proof.status == "passed"
    # Were the bound a guess, the two would not agree; a wrong size or shape of the noise shows here.
    assert 0.5 < proof.max_difference / proof.rounding_noise < 2.0
    assert proof.rms_difference < proof.max_difference < 0.35
    assert 0.95 < proof.top1_agreement <= 1.0


def test_a_conversion_is_proven_against_the_bare_base(small_dir: Path, tmp_path: Path) -> None:
    proof = merge(small_dir, [], tmp_path / "out", dtype="float16").verification
    assert proof is not None and proof.status == "passed"
    assert proof.adapter_effect == 0.0
    assert 0.5 < proof.max_difference / proof.rounding_noise < 2.0


@pytest.mark.parametrize("factor", [0.0, 0.9, 1.1])
def test_a_wrong_bf16_merge_is_rejected(
    bf16_dir: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    monkeypatch.setattr(changes, "load_change", scaled(factor))
    report = merge(bf16_dir, [golden / "lora" / "adapter"], tmp_path / "out")
    assert report.rejected
    assert {path.name for path in tmp_path.iterdir()} == {"out.rejected"}
    stored = json.loads((tmp_path / "out.rejected" / "merge_report.json").read_text())
    assert stored["verification"]["status"] == "failed"
    assert report.folder == tmp_path / "out.rejected" and str(report.folder) in report.in_words()[0]

    monkeypatch.undo()
    assert not merge(bf16_dir, [golden / "lora" / "adapter"], tmp_path / "out").rejected
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_fp32_merge_is_held_to_a_thousandth(
    small_dir: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "load_change", scaled(1.001))
    assert merge(small_dir, [golden / "lora" / "adapter"], tmp_path / "out").rejected


def test_logits_that_are_not_numbers_do_not_pass(
    small_dir: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = Path(shutil.copytree(small_dir, tmp_path / "spoilt"))
    tensors = load_file(spoilt / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] = float("nan")
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    # Both sides are equally spoilt, so that every difference is NaN.
    proof = merge(spoilt, [golden / "lora" / "adapter"], tmp_path / "out").verification
    assert proof is not None and proof.status == "failed"


def test_a_model_that_does_not_fit_in_memory_is_merged_unproven_and_says_so(
    small_dir: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "available_memory", lambda: 100_000_000)
    report = merge(small_dir, [golden / "lora" / "adapter"], tmp_path / "out")
    assert report.verification is not None and report.verification.status == "skipped"
    assert not report.rejected and (tmp_path / "out").is_dir()
    assert any("proof skipped: it needs 0.5 GB of memory; 0.1 GB are free" in line for line in report.in_words())


def test_memory_is_counted() -> None:
    assert 10_000_000 < verify.available_memory() < 2**50


def test_the_merged_folder_loads_as_a_model_and_answers_like_base_and_adapter(
    small_dir: Path, golden: Path, tmp_path: Path
) -> None:
    merge(small_dir, [golden / "lora" / "adapter"], tmp_path / "out", proof="off")
    expected = load_file(golden / "lora" / "outputs.safetensors")
    model = QWenLMHeadModel.from_pretrained(str(tmp_path / "out"), dtype=torch.float32).eval()
    wrapped = load_adapter(
        QWenLMHeadModel.from_pretrained(str(small_dir), dtype=torch.float32), golden / "lora" / "adapter"
    )
    mask = expected["attention_mask"]
    for candidate in (model, wrapped):
        with torch.inference_mode():
            logits = candidate(input_ids=expected["input_ids"], attention_mask=mask).logits
        torch.testing.assert_close(logits[mask.bool()], expected["logits"][mask.bool()], rtol=0, atol=3e-5)


def run_launch(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["merge.py", *options])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(LAUNCH), run_name="__main__")
    assert isinstance(left.value.code, int)
    return left.value.code


def test_the_command_merges_proves_and_reports(
    small_dir: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--base", str(small_dir), "--adapter", str(golden / "lora" / "adapter")]
    assert run_launch(monkeypatch, *paths, "--output", str(tmp_path / "out"), "--local_rank=0") == 0
    shown = capsys.readouterr().out
    assert "15 tensors changed, 0 converted, 12 untouched" in shown
    assert "auto_map removed" in shown and "proof passed" in shown
    assert (
        run_launch(monkeypatch, *paths, "--output", str(tmp_path / "o2"), "--verify", "off", "--dtype", "float16") == 0
    )
    assert "not verified" in capsys.readouterr().out


def test_the_command_ends_with_1_when_the_proof_fails_and_2_on_bad_input(
    small_dir: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--base", str(small_dir), "--adapter", str(golden / "lora" / "adapter"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(changes, "load_change", scaled(0.5))
    assert run_launch(monkeypatch, *paths) == 1
    assert "the proof failed: the output is left as" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    for options in (
        [*paths, "--adaptor", "x"],
        [*paths, "--dtype", "float8"],
        ["--base", str(tmp_path / "nowhere"), *paths[2:]],
        [*paths[:2], "--adapter", str(tmp_path / "nowhere"), *paths[4:]],
    ):
        assert run_launch(monkeypatch, *options) == 2, options
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_only_one_of_many_ranks_merges(
    small_dir: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    paths = ["--base", str(small_dir), "--adapter", str(golden / "lora" / "adapter"), "--output", str(tmp_path / "out")]
    assert run_launch(monkeypatch, *paths) == 0
    assert not (tmp_path / "out").exists()


def test_the_golden_adapter_scales_by_alpha_over_rank(golden: Path) -> None:
    assert {pair.scaling for pair in read_adapter(golden / "lora" / "adapter").pairs.values()} == {2.0}
