"""launch/merge.py to Qwen2 and back: what a user types, what comes out, and the exit codes."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from qwen_ds.model.tokenizer import load_encoding

LAUNCH = Path(__file__).parents[3] / "launch" / "merge.py"


def run(monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, options)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(LAUNCH), run_name="__main__")
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.parametrize("proof", ["full", "sampled"])
def test_base_and_adapter_become_a_proven_qwen2_and_a_qwen_again(
    small_dir: Path, golden: Path, tmp_path: Path, monkeypatch, capsys, proof: str
) -> None:
    adapter = golden / "lora" / "adapter"
    (tmp_path / "texts.txt").write_text("任意文字 and more\n", encoding="utf-8")
    base = ["--base", small_dir, "--adapter", adapter]
    texts = ["--check_texts", tmp_path / "texts.txt", golden / "forward" / "full_vocab_texts.json"]
    assert (
        run(
            monkeypatch,
            *base,
            "--format",
            "qwen2",
            *texts,
            "--verify",
            proof,
            "--output",
            tmp_path / "out",
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert f"{proof} proof passed" in shown and "the tokenizers agree on" in shown
    assert "max_position_embeddings is 64: longer texts need the qwen format" in shown

    expected = load_file(golden / "lora" / "outputs.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(model) is Qwen2ForCausalLM and model.dtype == torch.float32
    tokenizer, encoding = AutoTokenizer.from_pretrained(tmp_path / "out"), load_encoding(small_dir)
    assert tokenizer("你好, the world<|im_end|>")["input_ids"] == encoding.with_specials(
        "你好, the world<|im_end|>"
    )
    real_BT = expected["attention_mask"].bool()
    with torch.inference_mode():
        logits_BTV = model(expected["input_ids"], attention_mask=expected["attention_mask"]).logits
    assert_close(logits_BTV[real_BT], expected["logits"][real_BT], atol=3e-5, rtol=0)

    back = [
        "--base",
        tmp_path / "out",
        "--from",
        "qwen2",
        "--verify",
        proof,
        "--output",
        tmp_path / "back",
    ]
    assert run(monkeypatch, *back) == 0
    assert "use_dynamic_ntk is True" in capsys.readouterr().out
    assert run(monkeypatch, *base, "--verify", "off", "--output", tmp_path / "merged") == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "back"))
    assert one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )
    assert (tmp_path / "back" / "qwen.tiktoken").read_bytes() == (
        small_dir / "qwen.tiktoken"
    ).read_bytes()


def test_an_adapter_alone_becomes_one_of_qwen2(
    small_dir: Path, small_qwen2: Path, golden: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    without_weights = tmp_path / "base"
    without_weights.mkdir()
    for name in ("config.json", "qwen.tiktoken"):
        shutil.copy(small_dir / name, without_weights)
    options = [
        "--base",
        without_weights,
        "--adapter",
        golden / "lora" / "adapter",
        "--format",
        "qwen2",
    ]
    assert run(monkeypatch, *options, "--adapter_only", "true", "--output", tmp_path / "out") == 0
    assert "an adapter of 21 modules" in capsys.readouterr().out
    expected = load_file(golden / "lora" / "outputs.safetensors")
    model = PeftModel.from_pretrained(
        Qwen2ForCausalLM.from_pretrained(small_qwen2), str(tmp_path / "out")
    ).eval()
    real_BT = expected["attention_mask"].bool()
    with torch.inference_mode():
        logits_BTV = model(
            input_ids=expected["input_ids"], attention_mask=expected["attention_mask"]
        ).logits
    assert_close(logits_BTV[real_BT], expected["logits"][real_BT], atol=3e-5, rtol=0)


def test_tokenizers_that_differ_end_with_1_and_the_list(
    small_dir: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "<|im_end|>\u0338"}))
    options = ["--base", small_dir, "--format", "qwen2", "--check_texts", tmp_path / "rows.jsonl"]
    assert run(monkeypatch, *options, "--verify", "off", "--output", tmp_path / "out") == 1
    shown = capsys.readouterr()
    assert "rows.jsonl:1: ids of '<|im_end|>" in shown.out and "out.rejected" in shown.err
    assert not (tmp_path / "out").exists() and (tmp_path / "out.rejected").is_dir()


def test_options_that_contradict_each_other_end_with_2_and_one_line(
    small_dir: Path, small_qwen2: Path, golden: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    adapter, output = ["--adapter", golden / "lora" / "adapter"], ["--output", tmp_path / "out"]
    for options, message in (
        (
            ["--base", small_qwen2, "--from", "qwen2", "--format", "qwen2"],
            "the format qwen2 was given with --from qwen2",
        ),
        (
            ["--base", small_qwen2, "--from", "qwen2", *adapter],
            "an adapter was given with --from qwen2",
        ),
        (["--base", small_qwen2, "--format", "qwen2"], "model_type is 'qwen2'; expected 'qwen'"),
        (
            ["--base", small_dir, "--from", "qwen2"],
            "model_type is 'qwen'; expected 'qwen2' (--from qwen2)",
        ),
        (
            ["--base", small_dir, "--format", "qwen2", "--adapter_only", "true"],
            "expected one --adapter",
        ),
        (
            ["--base", small_dir, "--adapter", "a", "--adapter", "b"],
            "--adapter was given twice; expected all of its",
        ),
        (
            [
                "--base",
                small_dir,
                *adapter,
                "--format",
                "qwen2",
                "--adapter_only",
                "true",
                "--dtype",
                "float16",
            ],
            "dtype was given with adapter_only",
        ),
        (
            ["--base", small_dir, *adapter, "--adapter_only", "true"],
            "adapter_only converts one adapter to Qwen2",
        ),
        (
            ["--base", small_dir, *adapter, "--check_texts", small_dir / "config.json"],
            "the tokenizer stays as it is",
        ),
        (
            ["--base", small_dir, "--format", "qwen2", "--check_texts", tmp_path / "none"],
            "no such file",
        ),
        (["--base", small_dir, "--format", "qwen3"], "qwen3"),
    ):
        assert run(monkeypatch, *options, *output) == 2, options
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error, error
        assert not list(tmp_path.glob("out*"))
