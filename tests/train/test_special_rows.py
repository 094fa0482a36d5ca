"""Rows and whole matrices of the vocabulary that are trained beside the adapter: gradients, format,
memory, and the end that a base model learns to find."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen_ds.export.merge import merge
from qwen_ds.model import token_grid
from qwen_ds.model.adapter import read_adapter
from qwen_ds.model.adapter_loading import put_adapter
from qwen_ds.model.chatml import IGNORE
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.recipe.options import LoraOptions
from qwen_ds.train.lora import add_lora, config_of, init_from, plain_name, write_adapter
from qwen_ds.train.loss import TrainingModel
from qwen_ds.train.setup import recompute_blocks
from tests.train.test_lora import count_at_7b

SPECIAL = [304, 305, 306]  # <|endoftext|>, <|im_start|>, <|im_end|> of the mini vocabulary
OPTIONS = LoraOptions(r=4, alpha=8, dropout=0.0, targets=["c_attn", "c_proj", "w1", "w2"])
WHOLE = replace(OPTIONS, modules_to_save=["wte", "lm_head"])
KINDS: dict[str, tuple[LoraOptions, list[int]]] = {"rows": (OPTIONS, SPECIAL), "whole": (WHOLE, [])}
WTE, HEAD = "base_model.model.transformer.wte", "base_model.model.lm_head"
DELTA = ".token_adapter.trainable_tokens_delta"


def base_model(small_dir: Path, dtype: torch.dtype = torch.float32) -> QWenLMHeadModel:
    return QWenLMHeadModel.from_pretrained(small_dir, dtype=dtype)


def wrapped(
    small_dir: Path, options: LoraOptions, ids: list[int], dtype: torch.dtype = torch.float32
) -> tuple[QWenLMHeadModel, peft.PeftModel]:
    """`small` with everything trained moved off its start."""
    model = base_model(small_dir, dtype)
    result = add_lora(model, options, base=str(small_dir), seed=3, row_ids=ids)
    generator = torch.Generator().manual_seed(9)
    for parameter in trained(result).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, result


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(n): p for n, p in model.named_parameters() if p.requires_grad}


def batch() -> tuple[Tensor, Tensor]:
    """Right-padded rows that hold the special ids as input, target and padding."""
    ids = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = ids[0, 5] = ids[2, 7] = 305
    ids[0, 4], ids[1, 6], ids[2, 9] = 306, 306, 306
    ids[1, 7:] = 304
    labels = ids.clone()
    labels[:, :3] = labels[1, 9:] = IGNORE
    return ids, labels


def test_the_rows_of_the_7b_are_24576_parameters_and_the_matrices_1_2_billion() -> None:
    """Whatever the layers: one stands for the 32."""
    plain = count_at_7b(LoraOptions(), layers=1)
    rows = count_at_7b(LoraOptions(), layers=1, row_ids=[151643, 151644, 151645])
    whole = count_at_7b(LoraOptions(modules_to_save=["wte", "lm_head"]), layers=1)
    assert rows.trainable - plain.trainable == rows.total - plain.total == 24_576
    assert whole.trainable - plain.trainable == 2 * 151_936 * 4096 and whole.total == plain.total


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["rows", "whole"])
def test_gradients_equal_those_of_a_model_trained_whole(
    small_dir: Path, kind: str, recompute: bool
) -> None:
    """Plain autograd through the plain model, with what is trained put into its matrices."""
    model, ours = wrapped(small_dir, *KINDS[kind])
    recompute_blocks(model, int(recompute))
    ids, labels = batch()
    loss = TrainingModel(ours, model.transformer, model.lm_head).train()(ids, labels)
    loss.backward()
    values = trained(ours)
    plain, reference = wrapped(small_dir, OPTIONS, [])
    for name, parameter in trained(reference).items():
        parameter.data.copy_(values[name].data)
    targets = int((labels[:, 1:] != IGNORE).sum())
    for name, matrix in ((WTE, plain.transformer.wte.weight), (HEAD, plain.lm_head.weight)):
        where = SPECIAL if kind == "rows" else slice(None)
        matrix.data[where] = values[name + (DELTA if kind == "rows" else ".weight")].data
        matrix.requires_grad_()
    expected = plain.train()(ids, labels=labels).loss * targets
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    wanted = {name: p.grad for name, p in trained(reference).items()}
    if kind == "rows":
        wanted |= {name + DELTA: wanted.pop(f"{name}.weight")[SPECIAL] for name in (WTE, HEAD)}
    assert values.keys() == wanted.keys() and len(wanted) == 32
    for name, parameter in values.items():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=2e-5, msg=name)


def test_over_a_bf16_base_gradients_add_up_in_fp32(small_dir: Path) -> None:
    """300 times <|im_start|>: in bf16 a sum of ones ends at 256."""
    model, ours = wrapped(small_dir, *KINDS["rows"], torch.bfloat16)
    embedded = model.transformer.wte(torch.full((1, 300), SPECIAL[1]))
    assert embedded.dtype == torch.bfloat16
    embedded.sum().backward()
    rows = trained(ours)[WTE + DELTA]
    assert rows.dtype == torch.float32 and rows.grad is not None
    assert rows.grad.tolist() == [[0.0] * 64, [300.0] * 64, [0.0] * 64]
    model, ours = wrapped(small_dir, *KINDS["whole"], torch.bfloat16)
    ids, labels = batch()
    TrainingModel(ours, model.transformer, model.lm_head)(ids, labels).backward()
    assert model.transformer.wte(ids).dtype == model(ids).logits.dtype == torch.bfloat16
    assert {p.grad.dtype for p in trained(ours).values() if p.grad is not None} == {torch.float32}


class LargestNewTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made in memory of its own."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, leaf.numel())
        return out


def test_nothing_of_the_matrices_is_copied(
    small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of a training step, and the plain forward; what peft's own module does
    shows the ruler."""
    monkeypatch.setattr(token_grid, "STEP", 1)  # or the padded logits would be as many
    model, ours = wrapped(small_dir, *KINDS["rows"], torch.bfloat16)
    training = TrainingModel(ours, model.transformer, model.lm_head).train()
    ids, labels = batch()
    with LargestNewTensor(training.parameters()) as seen:
        training(ids, labels).backward()
    with LargestNewTensor(training.parameters()) as seen_plain, torch.no_grad():
        ours(ids)
    matrix, logits = model.lm_head.weight.numel(), ids.numel() * 512
    assert max(seen.numel, seen_plain.numel) == logits < matrix
    write_adapter(tmp_path, config_of(ours), trained(ours))
    stock = peft.PeftModel.from_pretrained(base_model(small_dir), str(tmp_path))
    with LargestNewTensor(stock.parameters()) as theirs, torch.no_grad():
        stock(ids)
    assert theirs.numel == matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rows", "whole"])
