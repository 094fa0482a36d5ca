"""Registration, loading and saving, fresh weights, both generations of config, shapes of the
official models."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import qwen_ds
from qwen_ds.errors import UserError

HOSTILE = "raise RuntimeError('code of the folder was run')\n"
# The keys of the first release, small.
AUGUST = json.loads(
    """{
    "activation": "swiglu", "architectures": ["QWenLMHeadModel"], "attn_pdrop": 0.0,
    "bos_token_id": 304, "embd_pdrop": 0.0, "eos_token_id": 304, "ffn_hidden_size": 352,
    "kv_channels": 16, "layer_norm_epsilon": 0.0001, "model_type": "qwen", "n_embd": 64,
    "n_head": 4, "n_inner": null, "n_layer": 3, "n_positions": 512, "no_bias": true,
    "onnx_safe": null, "padded_vocab_size": 512, "params_dtype": "torch.bfloat16",
    "pos_emb": "rotary", "resid_pdrop": 0.1, "rotary_emb_base": 10000, "rotary_pct": 1.0,
    "scale_attn_weights": true, "seq_length": 64, "tie_word_embeddings": false,
    "tokenizer_type": "QWenTokenizer", "use_cache": true, "use_flash_attn": true, "vocab_size": 500
    }"""
)


def with_config(source: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_importing_the_package_stays_cheap_and_opens_no_training_library() -> None:
    heavy = ["deepspeed", "peft", "datasets", "tensorboard", "matplotlib", "jieba", "rouge_score"]
    code = f"import sys, qwen_ds; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("trust", [None, False, True])
def test_our_classes_win_over_code_in_the_folder(
    small_dir: Path, tmp_path: Path, trust: bool | None
) -> None:
    auto_map = {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModel": "modeling_qwen.QWenModel",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    }
    folder = with_config(small_dir, tmp_path / "hostile", auto_map=auto_map)
    tokenizer = {
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py"):
        (folder / name).write_text(HOSTILE)
    options = {} if trust is None else {"trust_remote_code": trust}
    assert type(AutoConfig.from_pretrained(folder, **options)) is qwen_ds.QWenConfig
    assert type(AutoModel.from_pretrained(folder, **options)) is qwen_ds.QWenModel
    assert type(AutoTokenizer.from_pretrained(folder, **options)) is qwen_ds.QWenTokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert type(model) is qwen_ds.QWenLMHeadModel
    model.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved/config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loading_changes_no_weight(small_dir: Path, dtype: torch.dtype) -> None:
    """transformers re-initialises modules whose buffers a checkpoint lacks: c_proj was lost that
    way."""
    model, report = AutoModelForCausalLM.from_pretrained(
        small_dir, dtype=dtype, output_loading_info=True
    )
    assert not any(report.values())
    assert not list(model.buffers())
    stored, loaded = load_file(small_dir / "model.safetensors"), model.state_dict()
    assert stored.keys() == loaded.keys()
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor.to(dtype)), name


def test_saving_and_loading_gives_the_same_weights_and_config(
    small_dir: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_dir)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    numbers = ("seq_length", "kv_channels", "layer_norm_epsilon", "intermediate_size")
    for key in (*numbers, "use_dynamic_ntk", "use_logn_attn"):
        assert vars(again.config)[key] == vars(model.config)[key]
    assert again.generation_config.max_window_size == 400


def test_the_stored_dtype_is_kept_and_the_official_flags_choose_another(
    full_dir: Path, small_dir: Path
) -> None:
    assert AutoModelForCausalLM.from_pretrained(full_dir).dtype == torch.bfloat16
    for flag, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for load in (AutoModelForCausalLM, qwen_ds.QWenLMHeadModel):
            assert load.from_pretrained(small_dir, **{flag: True}).dtype == dtype
    both = AutoModelForCausalLM.from_pretrained(small_dir, bf16=True, dtype=torch.float16)
    assert both.dtype == torch.float16


def load_with(source: Path, folder: Path, tensors: dict[str, Tensor]) -> tuple[Any, dict]:
    """Load a copy of `source` that has these weights; the model and transformers' report."""
    shutil.copytree(source, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


def test_tables_that_early_checkpoints_stored_are_ignored(small_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(small_dir / "model.safetensors")
    tensors["transformer.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["transformer.h.0.attn.masked_bias"] = torch.ones(1)
    _, report = load_with(small_dir, tmp_path / "early", tensors)
    assert not any(report.values())


def test_august_and_september_files_are_the_same_model(small_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "august"
    shutil.copytree(small_dir, folder)
    config = AUGUST | {"use_dynamic_ntk": True, "use_logn_attn": True}
    (folder / "config.json").write_text(json.dumps(config))
    august, september = map(AutoModelForCausalLM.from_pretrained, (folder, small_dir))
    # padded_vocab_size, the rows of the embedding, whatever vocab_size says
    assert august.config.vocab_size == 512
    ids = torch.arange(100).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(august(ids).logits, september(ids).logits)
    august.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert (saved["hidden_size"], saved["intermediate_size"]) == (64, 352)
    assert "n_embd" not in saved


def test_what_a_config_leaves_out_gets_the_default_of_its_time() -> None:
    bare = {"kv_channels": 16, "num_attention_heads": 4, "hidden_size": 64}
    september = qwen_ds.QWenConfig(**bare)
    assert (september.use_dynamic_ntk, september.use_logn_attn) == (True, True)
    assert (september.layer_norm_epsilon, september.seq_length) == (1e-6, 8192)
    august = qwen_ds.QWenConfig(n_embd=64, n_head=4, n_layer=2, kv_channels=16)
    assert (august.use_dynamic_ntk, august.use_logn_attn) == (False, False)
    assert (august.layer_norm_epsilon, august.seq_length) == (1e-5, 2048)
    assert august.num_hidden_layers == 2


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"kv_channels": 8}, "kv_channels 8 x num_attention_heads 4 is not hidden_size 64"),
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5; expected 1.0"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"bf16": True, "fp16": True}, "at most one of bf16, fp16, fp32"),
    ],
)
def test_a_config_that_this_model_does_not_implement_is_refused(
    small_dir: Path, tmp_path: Path, change, complaint
) -> None:
    with pytest.raises(UserError, match=complaint):
        AutoConfig.from_pretrained(with_config(small_dir, tmp_path / "changed", **change))


