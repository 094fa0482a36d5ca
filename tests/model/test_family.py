"""The family's names, widths and order are those of the real modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qwen_ds.model.family import FAMILIES, QWEN
from qwen_ds.model.tokenizer import load_encoding

# Every width differs from the others, so that none can stand for another.
CONFIG = QWEN.config_class(
    hidden_size=24, num_attention_heads=3, kv_channels=8, intermediate_size=88, num_hidden_layers=2,
    vocab_size=50, seq_length=64, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.device("meta"):
        return QWEN.model_class(CONFIG)


def test_names_are_those_of_the_modules(model: nn.Module) -> None:
    blocks = model.get_submodule(QWEN.blocks)
    assert len(blocks) == CONFIG.num_hidden_layers
    assert all(isinstance(block, QWEN.block_class) for block in blocks)
    assert model.get_input_embeddings() is model.get_submodule(QWEN.embedding)
    assert model.get_output_embeddings() is model.get_submodule(QWEN.head)
    named = {QWEN.embedding, QWEN.head, QWEN.final_norm} | {
        f"{QWEN.blocks}.{i}.{name}"
        for i in range(len(blocks))
        for name in (*QWEN.block_norms, *(linear.name for linear in QWEN.linears))
    }
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert named == owners  # nothing that has parameters is left out
    assert QWEN.example in named


def test_widths_are_those_of_the_modules(model: nn.Module) -> None:
    for linear in QWEN.linears:
        module = model.get_submodule(f"{QWEN.blocks}.0.{linear.name}")
        assert isinstance(module, nn.Linear)
        widths = (linear.width_in(CONFIG), linear.width_out(CONFIG))
        assert widths == (module.in_features, module.out_features), linear.name


def test_linears_are_listed_in_the_order_in_which_they_run() -> None:
    model, ran = QWEN.model_class(CONFIG), []
    block = model.get_submodule(f"{QWEN.blocks}.0")
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(torch.tensor([[1, 2, 3]]))
    assert ran == [linear.name for linear in QWEN.linears]


def test_targets_match_by_last_name_or_by_full_name() -> None:
    both = [linear.name for linear in QWEN.matched(("c_proj",))]
    assert both == ["attn.c_proj", "mlp.c_proj"]
    assert [linear.name for linear in QWEN.matched(["mlp.c_proj"])] == ["mlp.c_proj"]
    assert QWEN.matched(["wte"]) == ()
    assert set(QWEN.matched(QWEN.target_names)) == set(QWEN.linears)
    assert len(set(QWEN.target_names)) == len(QWEN.target_names)
    assert QWEN.ends == ("wte", "lm_head")


@pytest.mark.parametrize("wrapper", ["", "module.", "base_model.model.", "_orig_mod.module."])
def test_wrappers_are_taken_off_a_name(model: nn.Module, wrapper: str) -> None:
    for name, _ in model.named_parameters():
        assert QWEN.without_wrappers(wrapper + name) == name
    assert QWEN.without_wrappers(f"{wrapper}model.layers.0.mlp.up_proj.weight") is None


def test_stop_ids_are_the_tokenizers(small_dir: Path) -> None:
    assert QWEN.stop_ids(load_encoding(small_dir)) == (304, 305, 306)
    assert QWEN.load_encoding(small_dir) is load_encoding(small_dir)


@pytest.mark.parametrize(("ntk", "context"), [(True, 256), (False, 64)])
def test_the_context_exceeds_the_trained_length_with_dynamic_ntk_alone(
    ntk: bool, context: int
) -> None:
    config = QWEN.config_class(**{**CONFIG.to_dict(), "use_dynamic_ntk": ntk})
    assert QWEN.context(config) == context
    shorter = QWEN.config_class(seq_length=512, max_position_embeddings=256, use_dynamic_ntk=ntk)
    assert QWEN.context(shorter) == 512


def test_a_model_that_says_nothing_speaks_chatml() -> None:
    assert QWEN.chat_format({}) == QWEN.chat_format({"chat_format": "chatml"}) == "chatml"
    assert QWEN.chat_format({"chat_format": "raw"}) == "raw"


def test_a_family_is_found_by_the_model_type_of_its_configuration() -> None:
    assert all(FAMILIES[f.config_class.model_type] is f for f in FAMILIES.values())