def test_stock_peft_our_loader_and_the_merge_give_the_same_logits(
    small_dir: Path, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    _, ours = wrapped(small_dir, *KINDS[kind], dtype)
    write_adapter(tmp_path / "adapter", config_of(ours), trained(ours))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    rows, modules = settings["trainable_token_indices"], settings["modules_to_save"]
    if kind == "rows":
        assert rows == {"wte": SPECIAL, "lm_head": SPECIAL} and modules is None
    else:
        assert rows is None and modules == ["wte", "lm_head"]
    in_file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    suffix = DELTA if kind == "rows" else ".weight"
    assert {WTE + suffix, HEAD + suffix} == {name for name in in_file if ".lora_" not in name}
    ids, _ = batch()
    tolerance = 1e-4 if dtype == torch.float32 else 0.25
    with torch.inference_mode():
        expected = ours.eval()(ids).logits
        before = base_model(small_dir, dtype).eval()(ids).logits
        assert (expected - before).abs().max() > 1
        base = base_model(small_dir, dtype)
        stock = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(stock(ids).logits, expected, rtol=0, atol=tolerance)
        loaded = put_adapter(base_model(small_dir, dtype), read_adapter(tmp_path / "adapter"))
        assert loaded is not None
        torch.testing.assert_close(loaded(ids).logits, stock(ids).logits, rtol=0, atol=tolerance)
        if dtype == torch.float32:
            report = merge(small_dir, [tmp_path / "adapter"], tmp_path / "merged")
            assert report.verification is not None and report.verification.status == "passed"
            merged = QWenLMHeadModel.from_pretrained(tmp_path / "merged", dtype=dtype).eval()
            torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=tolerance)