# layers, hidden, heads, intermediate, rows, rotary base, parameters of the official checkpoint
OFFICIAL = {
    "1.8B": (24, 2048, 16, 11008, 151936, 10000, 1_836_828_672),
    "7B": (32, 4096, 32, 22016, 151936, 10000, 7_721_324_544),
    "14B": (40, 5120, 40, 27392, 152064, 10000, 14_167_290_880),
    "72B": (80, 8192, 64, 49152, 152064, 1_000_000, 72_287_920_128),
}


def official(name: str) -> qwen_ds.QWenConfig:
    keys = "num_hidden_layers hidden_size num_attention_heads intermediate_size vocab_size".split()
    *shape, base, _ = OFFICIAL[name]
    shapes = dict(zip(keys, shape, strict=True))
    return qwen_ds.QWenConfig(kv_channels=128, rotary_emb_base=base, **shapes)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_shapes_have_the_official_number_of_parameters(name: str) -> None:
    layers, d, _, intermediate, rows, _, expected = OFFICIAL[name]
    attention = d * 3 * d + 3 * d + d * d
    mlp = 3 * d * (intermediate // 2)
    assert 2 * rows * d + layers * (attention + mlp + 2 * d) + d == expected
    with torch.device("meta"):
        model = qwen_ds.QWenLMHeadModel(official(name))
    assert sum(p.numel() for p in model.parameters()) == expected
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_parameter_names_are_the_official_ones_verbatim(golden: Path) -> None:
    with torch.device("meta"):
        model = qwen_ds.QWenLMHeadModel(qwen_ds.QWenConfig.from_pretrained(golden / "small"))
    with safe_open(golden / "small/model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # not a dict
    assert {name: list(p.shape) for name, p in model.named_parameters()} == shapes
    biases = {name.split(".", 3)[-1] for name in shapes if name.endswith(".bias")}
    assert biases == {"attn.c_attn.bias"}


def test_fresh_weights_are_drawn_as_officially() -> None:
    torch.manual_seed(0)
    heads = {"hidden_size": 256, "num_attention_heads": 4, "kv_channels": 64}
    config = qwen_ds.QWenConfig(
        vocab_size=800, num_hidden_layers=8, intermediate_size=1024, **heads
    )
    for name, tensor in qwen_ds.QWenLMHeadModel(config).named_parameters():
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif name.endswith(".bias"):
            assert not tensor.any(), name
        else:
            expected = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert abs(tensor.std().item() / expected - 1) < 0.02, name
            assert abs(tensor.mean().item()) < expected / 20, name


def test_a_missing_weight_is_drawn_and_the_others_stay(small_dir: Path, tmp_path: Path) -> None:
    weights, gone = load_file(small_dir / "model.safetensors"), "transformer.h.1.mlp.c_proj.weight"
    del weights[gone]
    model, report = load_with(small_dir, tmp_path / "missing", weights)
    assert report["missing_keys"] == {gone}
    loaded = model.state_dict()
    assert abs(loaded[gone].std().item() / (0.02 / math.sqrt(6)) - 1) < 0.1
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor), name


def test_biases_everywhere_when_no_bias_is_false(small_dir: Path) -> None:
    config = qwen_ds.QWenConfig.from_pretrained(small_dir, no_bias=False)
    with torch.device("meta"):
        block = qwen_ds.QWenLMHeadModel(config).transformer.h[0]
    names = {name for name, _ in block.named_parameters() if name.endswith("bias")}
    linears = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    assert names == {f"{linear}.bias" for linear in linears}
