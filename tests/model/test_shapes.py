"""The tensors that a configuration describes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_ds.errors import UserError
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.model.shapes import check_shapes, state_shapes


@pytest.mark.parametrize("layers", [1, 2, 12])
@pytest.mark.parametrize("no_bias", [True, False])
def test_they_are_the_model_s_own_in_its_own_order(layers: int, no_bias: bool) -> None:
    config = QWenConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=layers, num_attention_heads=2,
        kv_channels=4, intermediate_size=24, no_bias=no_bias,
    )  # fmt: skip
    with torch.device("meta"):
        state = QWenLMHeadModel(config).state_dict()
    expected = [(name, tuple(tensor.shape)) for name, tensor in state.items()]
    assert list(state_shapes(config).items()) == expected
    assert config.num_hidden_layers == layers


def test_a_model_of_the_largest_sizes_is_described_without_being_made() -> None:
    config = QWenConfig(
        vocab_size=2**24, hidden_size=2**18, num_hidden_layers=1024, num_attention_heads=2**11,
        kv_channels=128, intermediate_size=2**21,
    )  # fmt: skip
    assert len(state_shapes(config)) == 3 + 8 * 1024


def test_the_first_that_is_missing_in_surplus_or_of_another_shape_is_named(
    small_dir: Path,
) -> None:
    tensors = load_file(small_dir / "model.safetensors")
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = state_shapes(QWenConfig.from_pretrained(small_dir))
    tables = {"transformer.h.0.attn.bias": (1, 1, 8, 8), "transformer.rotary_emb.inv_freq": (8,)}
    assert check_shapes(found | tables, expected) == found
    with pytest.raises(UserError, match=r"^lm_head\.weight: in none of the shards"):
        check_shapes({k: v for k, v in found.items() if k != "lm_head.weight"}, expected)
    with pytest.raises(UserError, match="^extra: in the weights and not in the model that config"):
        check_shapes(found | {"extra": (1,)}, expected)
    with pytest.raises(UserError, match=r"^lm_head\.weight is \[2\]; expected \[512, 64\]"):
        check_shapes(found | {"lm_head.weight": (2,)}, expected)