def test_the_official_base_model_adapter_gives_the_official_numbers(
    small_dir: Path, golden: Path, tmp_path: Path
) -> None:
    """Continued from, it has the official loss and gradients; written and merged, the official
    weights."""
    official = replace(WHOLE, r=6, alpha=9)
    model, ours = wrapped(small_dir, official, [])
    init_from(ours, replace(official, init_from=str(golden / "lora_base" / "adapter")))
    expected = load_file(golden / "lora_base" / "outputs.safetensors")
    labels = expected["labels"].masked_fill(expected["attention_mask"] == 0, IGNORE)
    count = int((labels[:, 1:] != IGNORE).sum())
    training = TrainingModel(ours, model.transformer, model.lm_head).eval()
    loss = training(expected["input_ids"], labels) / count
    torch.testing.assert_close(loss, expected["loss_eval"], atol=5e-6, rtol=0)
    loss.backward()
    found = trained(ours)
    gradients = [name for name in expected if name.startswith("grad.")]
    assert len(gradients) == 5
    for name in gradients:
        came, official_one = found[name.removeprefix("grad.")].grad, expected[name]
        bound = 2e-5 * official_one.abs().max().item()
        torch.testing.assert_close(came, official_one, atol=bound, rtol=0)
    write_adapter(tmp_path / "adapter", config_of(ours), found)
    merge(small_dir, [tmp_path / "adapter"], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    official_adapter = load_file(golden / "lora_base" / "adapter" / "adapter_model.safetensors")
    for name in ("lm_head.weight", "transformer.wte.weight"):
        assert torch.equal(merged[name], official_adapter[f"base_model.model.{name}"])
    for name, tensor in load_file(golden / "lora_base" / "merged_changed.safetensors").items():
        torch.testing.assert_close(merged[name], tensor, atol=3e-4, rtol=0)


@pytest.mark.parametrize("kind", ["rows", "whole"])
def test_training_continues_from_rows_and_matrices(
    small_dir: Path, tmp_path: Path, kind: str
) -> None:
    """Whatever their order in the file; what an adapter lacks starts from the base."""
    options, ids = KINDS[kind]
    _, first = wrapped(small_dir, options, ids)
    write_adapter(tmp_path / "same", config_of(first), trained(first))
    _, again = wrapped(small_dir, options, ids[::-1])
    init_from(again, replace(options, init_from=str(tmp_path / "same")))
    for name, parameter in trained(again).items():
        expected = trained(first)[name]
        assert torch.equal(parameter, expected.flip(0) if name.endswith(DELTA) else expected)
    _, plain = wrapped(small_dir, OPTIONS, [])
    write_adapter(tmp_path / "without", config_of(plain), trained(plain))
    model = base_model(small_dir)
    fresh = add_lora(model, options, base="", seed=1, row_ids=ids)
    init_from(fresh, replace(options, init_from=str(tmp_path / "without")))
    tokens, _ = batch()
    logits, expected = model.eval()(tokens).logits, plain.eval()(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("with_rows", [True, False])
def test_a_base_model_learns_to_stop_with_its_rows_and_not_without(
    small_dir: Path, tmp_path: Path, with_rows: bool
) -> None:
    """The special rows are as initialisation leaves them. LoRA alone learns the answers, and then
    goes on: with rows that short no hidden state gives <|im_end|> the largest logit of 512."""
    base = Path(shutil.copytree(small_dir, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name][SPECIAL] = 0.02 * torch.randn(3, 64, generator=generator)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    _, start, end = SPECIAL
    prompts = torch.tensor([[start, 10 + i, 20 + i, end, start, 50] for i in range(4)])
    answers = torch.tensor([[100 + 7 * i + 3 * j for j in range(4)] for i in range(4)])
    tail = torch.tensor([[end, SPECIAL[0]]]).expand(4, 2)
    ids = torch.cat([prompts, answers, tail], 1)
    labels = torch.cat([prompts * 0 + IGNORE, answers, tail], 1)
    model, row_ids = base_model(base), SPECIAL if with_rows else []
    ours = add_lora(model, replace(OPTIONS, r=8), base="", seed=0, row_ids=row_ids)
    training = TrainingModel(ours, model.transformer, model.lm_head).train()
    optimizer = torch.optim.AdamW(list(trained(ours).values()), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        (training(ids, labels) / 24).backward()
        optimizer.step()
        optimizer.zero_grad()
    write_adapter(tmp_path / "adapter", config_of(ours), trained(ours))
    tuned, text = put_adapter(base_model(base), read_adapter(tmp_path / "adapter")), prompts
    assert tuned is not None
    with torch.inference_mode():
        for _ in range(8):
            text = torch.cat([text, tuned(text).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(text[:, 6:10], answers)
    stops = torch.isin(text[:, 10:], torch.tensor(SPECIAL))
    assert (stops[:, 0].all() and (text[:, 10] == end).all()) if with_rows else not stops.any()
