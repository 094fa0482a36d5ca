"""The proof of a merge: it passes where it should, with sound figures, and fails where it must."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_ds.errors import UserError
from qwen_ds.export.formats import QWEN_FORMAT
from qwen_ds.export.merge import MergeOptions, merge
from qwen_ds.export.merge_plan import make_plan
from qwen_ds.export.proof import verify
from qwen_ds.export.proof.layered import layered_outputs
from qwen_ds.export.proof.sides import Outputs, first_positions, spread_positions
from qwen_ds.export.proof.verify import Proof, Verification
from qwen_ds.export.proof.whole import whole_outputs
from qwen_ds.export.stream import changes
from qwen_ds.export.stream.changes import Adapters, Change, LowRank, ReplacedRows, load_change
from qwen_ds.model.adapter import Adapter, read_adapter
from qwen_ds.model.adapter_loading import put_adapter
from qwen_ds.model.modeling import QWenLMHeadModel
from tests.export.folders import bf16_copy, merge_with, peft_adapter

KINDS: tuple[Literal["full"], Literal["sampled"]] = ("full", "sampled")
LAUNCH = Path(__file__).parents[3] / "launch" / "merge.py"


@pytest.fixture(scope="module")
def bf16_dir(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bf16_copy(small_dir, tmp_path_factory.mktemp("bf16") / "base")


def scaled(factor: float) -> object:
    """A merge with a fault: every low-rank change is `factor` times what it should be."""

    def load(adapter: Adapter, name: str) -> Change:
        change = load_change(adapter, name)
        if not isinstance(change, LowRank):
            return change
        return dataclasses.replace(change, scaling=change.scaling * factor)

    return load


def proven(base: Path, adapters: list[Path], output: Path, options: MergeOptions) -> Verification:
    """The proof of a merge, which it passes."""
    proof = merge(base, adapters, output, options).verification
    assert proof is not None and proof.status == "passed", proof
    return proof


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lora", "lora_base"])
def test_an_fp32_merge_is_proven_to_fp32_noise(
    small_dir: Path, golden: Path, tmp_path: Path, name: str, kind: Literal["full", "sampled"]
) -> None:
    proof = proven(
        small_dir, [golden / name / "adapter"], tmp_path / "out", MergeOptions(proof=kind)
    )
    assert proof.kind == kind
    assert (
        proof.max_difference < 3e-5 < 2e-4 > proof.bound
    )  # golden's own unmerged against merged: 7.9e-6
    assert proof.adapter_effect > 1.0  # what is proven is there at all
    assert proof.top1_agreement == proof.top1_noise == 1.0
    assert proof.positions == 64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lora", "lora_base"])
def test_the_noise_of_a_bf16_merge_is_that_of_one_rounding(
    bf16_dir: Path, golden: Path, tmp_path: Path, name: str, kind: Literal["full", "sampled"]
) -> None:
    """lora_base brings an embedding and a head of its own: their rounding is part of the noise."""
    proof = proven(
        bf16_dir, [golden / name / "adapter"], tmp_path / "out", MergeOptions(proof=kind)
    )
    # Were the bound a guess, the two would not agree; wrong noise shows here.
    assert 0.7 < proof.rms_difference / proof.rms_noise < 1.4
    assert proof.rms_difference < proof.max_difference < 0.35
    assert 0.95 < proof.top1_agreement <= 1.0 and 0.95 < proof.top1_noise <= 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_rounding_of_what_an_adapter_brings_is_part_of_the_noise(
    bf16_dir: Path, tmp_path: Path, kind: Literal["full", "sampled"]
) -> None:
    """Head and embeddings of its own, in fp32: the base's weights do not matter for them."""
    rows = {"wte": list(range(300))}
    peft_adapter(
        bf16_dir, tmp_path / "a", target_modules=["h.0.mlp.w1"], modules_to_save=["lm_head"]
    )
    peft_adapter(
        bf16_dir, tmp_path / "b", target_modules=["h.0.mlp.w1"], trainable_token_indices=rows
    )
    for name in "ab":
        proof = proven(
            bf16_dir, [tmp_path / name], tmp_path / f"out_{name}", MergeOptions(proof=kind)
        )
        assert 0.7 < proof.rms_difference / proof.rms_noise < 1.4


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_as_large_as_the_weights_passes_and_a_wrong_one_does_not(
    bf16_dir: Path,
    golden: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Literal["full", "sampled"],
) -> None:
    """The rounding that counts is that of the merged weights; beside it the base's own is tiny."""
    base = Path(shutil.copytree(bf16_dir, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    for name in weights:
        if ".h." in name and name.endswith(("c_attn.weight", "c_proj.weight")):
            weights[name] = weights[name] / 1024
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    adapters, options = [golden / "lora" / "adapter"], MergeOptions(proof=kind)
    proof = proven(base, adapters, tmp_path / "out", options)
    assert 0.7 < proof.rms_difference / proof.rms_noise < 1.4
    monkeypatch.setattr(changes, "load_change", scaled(0.95))
    wrong = merge(base, adapters, tmp_path / "wrong", options).verification
    assert wrong is not None and wrong.status == "failed"


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversion_is_proven_against_the_bare_base(
    small_dir: Path, tmp_path: Path, kind: Literal["full", "sampled"]
) -> None:
    proof = proven(small_dir, [], tmp_path / "out", MergeOptions(dtype="float16", proof=kind))
    assert proof.adapter_effect == 0.0
    assert 0.7 < proof.rms_difference / proof.rms_noise < 1.4


@pytest.mark.parametrize(
    ("factor", "kind"), [(0.0, "full"), (0.9, "full"), (1.1, "full"), (0.9, "sampled")]
)
def test_a_wrong_bf16_merge_is_rejected(
    bf16_dir: Path,
    golden: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
    kind: Proof,
) -> None:
    monkeypatch.setattr(changes, "load_change", scaled(factor))
    report = merge_with(bf16_dir, [golden / "lora" / "adapter"], tmp_path / "out", proof=kind)
    assert report.rejected
    assert {path.name for path in tmp_path.iterdir()} == {"out.rejected"}
    stored = json.loads((tmp_path / "out.rejected" / "merge_report.json").read_text())
    assert stored["verification"]["status"] == "failed"
    assert report.folder == tmp_path / "out.rejected" and str(report.folder) in report.in_words()[0]

    monkeypatch.undo()
    assert not merge_with(bf16_dir, [golden / "lora" / "adapter"], tmp_path / "out").rejected
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ([{"use_rslora": True}], None),
        ([{"use_dora": True, "use_rslora": True, "r": 3}], None),
        ([{"rank_pattern": {"attn.c_proj": 2}, "alpha_pattern": {r"h\.[02].*c_proj": 30}}], None),
        ([{"target_modules": ["attn.c_proj", "w2"], "modules_to_save": ["ln_f", "lm_head"]}], None),
        ([{"bias": "lora_only"}], None),
        (
            [
                {
                    "target_modules": ["w1", "lm_head"],
                    "trainable_token_indices": {"wte": [511, 0, 304]},
                }
            ],
            None,
        ),
        ([{"target_modules": ["h.1.mlp.w1"]}], None),
        ([{}, {"use_dora": True, "target_modules": ["w1", "c_attn"]}], None),
        ([{"use_dora": True}, {"modules_to_save": ["wte"]}], None),
        ([{}, {"r": 2, "use_rslora": True}], (0.25, -1.5)),
        (
            [{"use_dora": True}, {"target_modules": ["w2"], "modules_to_save": ["lm_head"]}],
            (0.5, 0.5),
        ),
    ],
)
def test_both_proofs_agree_and_pass_on_every_variant(
    small_dir: Path,
    tmp_path: Path,
    options: list[dict[str, Any]],
    weights: tuple[float, ...] | None,
) -> None:
    folders = [tmp_path / f"adapter{i}" for i in range(len(options))]
    for seed, (folder, chosen) in enumerate(zip(folders, options, strict=True)):
        peft_adapter(small_dir, folder, seed, **chosen)
    merge_with(small_dir, folders, tmp_path / "out", weights=weights)
    adapters = Adapters(tuple(map(read_adapter, folders)), weights)
    plan = make_plan(small_dir, adapters, QWEN_FORMAT, "keep", allow_pickle=False)
    rows = first_positions(
        [torch.arange(20) * 7, torch.arange(30) + 200, torch.tensor([511, 0, 304, 5])]
    )
    whole, layered = (
        whole_outputs(plan, tmp_path / "out", rows),
        layered_outputs(plan, tmp_path / "out", rows),
    )
    for one, other in zip(dataclasses.astuple(whole), dataclasses.astuple(layered), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert verify.judge(layered, "sampled", 0.0).status == "passed"
    assert float((layered.expected_PV - layered.base_PV).abs().max()) > 0.1


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_a_bf16_merge_of_a_change_near_the_noise_is_judged_over_all_logits(
    bf16_dir: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """A tenth too much of a small change is an error as of one rounding, but everywhere."""
    adapter = Path(shutil.copytree(golden / "lora" / "adapter", tmp_path / "adapter"))
    path = adapter / "adapter_model.safetensors"
    tensors = {name: t * (0.05 if "lora_B" in name else 1) for name, t in load_file(path).items()}
    save_file(tensors, path)
    monkeypatch.setattr(changes, "load_change", scaled(factor))
    proof = merge_with(bf16_dir, [adapter], tmp_path / "out", proof="full").verification
    assert proof is not None and proof.max_difference <= proof.bound
    assert (proof.status == "passed") == (factor == 1.0), proof


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
    stored = (tmp_path / "out.rejected" / "merge_report.json").read_text()
    assert "NaN" not in stored and json.loads(stored)["verification"]["max_difference"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_that_an_adapter_brings_is_among_what_is_compared(
    small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Proof
) -> None:
    """Control tokens are in no plain text: a merge that spoils one of their rows must not pass."""
    rows = {"wte": [304, 305, 306]}
    peft_adapter(
        small_dir, tmp_path / "adapter", target_modules=["h.0.mlp.w1"], trainable_token_indices=rows
    )
    proof = proven(small_dir, [tmp_path / "adapter"], tmp_path / "right", MergeOptions(proof=kind))
    assert proof.positions == 67

    def spoilt(adapter: Adapter, name: str) -> Change:
        change = load_change(adapter, name)
        if isinstance(change, ReplacedRows):
            change.values_KI[0].zero_()
        return change

    monkeypatch.setattr(changes, "load_change", spoilt)
    assert merge_with(small_dir, [tmp_path / "adapter"], tmp_path / "wrong", proof=kind).rejected


@pytest.mark.parametrize(
    "options", [{"target_modules": ["lm_head"]}, {"target_modules": ["lm_head"], "use_dora": True}]
)
def test_the_layered_proof_computes_the_head_by_itself(
    small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Not by the merge's own arithmetic, whose faults it would share."""
    peft_adapter(small_dir, tmp_path / "adapter", **options)
    assert not merge_with(
        small_dir, [tmp_path / "adapter"], tmp_path / "right", proof="sampled"
    ).rejected
    monkeypatch.setattr(changes, "load_change", scaled(3.0))
    assert merge_with(
        small_dir, [tmp_path / "adapter"], tmp_path / "wrong", proof="sampled"
    ).rejected


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_nothing_but_rows_is_proven(
    small_dir: Path, tmp_path: Path, kind: Proof
) -> None:
    rows = {"wte": [304, 306], "lm_head": [306]}
    none = "dummy-target-modules"  # peft's word for no LoRA at all
    peft_adapter(small_dir, tmp_path / "adapter", target_modules=none, trainable_token_indices=rows)
    proof = proven(small_dir, [tmp_path / "adapter"], tmp_path / "out", MergeOptions(proof=kind))
    assert proof.adapter_effect > 0


def test_an_error_that_is_spread_over_all_logits_does_not_pass_for_small() -> None:
    expected_PV = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    noise_PV = torch.randn(64, 100, generator=torch.Generator().manual_seed(1)) * 1e-3
    for factor, status in ((1.0, "passed"), (1.4, "passed"), (1.7, "failed")):
        outputs = Outputs(
            expected_PV + 1, expected_PV, expected_PV + noise_PV, expected_PV - factor * noise_PV
        )
        proof = verify.judge(outputs, "full", 0.0)
        assert proof.status == status and proof.max_difference < proof.bound


def test_an_adapter_that_does_less_than_the_noise_is_called_so() -> None:
    base_PV = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    for effect, told in ((1e-3, True), (1.0, False), (0.0, False)):
        outputs = Outputs(base_PV, base_PV + effect, base_PV + effect + 1e-3, base_PV + effect)
        assert ("too little to tell" in verify.judge(outputs, "full", 0.0).reason) == told


def test_a_model_that_does_not_fit_in_memory_is_proven_layer_by_layer(
    small_dir: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = golden / "lora" / "adapter"
    assert merge(small_dir, [adapter], tmp_path / "fits").verification.kind == "full"  # type: ignore[union-attr]
    monkeypatch.setattr(verify, "available_memory", lambda: 100_000_000)
    report = merge(small_dir, [adapter], tmp_path / "out")
    assert report.verification is not None and report.verification.kind == "sampled"
    assert any("sampled proof passed" in line for line in report.in_words())
    with pytest.raises(
        UserError,
        match=r"full, which needs 0\.5 GB of memory; 0\.1 GB are free; .*--verify sampled",
    ):
        merge_with(small_dir, [adapter], tmp_path / "other", proof="full")
    assert not list(tmp_path.glob("other*"))


def test_more_changes_of_the_most_probable_token_than_by_chance_do_not_pass() -> None:
    """However small the differences: thrice those of one more rounding are allowed, plus five."""
    expected_PV = torch.zeros(64, 3)
    expected_PV[:, 0] = 1e-7
    merged_PV = expected_PV.clone()
    for flips, status in ((5, "passed"), (6, "failed")):
        merged_PV[:flips, 1] = 2e-7
        outputs = Outputs(expected_PV, expected_PV, expected_PV + 1e-6, merged_PV)
        proof = verify.judge(outputs, "full", 0.0)
        assert proof.status == status and proof.top1_agreement == 1 - flips / 64
    assert "another most probable token at 6 of 64 positions, allowed 5" in proof.reason
    few = Outputs(
        *(
            logits_PV[4:20]
            for logits_PV in (expected_PV, expected_PV, expected_PV + 1e-6, merged_PV)
        )
    )
    assert (
        verify.judge(few, "full", 0.0).status == "failed"
    )  # 2 of 16 positions, where 1.25 are allowed
    noisy_PV = expected_PV.clone()
    noisy_PV[:1, 2] = 1e-6
    assert (
        verify.judge(Outputs(expected_PV, expected_PV, noisy_PV, merged_PV), "full", 0.0).status
        == "passed"
    )


def test_the_tokens_of_a_sampled_proof_are_shared_out_among_the_prompts() -> None:
    rows = first_positions([torch.arange(7), torch.arange(100), torch.arange(12), torch.arange(26)])
    assert [len(row.ids_T) for row in rows] == [7, 19, 19 - 7, 26]
    assert [len(row.ids_T) for row in first_positions([torch.arange(100)])] == [64]
    many = first_positions([torch.arange(30)] * 50)  # no beginnings of a token or two
    assert [len(row.ids_T) for row in many] == [16, 16, 16, 16]
    assert all(torch.equal(row.positions, torch.arange(len(row.ids_T))) for row in [*rows, *many])


def test_positions_of_a_full_proof_are_spread_over_as_many_rows_as_there_are_positions() -> None:
    rows = spread_positions([torch.arange(30)] * 200)
    assert len(rows) == 64 and all(
        row.positions.dtype == torch.int64 and len(row.positions) == 1 for row in rows
    )
    (row,) = spread_positions([torch.arange(0), torch.arange(8)])
    assert row.positions.tolist() == [4, 5, 6, 7]


def test_prompts_are_lines_of_a_file(small_dir: Path, golden: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("abc\n\n 你好 \n", encoding="utf-8")
    prompts = verify.read_prompts(tmp_path / "prompts.txt")
    assert prompts == ["abc", "你好"]
    for kind in KINDS:
        report = merge_with(
            small_dir, [golden / "lora" / "adapter"], tmp_path / kind, proof=kind, prompts=prompts
        )
        assert report.verification is not None and report.verification.positions == 64
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(UserError, match=r"prompts\.txt: holds no text; expected a prompt a line"):
        verify.read_prompts(tmp_path / "prompts.txt")
    with pytest.raises(UserError, match=r"nowhere\.txt: .*expected a text file in UTF-8"):
        verify.read_prompts(tmp_path / "nowhere.txt")


def test_memory_is_counted() -> None:
    assert 10_000_000 < verify.available_memory() < 2**50


def test_the_merged_folder_loads_as_a_model_and_answers_like_base_and_adapter(
    small_dir: Path, golden: Path, tmp_path: Path
) -> None:
    merge_with(small_dir, [golden / "lora" / "adapter"], tmp_path / "out")
    expected = load_file(golden / "lora" / "outputs.safetensors")
    model = QWenLMHeadModel.from_pretrained(str(tmp_path / "out"), dtype=torch.float32).eval()
    wrapped = put_adapter(
        QWenLMHeadModel.from_pretrained(str(small_dir), dtype=torch.float32),
        read_adapter(golden / "lora" / "adapter"),
    )
    assert wrapped is not None
    mask = expected["attention_mask"]
    for candidate in (model, wrapped):
        with torch.inference_mode():
            logits = candidate(input_ids=expected["input_ids"], attention_mask=mask).logits
        torch.testing.assert_close(
            logits[mask.bool()], expected["logits"][mask.bool()], rtol=0, atol=3e-5
        )


def run_launch(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["merge.py", *options])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(LAUNCH), run_name="__main__")
    assert isinstance(left.value.code, int)
    return left.value.code


def test_the_command_merges_proves_and_reports(
    small_dir: Path,
    golden: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = ["--base", str(small_dir), "--adapter", str(golden / "lora" / "adapter")]
    assert run_launch(monkeypatch, *paths, "--output", str(tmp_path / "out"), "--local_rank=0") == 0
    shown = capsys.readouterr().out
    assert "15 tensors changed, 0 converted, 12 untouched" in shown
    assert "auto_map removed" in shown and "proof passed" in shown
    assert (
        run_launch(
            monkeypatch,
            *paths,
            "--output",
            str(tmp_path / "o2"),
            "--verify",
            "off",
            "--dtype",
            "float16",
        )
        == 0
    )
    assert "not verified" in capsys.readouterr().out


def test_the_command_takes_several_adapters_and_prompts(
    small_dir: Path,
    golden: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "prompts.txt").write_text("one prompt\nand another\n")
    adapters = [str(golden / name / "adapter") for name in ("lora", "lora_base")]
    command = [
        "--base",
        str(small_dir),
        "--adapter",
        *adapters,
        "--weights",
        "0.7",
        "-0.3",
        "--verify",
        "sampled",
    ]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out")]
    assert run_launch(monkeypatch, *command) == 0
    assert "sampled proof passed" in capsys.readouterr().out
    stored = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert stored["adapters"] == adapters and stored["weights"] == [0.7, -0.3]
    assert (
        stored["verification"]["positions"] == 64
    )  # the built-in prompts fill up what those two lack


def test_the_command_ends_with_1_when_the_proof_fails_and_2_on_bad_input(
    small_dir: Path,
    golden: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [
        "--base",
        str(small_dir),
        "--adapter",
        str(golden / "lora" / "adapter"),
        "--output",
        str(tmp_path / "out"),
    ]
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
    monkeypatch.setenv("WORLD_SIZE", "2")
    paths = [
        "--base",
        str(small_dir),
        "--adapter",
        str(golden / "lora" / "adapter"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert run_launch(monkeypatch, *paths) == 0
    assert not (tmp_path / "out").exists()


def test_the_golden_adapter_scales_by_alpha_over_rank(golden: Path) -> None:
    assert {pair.scaling for pair in read_adapter(golden / "lora" / "adapter").pairs.values()} == {
        2.0
    }
