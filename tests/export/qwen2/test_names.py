"""The Qwen2 format in stock transformers: the same function, and back to the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qwen_ds.errors import UserError
from qwen_ds.export.formats import Format, find_format
from qwen_ds.model.modeling import QWenLMHeadModel
from tests.export.folders import merge_with

EXACT = {"atol": 1e-5, "rtol": 0.0}
OFFICIAL = {"atol": 3e-5, "rtol": 0.0}  # golden/README.md
TO_QWEN2, FROM_QWEN2 = find_format("qwen", "qwen2"), find_format("qwen2", "qwen")


def stock(folder: Path) -> Qwen2ForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model) is Qwen2ForCausalLM
    return model


def native(folder: Path) -> QWenLMHeadModel:
    return QWenLMHeadModel.from_pretrained(str(folder), dtype=torch.float32).eval()


def settings(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: t
        for file in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(file).items()
    }


def assert_same_weights(left: Path, right: Path) -> None:
    one, other = tensors(left), tensors(right)
    assert one.keys() == other.keys()
    assert all(
        a.dtype == other[name].dtype and torch.equal(a, other[name]) for name, a in one.items()
    )


@pytest.mark.parametrize("name", ["small", "full"])
def test_stock_qwen2_computes_the_same_logits_up_to_seq_length(
    small_dir: Path, full_dir: Path, small_qwen2: Path, full_qwen2: Path, name: str
) -> None:
    source, export = {"small": (small_dir, small_qwen2), "full": (full_dir, full_qwen2)}[name]
    ours, theirs = native(source), stock(export)
    longest = settings(source)["seq_length"]
    assert theirs.config.max_position_embeddings == longest
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        for length in (1, longest // 3, longest):
            ids_BT = torch.randint(ours.config.vocab_size, (1, length), generator=generator)
            hidden_BTD = ours.transformer(ids_BT)[0], theirs.model(ids_BT).last_hidden_state
            assert_close(*hidden_BTD, **EXACT)
            step = max(1, length // 64)  # 2,048 positions of 151,936 logits would be 1.2 GB
            assert_close(
                ours.lm_head(hidden_BTD[0][:, ::step]),
                theirs.lm_head(hidden_BTD[1][:, ::step]),
                **EXACT,
            )


def test_logits_and_greedy_tokens_are_the_official_ones(small_qwen2: Path, golden: Path) -> None:
    model = stock(small_qwen2)
    padded = load_file(golden / "forward" / "right_pad.safetensors")
    mask_BT = padded["attention_mask"]
    with torch.inference_mode():
        logits_BTV = model(padded["input_ids"], attention_mask=mask_BT).logits
    assert_close(logits_BTV[mask_BT.bool()], padded["logits_mask"][mask_BT.bool()], **OFFICIAL)

    greedy = load_file(golden / "generate" / "greedy.safetensors")
    model.generation_config.update(do_sample=False, eos_token_id=None, top_k=None, top_p=None)
    ids_BT = greedy["input_ids"]
    found_BT = model.generate(ids_BT, attention_mask=greedy["attention_mask"], max_new_tokens=24)
    assert torch.equal(found_BT[:, ids_BT.shape[1] :], greedy["new_tokens"])


def test_greedy_tokens_over_the_official_vocabulary_are_the_official_ones(
    full_qwen2: Path, golden: Path
) -> None:
    model = stock(full_qwen2)
    model.generation_config.update(
        do_sample=False, eos_token_id=None, top_k=None, top_p=None, repetition_penalty=None
    )
    cases = json.loads((golden / "generate" / "chat.json").read_text())
    for case in cases:
        ids_BT, new = torch.tensor([case["context_tokens"]]), case["new_tokens"]
        new = (
            new[: new.index(151643)] if 151643 in new else new
        )  # what the official code puts behind a stop word
        found_BT = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=len(new)
        )
        assert found_BT[0, ids_BT.shape[1] :].tolist() == new


@pytest.mark.parametrize("name", ["lora", "lora_base"])
def test_a_merged_adapter_computes_the_official_logits(
    small_dir: Path, golden: Path, tmp_path: Path, name: str
) -> None:
    adapter = golden / name / "adapter"
    merge_with(small_dir, [adapter], tmp_path / "out", to=TO_QWEN2, block_bytes=3000)
    expected = load_file(golden / name / "outputs.safetensors")
    real_BT = expected["attention_mask"].bool()
    with torch.inference_mode():
        logits_BTV = stock(tmp_path / "out")(
            expected["input_ids"], attention_mask=expected["attention_mask"]
        ).logits
    assert_close(
        logits_BTV[real_BT],
        expected["logits"][real_BT],
        atol={"lora": 3e-5, "lora_base": 3e-4}[name],
        rtol=0,
    )
    merge_with(small_dir, [adapter], tmp_path / "merged")
    merge_with(tmp_path / "out", [], tmp_path / "back", to=FROM_QWEN2)
    assert_same_weights(tmp_path / "merged", tmp_path / "back")


@pytest.mark.parametrize("name", ["small", "full"])
def test_the_way_there_and_back_is_bit_identical(
    small_dir: Path, full_dir: Path, small_qwen2: Path, full_qwen2: Path, tmp_path: Path, name: str
) -> None:
    source, export = {"small": (small_dir, small_qwen2), "full": (full_dir, full_qwen2)}[name]
    report = merge_with(export, [], tmp_path / "back", to=FROM_QWEN2)
    assert not report.rejected and report.untouched == len(tensors(export))
    assert_same_weights(source, tmp_path / "back")
    assert (tmp_path / "back" / "qwen.tiktoken").read_bytes() == (
        source / "qwen.tiktoken"
    ).read_bytes()
    original = settings(source)
    del original["auto_map"]
    assert settings(tmp_path / "back") == original | {
        "rms_norm_eps": original["layer_norm_epsilon"]
    }
    generation = settings(source, "generation_config.json")
    assert settings(tmp_path / "back", "generation_config.json") == generation
    if name == "full":
        assert settings(tmp_path / "back", "tokenizer_config.json")["model_max_length"] == 32768


def test_a_model_that_stock_transformers_saved_again_comes_back_with_all_its_settings(
    small_dir: Path, small_qwen2: Path, tmp_path: Path
) -> None:
    stock(small_qwen2).save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_qwen2 / name, tmp_path / "saved" / name)
    merge_with(tmp_path / "saved", [], tmp_path / "back", to=FROM_QWEN2)
    assert_same_weights(small_dir, tmp_path / "back")
    assert (
        settings(tmp_path / "back")["use_dynamic_ntk"]
        and settings(tmp_path / "back")["max_position_embeddings"] == 512
    )


def test_the_settings_are_those_of_the_same_function(
    small_dir: Path, full_dir: Path, small_qwen2, full_qwen2
) -> None:
    for source, export in ((small_dir, small_qwen2), (full_dir, full_qwen2)):
        old, new = settings(source), settings(export)
        assert new["model_type"] == "qwen2" and new["architectures"] == ["Qwen2ForCausalLM"]
        assert new["intermediate_size"] * 2 == old["intermediate_size"]
        assert new["rms_norm_eps"] == old["layer_norm_epsilon"]
        assert (
            new["num_key_value_heads"] == new["num_attention_heads"] == old["num_attention_heads"]
        )
        assert new["rope_theta"] == new["rope_parameters"]["rope_theta"] == 10000
        assert new["max_position_embeddings"] == old["seq_length"] != old["max_position_embeddings"]
        assert new["use_sliding_window"] is False and new["tie_word_embeddings"] is False
        assert AutoConfig.from_pretrained(export).rope_parameters["rope_theta"] == 10000
    assert (
        settings(small_qwen2)["torch_dtype"] == "float32"
        and settings(full_qwen2)["torch_dtype"] == "bfloat16"
    )


@pytest.mark.parametrize(
    ("chat_format", "adapter", "eos"),
    [
        ("chatml", False, [306, 304]),
        (None, False, [306, 304]),
        ("raw", False, 304),
        ("raw", True, [306, 304]),
    ],
)
def test_a_reply_ends_as_the_model_s_format_says(
    small_dir: Path,
    golden: Path,
    tmp_path: Path,
    chat_format: str | None,
    adapter: bool,
    eos: int | list[int],
) -> None:
    base = Path(shutil.copytree(small_dir, tmp_path / "base"))
    generation = settings(base, "generation_config.json")
    generation.pop("chat_format")
    (base / "generation_config.json").write_text(
        json.dumps(generation | ({"chat_format": chat_format} if chat_format else {}))
    )
    adapters = [golden / "lora" / "adapter"] if adapter else []
    merge_with(
        base, adapters, tmp_path / "out", to=find_format("qwen", "qwen2", merges_adapter=adapter)
    )
    found = settings(tmp_path / "out", "generation_config.json")
    assert (found["eos_token_id"], found["pad_token_id"], found["top_p"]) == (eos, 304, 0.8)
    assert settings(tmp_path / "out")["eos_token_id"] == (eos[0] if isinstance(eos, list) else eos)
    eos_token = "<|im_end|>" if isinstance(eos, list) else "<|endoftext|>"
    assert settings(tmp_path / "out", "tokenizer_config.json")["eos_token"] == eos_token
    merge_with(tmp_path / "out", [], tmp_path / "back", to=FROM_QWEN2)
    back = settings(tmp_path / "back", "generation_config.json")
    assert (back["eos_token_id"], back.get("chat_format")) == (
        304,
        "chatml" if adapter else chat_format,
    )


def test_settings_that_only_qwen_s_own_code_knows_are_kept_for_the_way_back_alone(
    small_dir: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(small_dir, tmp_path / "base"))
    own = {"chat_format": "chatml", "max_window_size": 100, "stop_words_ids": [[5]]}
    generation = settings(base, "generation_config.json") | own
    (base / "generation_config.json").write_text(json.dumps(generation))
    merge_with(base, [], tmp_path / "out", to=TO_QWEN2)
    found = settings(tmp_path / "out", "generation_config.json")
    assert not found.keys() & own.keys()
    merge_with(tmp_path / "out", [], tmp_path / "back", to=FROM_QWEN2)
    assert settings(tmp_path / "back", "generation_config.json") == generation
    # What was changed since is what holds.
    (tmp_path / "out" / "generation_config.json").write_text(
        json.dumps(found | {"top_p": 0.3, "eos_token_id": 304})
    )
    merge_with(tmp_path / "out", [], tmp_path / "again", to=FROM_QWEN2)
    expected = generation | {"top_p": 0.3, "chat_format": "raw"}
    assert settings(tmp_path / "again", "generation_config.json") == expected


@pytest.mark.parametrize(
    ("in_generation", "in_config", "chat_format"),
    [
        (306, 304, "chatml"),
        ([306], 304, "chatml"),
        ([304], 306, "raw"),
        (None, 306, "chatml"),
        (None, 304, "raw"),
        (None, None, "chatml"),
    ],
)
def test_where_a_foreign_qwen2_ends_its_replies_tells_its_chat_format(
    small_dir: Path, tmp_path: Path, in_generation: object, in_config: object, chat_format: str
) -> None:
    """Other trainers write one id, or no file at all. 304 ends a document, 306 a reply."""
    merge_with(small_dir, [], tmp_path / "out", to=TO_QWEN2)
    spoil(tmp_path / "out", eos_token_id=in_config)
    generation = tmp_path / "out" / "generation_config.json"
    if in_generation is None:
        generation.unlink()
    else:
        generation.write_text(json.dumps({"eos_token_id": in_generation}))
    merge_with(tmp_path / "out", [], tmp_path / "back", to=FROM_QWEN2)
    found = settings(tmp_path / "back", "generation_config.json")
    assert (found["chat_format"], found["eos_token_id"]) == (chat_format, 304)


def test_the_dtype_that_the_way_back_tells_is_that_of_the_weights(
    small_dir: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(small_dir, tmp_path / "base"))
    spoil(base, torch_dtype="float32", bf16=False)
    merge_with(base, [], tmp_path / "out", to=TO_QWEN2)
    stock(tmp_path / "out").half().save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "out" / "tokenizer.json", tmp_path / "saved")
    for name, dtype in (("out", "float32"), ("saved", "float16")):
        merge_with(tmp_path / name, [], tmp_path / f"back_{name}", to=FROM_QWEN2)
        assert settings(tmp_path / f"back_{name}")["torch_dtype"] == dtype


def test_the_report_has_the_checksum_of_every_file_that_was_read(
    small_dir: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(small_dir, tmp_path / "base"))
    for name in ("README.md", "vocab.json", "LICENSE"):
        (base / name).write_text(name)
    huggingface_hub.save_torch_state_dict(tensors(base), base, max_shard_size="500KB")
    assert not (base / "model.safetensors").exists()
    read = {"config.json", "generation_config.json", "model.safetensors.index.json", "LICENSE"}
    read |= {path.name for path in base.glob("*.safetensors")}
    there = {path.name for path in base.iterdir()}
    there_and_read = (read | {"qwen.tiktoken", "tokenizer_config.json"}) & there
    assert merge_with(base, [], tmp_path / "out", to=TO_QWEN2).inputs.keys() == there_and_read
    back = merge_with(tmp_path / "out", [], tmp_path / "back", to=FROM_QWEN2)
    weights = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert back.inputs.keys() == weights | {
        "config.json", "generation_config.json", "model.safetensors.index.json", "LICENSE",
        "tokenizer.json",
    }  # fmt: skip
    same = merge_with(base, [], tmp_path / "same", dtype="float16")
    assert same.inputs.keys() == there - {"README.md"}


def test_a_configuration_of_august_2023_converts_and_comes_back(
    small_dir: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(small_dir, tmp_path / "base"))
    new_to_old = {
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "intermediate_size": "ffn_hidden_size", "max_position_embeddings": "n_positions",
    }  # fmt: skip
    old = {
        new_to_old.get(key, key): value
        for key, value in settings(base).items()
        if key != "auto_map"
    }
    old["padded_vocab_size"] = old["vocab_size"]
    (base / "config.json").write_text(json.dumps(old))
    merge_with(base, [], tmp_path / "out", to=TO_QWEN2)
    ids_BT = torch.arange(64)[None]
    with torch.inference_mode():
        assert_close(
            stock(tmp_path / "out")(ids_BT).logits, native(small_dir)(ids_BT).logits, **EXACT
        )
    merge_with(tmp_path / "out", [], tmp_path / "back", to=FROM_QWEN2)
    assert settings(tmp_path / "back") == old | {"rms_norm_eps": 1e-4}


def test_a_foreign_qwen2_becomes_a_qwen_without_what_qwen2_never_had(
    small_qwen2: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(tmp_path / "theirs")
    shutil.copy(small_qwen2 / "tokenizer.json", tmp_path / "theirs")
    report = merge_with(tmp_path / "theirs", [], tmp_path / "ours", to=FROM_QWEN2)
    assert report.edits["config.json"] == "use_dynamic_ntk is False, use_logn_attn is False"
    ids_BT = torch.randint(512, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():  # also beyond the 64 tokens where NTK and LogN would begin
        assert_close(native(tmp_path / "ours")(ids_BT).logits, model(ids_BT).logits, **EXACT)


def test_a_qwen2_that_was_changed_since_is_taken_at_its_word(
    small_qwen2: Path, tmp_path: Path
) -> None:
    """Its config.json still carries the original settings, which no longer hold."""
    base = Path(shutil.copytree(small_qwen2, tmp_path / "base"))
    spoil(
        base,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 20000},
    )
    merge_with(base, [], tmp_path / "out", to=FROM_QWEN2)
    found = settings(tmp_path / "out")
    assert (found["seq_length"], found["rotary_emb_base"], found["use_dynamic_ntk"]) == (
        128,
        20000,
        False,
    )
    ids_BT = torch.arange(100)[None]
    with torch.inference_mode():
        assert_close(native(tmp_path / "out")(ids_BT).logits, stock(base)(ids_BT).logits, **EXACT)


def spoil(folder: Path, **values: Any) -> None:
    """Overwrite keys of config.json; None takes one out."""
    changed = settings(folder) | values
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in changed.items() if v is not None})
    )


def drop_tensor(folder: Path, name: str) -> None:
    kept = tensors(folder)
    del kept[name]
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def add_tensor(folder: Path, name: str, value: Tensor) -> None:
    save_file(
        {**tensors(folder), name: value}, folder / "model.safetensors", metadata={"format": "pt"}
    )


def assert_refused(
    source: Path, change: Callable[[Path], None], to: Format, message: str, tmp_path: Path
) -> None:
    """A changed copy of `source` is refused in one line, and nothing is written."""
    base = Path(shutil.copytree(source, tmp_path / "base"))
    change(base)
    with pytest.raises(UserError, match=message) as caught:
        merge_with(base, [], tmp_path / "out", to=to)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: spoil(f, kv_channels=8),
         r"json: kv_channels 8 x num_attention_heads 4 is not hidden_size 64"),
        (lambda f: spoil(f, rotary_pct=0.5), r"config\.json: rotary_pct is 0\.5; expected 1"),
        (lambda f: spoil(f, no_bias=False), r"config\.json: no_bias is False; expected True"),
        (lambda f: spoil(f, scale_attn_weights=False),
         r"config\.json: scale_attn_weights is False; expected True"),
        (lambda f: spoil(f, tie_word_embeddings=True),
         r"config\.json: tie_word_embeddings is True; expected False"),
        (lambda f: spoil(f, intermediate_size=353),
         r"intermediate_size is 353; expected twice the width"),
        (lambda f: spoil(f, hidden_size="64"), r"config\.json: .*hidden_size"),
        (lambda f: spoil(f, num_hidden_layers=4),
         r"transformer\.h\.3\..*: in none of the shards; expected the 35"),
        (lambda f: spoil(f, intermediate_size=354),
         r"0\.mlp\.c_proj\.weight is \[64, 176\]; expected"),
        (lambda f: drop_tensor(f, "transformer.ln_f.weight"),
         r"transformer\.ln_f\.weight: in none of the shards"),
        (lambda f: add_tensor(f, "visual.conv.weight", torch.zeros(2)),
         r"visual\.conv\.weight: in the weights and"),
    ],
)  # fmt: skip
def test_what_qwen2_cannot_be_is_named_before_anything_is_written(
    small_dir: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    assert_refused(small_dir, change, TO_QWEN2, message, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: spoil(f, num_key_value_heads=2),
         r"num_key_value_heads is 2; expected 4, the only one"),
        (lambda f: spoil(f, use_sliding_window=True),
         r"use_sliding_window is True; expected False"),
        (lambda f: spoil(f, tie_word_embeddings=True),
         r"tie_word_embeddings is True; expected False"),
        (lambda f: spoil(f, hidden_act="gelu"), r"hidden_act is 'gelu'; expected 'silu'"),
        (lambda f: spoil(f, head_dim=32), r"head_dim is 32; expected 16"),
        (lambda f: spoil(f, rope_scaling={"type": "yarn", "factor": 4}, rope_parameters={}),
         r"rope_type is 'yarn'"),
        (lambda f: spoil(f, hidden_size=None), r"hidden_size is None; expected a positive number"),
        (lambda f: drop_tensor(f, "model.norm.weight"),
         r"model\.norm\.weight: in none of the shards"),
        (lambda f: spoil(f, vocab_size=500, qwen=None),
         r"are 512 tokens but config\.json says vocab_size 500"),
        (lambda f: (f / "tokenizer.json").unlink(),
         r"tokenizer\.json: no such file; expected the tokenizer of"),
    ],
)  # fmt: skip
def test_what_qwen_cannot_be_is_named_before_anything_is_written(
    small_qwen2: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    assert_refused(small_qwen2, change, FROM_QWEN2, message, tmp_path)


def test_tables_that_early_releases_stored_are_left_out(small_dir: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(small_dir, tmp_path / "base"))
    add_tensor(base, "transformer.h.0.attn.rotary_emb.inv_freq", torch.zeros(8))
    report = merge_with(base, [], tmp_path / "out", to=TO_QWEN2)
    assert report.left_out == ["transformer.h.0.attn.rotary_emb.inv_freq"]
    assert not any("inv_freq" in name for name in tensors(tmp_path / "out"))


def test_a_sharded_export_is_ready_for_the_hub(small_dir: Path, tmp_path: Path) -> None:
    """The hub's and transformers' loaders take index and shards; everybody may read all files."""
    base = Path(shutil.copytree(small_dir, tmp_path / "base"))
    (base / "LICENSE").write_text("terms")
    (base / "NOTICE.md").write_text("notice")
    all_tensors = tensors(base)
    (base / "model.safetensors").unlink()
    huggingface_hub.save_torch_state_dict(all_tensors, base, max_shard_size="200KB")
    assert len(list(base.glob("model-*.safetensors"))) > 2
    old_mask = os.umask(0o077)
    try:
        merge_with(base, [], tmp_path / "out", to=TO_QWEN2)
    finally:
        os.umask(old_mask)
    out = tmp_path / "out"
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o644}
    expected = {
        "README.md", "LICENSE", "NOTICE.md", "config.json", "generation_config.json",
        "merge_report.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
        "model.safetensors.index.json",
    }  # fmt: skip
    assert {path.name for path in out.iterdir() if not path.name.startswith("model-")} == expected
    index = settings(out, "model.safetensors.index.json")
    assert set(index["weight_map"].values()) == {path.name for path in out.glob("model-*")}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in all_tensors.values())

    loaded, ids_BT = stock(out), torch.arange(30)[None]
    fresh = Qwen2ForCausalLM(AutoConfig.from_pretrained(out)).eval()
    huggingface_hub.load_torch_model(fresh, out, strict=True)
    with torch.inference_mode():
        expected_BTV = native(small_dir)(ids_BT).logits
        for model in (loaded, fresh):
            assert_close(model(ids_BT).logits, expected_BTV, **EXACT)


def test_the_formats_must_differ_and_an_adapter_goes_before() -> None:
    for target, adapter in (("qwen2", False), ("qwen", True)):
        with pytest.raises(
            UserError, match="was given with --from qwen2; expected a conversion of the base to"
        ):
            find_format("qwen2", target, merges_adapter=adapter)
