"""Registration, loading and saving, fresh weights, both generations of config, shapes of the
official models."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import qwen_ds
from qwen_ds.errors import UserError

HOSTILE = "raise RuntimeError('code of the folder was run')\n"
AUGUST = {  # the keys of the first release, small
    "activation": "swiglu",
    "architectures": ["QWenLMHeadModel"],
    "attn_pdrop": 0.0,
    "bos_token_id": 304,
    "embd_pdrop": 0.0,
    "eos_token_id": 304,
    "ffn_hidden_size": 352,
    "kv_channels": 16,
    "layer_norm_epsilon": 0.0001,
    "model_type": "qwen",
    "n_embd": 64,
    "n_head": 4,
    "n_inner": None,
    "n_layer": 3,
    "n_positions": 512,
    "no_bias": True,
    "onnx_safe": None,
    "padded_vocab_size": 512,
    "params_dtype": "torch.bfloat16",
    "pos_emb": "rotary",
    "resid_pdrop": 0.1,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 64,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "use_cache": True,
    "use_flash_attn": True,
    "vocab_size": 500,
}


def with_config(source: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_importing_the_package_stays_cheap_and_opens_no_training_library() -> None:
    heavy = ["deepspeed", "peft", "datasets", "tensorboard", "matplotlib", "jieba", "rouge_score"]
    code = f"import sys, qwen_ds; print([name for name in {heavy} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize("trust", [None, False, True])
def test_our_classes_win_over_code_in_the_folder(
    small_dir: Path, tmp_path: Path, trust: bool | None
) -> None:
    folder = with_config(
        small_dir,
        tmp_path / "hostile",
        auto_map={
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModel": "modeling_qwen.QWenModel",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
    )
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
    for key in (
        "seq_length",
        "kv_channels",
        "layer_norm_epsilon",
        "use_dynamic_ntk",
        "use_logn_attn",
        "intermediate_size",
    ):
        assert vars(again.config)[key] == vars(model.config)[key]
    assert again.generation_config.max_window_size == 400


def test_the_stored_dtype_is_kept_and_the_official_flags_choose_another(
    full_dir: Path, small_dir: Path
) -> None:
    assert AutoModelForCausalLM.from_pretrained(full_dir).dtype == torch.bfloat16
    for flag, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for load in (AutoModelForCausalLM, qwen_ds.QWenLMHeadModel):
            assert load.from_pretrained(small_dir, **{flag: True}).dtype == dtype
    assert (
        AutoModelForCausalLM.from_pretrained(small_dir, bf16=True, dtype=torch.float16).dtype
        == torch.float16
    )


def test_tables_that_early_checkpoints_stored_are_ignored(small_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "early"
    shutil.copytree(small_dir, folder)
    extra = {
        "transformer.rotary_emb.inv_freq": torch.ones(8),
        "transformer.h.0.attn.masked_bias": torch.ones(1),
    }
    save_file(
        load_file(small_dir / "model.safetensors") | extra,
        folder / "model.safetensors",
        {"format": "pt"},
    )
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())


def test_august_and_september_files_are_the_same_model(small_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "august"
    shutil.copytree(small_dir, folder)
    (folder / "config.json").write_text(
        json.dumps(AUGUST | {"use_dynamic_ntk": True, "use_logn_attn": True})
    )
    august, september = (
        AutoModelForCausalLM.from_pretrained(f).eval() for f in (folder, small_dir)
    )
    assert (
        august.config.vocab_size == 512
    )  # padded_vocab_size, the rows of the embedding, whatever vocab_size says
    ids = torch.arange(100).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(august(ids).logits, september(ids).logits)
    august.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert (
        saved["hidden_size"] == 64 and saved["intermediate_size"] == 352 and "n_embd" not in saved
    )


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
    layers, hidden, heads, intermediate, rows, base, _ = OFFICIAL[name]
    return qwen_ds.QWenConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        kv_channels=128,
        intermediate_size=intermediate,
        vocab_size=rows,
        rotary_emb_base=base,
    )


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
    config = qwen_ds.QWenConfig(
        vocab_size=800,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        kv_channels=64,
        intermediate_size=1024,
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
    from safetensors.torch import save_file

    folder = tmp_path / "missing"
    shutil.copytree(small_dir, folder)
    weights = load_file(small_dir / "model.safetensors")
    gone = "transformer.h.1.mlp.c_proj.weight"
    save_file(
        {k: v for k, v in weights.items() if k != gone},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"] == {gone}
    loaded = model.state_dict()
    assert abs(loaded[gone].std().item() / (0.02 / math.sqrt(6)) - 1) < 0.1
    for name in weights.keys() - {gone}:
        assert torch.equal(loaded[name], weights[name]), name


def test_biases_everywhere_when_no_bias_is_false() -> None:
    with torch.device("meta"):
        config = qwen_ds.QWenConfig(
            hidden_size=64,
            num_attention_heads=4,
            kv_channels=16,
            num_hidden_layers=1,
            no_bias=False,
            intermediate_size=64,
        )
        names = {
            name
            for name, _ in qwen_ds.QWenLMHeadModel(config).named_parameters()
            if name.endswith("bias")
        }
    assert {name.removeprefix("transformer.h.0.") for name in names} == {
        "attn.c_attn.bias", "attn.c_proj.bias", "mlp.w1.bias", "mlp.w2.bias", "mlp.c_proj.bias",
    }  # fmt: skip
