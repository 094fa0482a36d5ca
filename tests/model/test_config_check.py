"""Settings before they size anything; the wrong ones are in tests/adversarial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_ds.errors import UserError
from qwen_ds.model.config_check import check_generation, checked_config
from qwen_ds.model.configuration import QWenConfig

PATH = Path("base/config.json")


def settings(small_dir: Path, **changes: Any) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((small_dir / "config.json").read_text())
    return read | changes


def test_a_right_file_gives_what_transformers_reads_from_it(small_dir: Path) -> None:
    found = checked_config(settings(small_dir), PATH, QWenConfig)
    assert found.to_dict() == QWenConfig.from_pretrained(small_dir).to_dict()


def test_what_means_nothing_here_does_not_reach_transformers(small_dir: Path) -> None:
    said = {
        "gradient_checkpointing": True,  # it would recompute whatever the recipe says
        "attn_implementation": "flash_attention_2", "torch_dtype": "torch.bfloat16",
        "quantization_config": {}, "visual": None, "head_dim": None,
    }  # fmt: skip
    found = checked_config(settings(small_dir, **said), PATH, QWenConfig)
    plain = checked_config(settings(small_dir, torch_dtype="bfloat16"), PATH, QWenConfig)
    assert found.to_dict() == plain.to_dict()
    assert found._attn_implementation is None and found.dtype == torch.bfloat16
    eager = settings(small_dir, _attn_implementation="eager")
    assert checked_config(eager, PATH, QWenConfig)._attn_implementation == "eager"


def test_the_names_of_august_2023_have_the_same_ranges(small_dir: Path) -> None:
    old = {
        "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "ffn_hidden_size": 352,
        "padded_vocab_size": 512, "vocab_size": 300, "kv_channels": 16, "model_type": "qwen",
    }  # fmt: skip
    found = checked_config(old, PATH, QWenConfig)
    assert (found.hidden_size, found.num_hidden_layers, found.vocab_size) == (64, 3, 512)
    for name in ("n_embd", "n_layer", "n_head", "n_positions", "ffn_hidden_size"):
        with pytest.raises(UserError, match=f"{name} is True; expected a whole number"):
            checked_config(old | {name: True}, PATH, QWenConfig)


@pytest.mark.parametrize("key", sorted(set(dir(QWenConfig)) - set(vars(QWenConfig()))))
def test_no_name_of_transformers_code_is_set_by_a_file(key: str, small_dir: Path) -> None:
    """Either the key is refused, or the configuration is what it was without it."""
    plain = checked_config(settings(small_dir), PATH, QWenConfig)
    for value in (None, 5):
        try:
            found = checked_config(settings(small_dir) | {key: value}, PATH, QWenConfig)
        except UserError:
            continue
        changed = {name for name in vars(found) if vars(found)[name] != vars(plain).get(name)}
        meant = {"id2label", "label2id", "dtype", "_name_or_path", "_commit_hash"}
        own = {QWenConfig.attribute_map.get(key, key), f"_{key}"}
        assert changed <= meant | own, (key, value, changed)
        assert callable(found.to_dict) and found.attribute_map is QWenConfig.attribute_map


def test_notes_and_keys_of_other_programs_stay_without_effect(small_dir: Path) -> None:
    notes = {"comment": "x", "rms_norm_eps": 1e-6, "transformers_weights": None, "_name_or_path": 1}
    assert checked_config(settings(small_dir, **notes), PATH, QWenConfig).hidden_size == 64


@pytest.mark.parametrize("ids", [7, [7, 8], None, []])
def test_a_generation_config_with_any_ends_is_taken(ids: object) -> None:
    check_generation({"eos_token_id": ids, "chat_format": "raw", "top_p": 0.8}, PATH)
