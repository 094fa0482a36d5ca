"""Adapters of every origin come out under one set of names, and what is not understood is refused
by name."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_ds.disk import adapter_options
from qwen_ds.errors import UserError
from qwen_ds.model.adapter import check_adapter_fits, read_adapter
from qwen_ds.model.adapter_loading import put_adapter
from qwen_ds.model.modeling import QWenLMHeadModel

PREFIX = "base_model.model."
C_ATTN = "transformer.h.0.attn.c_attn"
A_KEY, B_KEY = (f"{PREFIX}{C_ATTN}.lora_{side}.weight" for side in "AB")
ROWS_KEY = f"{PREFIX}transformer.wte.token_adapter.trainable_tokens_delta"
ONE = torch.ones(4, 64)


@pytest.fixture
def adapter_dir(golden: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden / "lora" / "adapter", tmp_path / "adapter"))


@pytest.fixture
def model(small_dir: Path) -> QWenLMHeadModel:
    return QWenLMHeadModel.from_pretrained(str(small_dir), dtype=torch.float32).eval()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def store(folder: Path, changes: Mapping[str, Tensor | None], **config: Any) -> None:
    """Change or drop (None) tensors of an adapter, and options of its configuration."""
    tensors = {k: v for k, v in {**tensors_of(folder), **changes}.items() if v is not None}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))


def as_original_project(folder: Path, rename: Callable[[str], str]) -> Path:
    """The adapter as the original project left it: the trainable parameters alone, in a pickle,
    without a config."""
    tensors = {rename(name): torch.nn.Parameter(t) for name, t in tensors_of(folder).items()}
    for file in folder.iterdir():
        file.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def base_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_names_ranks_and_scalings_are_the_adapter_s(golden: Path, model: QWenLMHeadModel) -> None:
    adapter = read_adapter(golden / "lora_base" / "adapter")
    assert len(adapter.pairs) == 15
    pair = adapter.pairs[C_ATTN]
    assert (pair.a_key, pair.r, pair.scaling) == (A_KEY, 6, 1.5)
    whole = ("lm_head.weight", "transformer.wte.weight")
    assert adapter.saved == {name: PREFIX + name for name in whole}
    assert len(adapter.changed_tensors()) == 17
    check_adapter_fits(adapter, base_shapes(model))


def test_tensors_are_read_whole_and_by_rows(golden: Path) -> None:
    folder = golden / "lora_base" / "adapter"
    adapter = read_adapter(folder)
    stored = tensors_of(folder)
    torch.testing.assert_close(adapter.state_dict(), stored, rtol=0, atol=0)
    rows = adapter.tensor(f"{PREFIX}lm_head.weight", 10, 13)
    assert torch.equal(rows, stored[f"{PREFIX}lm_head.weight"][10:13])


def test_picked_rows_are_found_without_a_search(adapter_dir: Path) -> None:
    """An adapter may replace all of 151,936 rows: a search for each would take minutes."""

    class NoSearch(tuple[int, ...]):
        def index(self, *_: Any) -> int:
            raise AssertionError("searched")

    store(adapter_dir, {ROWS_KEY: ONE}, trainable_token_indices=[9, 3, 500, 4])
    adapter = read_adapter(adapter_dir)
    rows = adapter.token_rows["transformer.wte"]
    quick = dataclasses.replace(rows, indices=NoSearch(rows.indices))
    adapter = dataclasses.replace(adapter, token_rows={"transformer.wte": quick})
    adapter = dataclasses.replace(adapter, _loaded={ROWS_KEY: torch.arange(4.0)[:, None]})
    part = adapter.of_rows("transformer.wte.weight", [500, 7, 3])
    (picked,) = part.token_rows.values()
    values = part.tensor(ROWS_KEY)[:, 0].tolist()
    assert dict(zip(picked.indices, values, strict=True)) == {2: 1.0, 0: 2.0}


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: "module." + name.replace(".weight", ".sft.weight"),
        lambda name: name.removeprefix(PREFIX),
        lambda name: name.replace(PREFIX, "base_model."),
    ],
    ids=["peft_parameters", "ddp", "bare", "short"],
)
def test_the_original_project_s_pickle_reads_like_peft_s_folder(
    golden: Path, adapter_dir: Path, rename: Callable[[str], str]
) -> None:
    expected = read_adapter(golden / "lora" / "adapter")
    adapter = read_adapter(as_original_project(adapter_dir, rename), allow_pickle=True, alpha=8)
    assert adapter.pairs == expected.pairs
    torch.testing.assert_close(adapter.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert (adapter.config["r"], adapter.config["lora_alpha"]) == (4, 8)
    # alpha was a constant of that project: 16
    assert read_adapter(adapter_dir, allow_pickle=True).pairs[C_ATTN].scaling == 4.0


def test_an_inferred_configuration_puts_the_adapter_onto_a_model(
    golden: Path, adapter_dir: Path, model: QWenLMHeadModel
) -> None:
    as_original_project(adapter_dir, lambda name: name.replace(".weight", ".default.weight"))
    adapter = read_adapter(adapter_dir, allow_pickle=True, alpha=8)
    options = {name: value for name, value in adapter.config.items() if name != "peft_type"}
    wrapped = get_peft_model(model, LoraConfig(**options))
    outcome: Any = set_peft_model_state_dict(wrapped, adapter.state_dict())
    assert outcome.unexpected_keys == []
    assert not [name for name in outcome.missing_keys if "lora_" in name]
    assert_official_logits(wrapped.eval(), golden / "lora", 3e-5)


def test_ranks_that_differ_are_inferred_each(adapter_dir: Path) -> None:
    store(adapter_dir, {A_KEY: torch.ones(7, 64), B_KEY: torch.ones(192, 7)})
    adapter = read_adapter(as_original_project(adapter_dir, lambda name: name), allow_pickle=True)
    assert adapter.pairs[C_ATTN].r == 7 and adapter.pairs[C_ATTN].scaling == pytest.approx(16 / 7)
    assert adapter.config["rank_pattern"] == {C_ATTN: 7} and adapter.config["r"] == 4


def test_stock_pickles_are_read_with_their_configuration_where_pickles_are_allowed(
    adapter_dir: Path,
) -> None:
    expected = read_adapter(adapter_dir).pairs
    torch.save(tensors_of(adapter_dir), adapter_dir / "adapter_model.bin")
    (adapter_dir / "adapter_model.safetensors").unlink()
    assert read_adapter(adapter_dir, allow_pickle=True, alpha=99).pairs == expected
    refused = r"adapter_model\.bin: a pickle; expected adapter_model\.safetensors"
    with pytest.raises(UserError, match=refused):
        read_adapter(adapter_dir)


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (pytest.fail, ("the pickle ran code",))


@pytest.mark.parametrize("content", [{"x": Bomb()}, {"x": "text"}, [torch.zeros(2)], None])
def test_a_pickle_of_anything_but_tensors_is_refused_and_runs_no_code(
    adapter_dir: Path, content: object
) -> None:
    (adapter_dir / "adapter_model.safetensors").unlink()
    path = adapter_dir / "pytorch_model.bin"
    if content is None:
        path.write_bytes(b"not a pickle at all")
    elif isinstance(content, dict) and isinstance(content["x"], Bomb):
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: ") as caught:
        read_adapter(adapter_dir, allow_pickle=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; expected 'LORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": "8"}, "r is '8'"),
        ({"r": 5}, r"lora_A\.weight is \[4, 64\]; expected rank 5"),
        ({"rank_pattern": {"w1": 2}}, r"w1\.lora_A\.weight is \[4, 64\]; expected rank 2"),
        ({"use_dora": True}, "comes without lora_magnitude_vector"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(
    adapter_dir: Path, config: dict[str, Any], message: str
) -> None:
    store(adapter_dir, {}, **config)
    with pytest.raises(UserError, match=message) as caught:
        read_adapter(adapter_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{PREFIX}model.layers.0.q_proj.lora_A.weight": ONE}, "unknown tensor .*q_proj"),
        ({f"{PREFIX}{C_ATTN}.lora_A.bias": ONE}, r"unknown tensor .*lora_A\.bias"),
        (
            {f"{PREFIX}transformer.wte.lora_embedding_A": ONE},
            "lora_embedding_A is LoRA on the embedding",
        ),
        ({f"{PREFIX}{C_ATTN}.lora_A.x.weight": ONE}, "are the same tensor; expected one adapter"),
        ({B_KEY: None}, r"c_attn\.lora_A\.weight has no lora_B"),
        ({A_KEY: None}, r"c_attn\.lora_B\.weight has no lora_A"),
        ({A_KEY: torch.zeros(0)}, r"is \[0\]; expected a whole tensor .*ZeRO-3"),
        ({f"{PREFIX}{C_ATTN}.weight": ONE}, "c_attn is changed in two ways"),
        ({ROWS_KEY: ONE}, "replaces 4 rows; .* lists none"),
    ],
)
def test_a_tensor_that_is_not_understood_is_named(
    adapter_dir: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    store(adapter_dir, changes)
    with pytest.raises(UserError, match=message) as caught:
        read_adapter(adapter_dir)
    assert "\n" not in str(caught.value)


def test_every_option_of_peft_is_decided_about() -> None:
    """A new release of peft may have options that change what the tensors mean."""
    known = {*adapter_options.READ, *adapter_options.UNSUPPORTED, *adapter_options.WITHOUT_EFFECT}
    assert {option.name for option in dataclasses.fields(LoraConfig)} <= known


def test_values_that_are_not_finite_are_named(adapter_dir: Path) -> None:
    store(adapter_dir, {B_KEY: torch.full((192, 4), torch.inf)})
    with pytest.raises(UserError, match=r"c_attn\.lora_B\.weight holds NaN or infinity"):
        read_adapter(adapter_dir).state_dict()


def test_an_empty_adapter_is_refused(adapter_dir: Path) -> None:
    store(adapter_dir, dict.fromkeys(tensors_of(adapter_dir)))
    with pytest.raises(UserError, match="hold no tensor"):
        read_adapter(adapter_dir)


def test_a_missing_or_broken_file_is_named(adapter_dir: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_adapter(adapter_dir / "nowhere")
    whole = (adapter_dir / "adapter_model.safetensors").read_bytes()
    (adapter_dir / "adapter_model.safetensors").write_bytes(whole[:5000])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: .* the file is cut off"):
        read_adapter(adapter_dir)
    (adapter_dir / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        read_adapter(adapter_dir, allow_pickle=True)
    (adapter_dir / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json: not readable as JSON"):
        read_adapter(adapter_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({A_KEY: torch.ones(4, 65)}, r"lora_A\.weight is \[4, 65\]; expected \[4, 64\]"),
        ({B_KEY: torch.ones(191, 4)}, r"lora_B\.weight is \[191, 4\]; expected \[192, 4\]"),
        (
            {f"{PREFIX}lm_head.weight": torch.ones(512, 32)},
            r"lm_head\.weight is \[512, 32\]; expected \[512, 64\]",
        ),
        (
            {f"{PREFIX}transformer.h.3.ln_1.weight": torch.ones(64)},
            r"h\.3\.ln_1\.weight, which this base does not have",
        ),
        (
            {f"{PREFIX}transformer.ln_f.lora_{side}.weight": ONE.clone() for side in "AB"},
            r"of shape \[64\]; expected a matrix",
        ),
        ({ROWS_KEY: torch.ones(2, 64)}, r"row 600; transformer\.wte\.weight has 512 rows"),
    ],
)
def test_an_adapter_of_another_base_is_refused_with_both_shapes(
    adapter_dir: Path, model: QWenLMHeadModel, changes: dict[str, Tensor], message: str
) -> None:
    store(adapter_dir, changes, trainable_token_indices={"wte": [3, 600]})
    adapter = read_adapter(adapter_dir)
    with pytest.raises(UserError, match=message):
        check_adapter_fits(adapter, base_shapes(model))


def test_a_list_of_token_rows_means_the_input_embedding(adapter_dir: Path) -> None:
    store(adapter_dir, {ROWS_KEY: torch.ones(2, 64)}, trainable_token_indices=[304, 305])
    rows = read_adapter(adapter_dir).token_rows["transformer.wte"]
    assert (rows.key, rows.indices) == (ROWS_KEY, (304, 305))


def assert_official_logits(model: torch.nn.Module, folder: Path, tolerance: float) -> None:
    expected = load_file(folder / "outputs.safetensors")
    mask = expected["attention_mask"]
    with torch.inference_mode():
        logits = model(input_ids=expected["input_ids"], attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits, expected["logits"][mask.bool()], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("name", "tolerance"), [("lora", 3e-5), ("lora_base", 3e-4)])
def test_a_loaded_adapter_gives_the_official_logits(
    golden: Path, model: QWenLMHeadModel, name: str, tolerance: float
) -> None:
    wrapped = put_adapter(model, read_adapter(golden / name / "adapter"))
    assert wrapped is not None and not wrapped.training
    assert not any(p.requires_grad for n, p in wrapped.named_parameters() if "lora" in n)
    assert_official_logits(wrapped, golden / name, tolerance)
