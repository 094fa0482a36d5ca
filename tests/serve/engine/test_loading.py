"""An engine from a folder: its dtype, its stop ids, an adapter, and no advice of the folder's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_ds.decode.request import Completion, Request
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.stop import StopRule
from serve.engine.engine import ServingEngine
from serve.engine.loading import choose_dtype, load_engine
from tests.serve.engine.test_engine import answers


def greedy(engine: ServingEngine, prompts: list[list[int]], tokens: int) -> list[Completion]:
    sampling = SamplingParams(max_new_tokens=tokens)
    return answers(engine, [Request(prompt, sampling, StopRule()) for prompt in prompts])


@pytest.mark.parametrize(
    ("name", "stored", "device", "expected"),
    [
        ("auto", torch.bfloat16, "cpu", torch.bfloat16),
        ("auto", torch.float16, "cpu", torch.float32),
        ("auto", torch.float16, "cuda", torch.float16),
        ("float32", torch.bfloat16, "cuda", torch.float32),
    ],
)
def test_dtype_auto_is_the_stored_one_but_never_fp16_on_a_cpu(
    name: str, stored: torch.dtype, device: str, expected: torch.dtype
) -> None:
    assert choose_dtype(name, stored, torch.device(device)) == expected


def test_the_engine_has_the_tokenizers_stop_ids_and_the_models_dtype(
    small_dir: Path, full_dir: Path
) -> None:
    assert load_engine(small_dir).stop == StopRule((304, 305, 306))
    full = load_engine(full_dir)
    assert full.stop == StopRule((151643, 151644, 151645))
    assert (full.model.dtype, full.vocabulary.size) == (torch.bfloat16, 151851)
    assert load_engine(full_dir, dtype="float32").model.dtype == torch.float32


def test_the_generation_settings_of_a_folder_have_no_effect(
    small_dir: Path, golden: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_dir, folder)
    advice = {
        "repetition_penalty": 5.0, "do_sample": True, "eos_token_id": 149, "max_new_tokens": 2,
        "min_length": 90,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(advice))
    tensors = load_file(golden / "generate" / "greedy.safetensors")
    rows = zip(tensors["input_ids"], tensors["attention_mask"], strict=True)
    prompts = [ids[mask.bool()].tolist() for ids, mask in rows]
    found = greedy(load_engine(folder), prompts, 24)
    assert [list(c.ids) for c in found] == tensors["new_tokens"].tolist()


def test_an_adapter_acts_with_its_dropout_off(
    small_dir: Path, golden: Path, tmp_path: Path
) -> None:
    shutil.copytree(golden / "lora" / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_dropout": 0.5}))
    outputs = load_file(golden / "lora" / "outputs.safetensors")
    mask_BT = outputs["attention_mask"].bool()
    prompts = [ids[mask].tolist() for ids, mask in zip(outputs["input_ids"], mask_BT, strict=True)]
    rows = zip(outputs["logits"], mask_BT, strict=True)
    last_BV = torch.stack([logits_TV[mask_T][-1] for logits_TV, mask_T in rows])
    loaded = load_engine(small_dir, tmp_path / "adapter")
    engine = replace(loaded, model=loaded.model.train())
    found = greedy(engine, prompts, 8)
    assert [c.ids[0] for c in found] == last_BV.argmax(-1).tolist()
    assert greedy(engine, prompts, 8) == found
    assert greedy(load_engine(small_dir), prompts, 8) != found
