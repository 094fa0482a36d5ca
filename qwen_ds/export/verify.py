"""Prove a merged checkpoint: its logits against those of base + adapter, both computed in fp32 from the stored weights.

Computed so, the only difference between the two is the rounding of the merged weights to their dtype (and the order of
fp32 sums). How far one such rounding moves the logits is a property of the model, so it is measured rather than
guessed: the merged weights are rounded once more, by random errors of the same distribution, and the logits may differ
from base + adapter by no more than a small multiple of what that changes.

Shapes: P positions over all prompts, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from qwen_ds.export.safetensors_file import TensorSpec
from qwen_ds.machine import available_memory
from qwen_ds.model.adapter import Adapter, load_adapter
from qwen_ds.model.chatml import Conversation, Turn, encode_prompt
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.model.tokenizer import load_encoding

PROMPTS = (
    "你好，请用一句话介绍你自己。",
    "类型#上衣*版型#宽松*颜色#白色*风格#简约*图案#条纹*衣样式#衬衫",
    "Write a Python function that returns the n-th Fibonacci number.",
    "小明有 12 个苹果，吃了 5 个，又买了 8 个，现在有几个？",
)

# Two draws of the same noise: their largest entries over thousands of logits lie well within a factor of 3.
ROUNDINGS_ALLOWED = 3.0
# The order of fp32 sums alone moves the official model's logits by 1.2e-6 of the largest (golden lora, 3 blocks);
# it grows with the root of the depth, so 32 blocks reach 4e-6.
FP32_NOISE = 2e-5

_SIGNIFICANT_BITS = {"BF16": 8, "F16": 11, "F32": 24}
_SMALLEST_STEP = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149}  # between subnormal numbers
_NOISE_ROWS = 1024  # rows of a tensor that get their noise at once, to hold little beside the model


@dataclass(frozen=True, slots=True)
class Verification:
    """The proof and its figures: absolute differences of logits, over all positions of the prompts.

    Attributes:
        status: "skipped" when the model does not fit in memory; `reason` says so.
        positions: number of positions compared.
        max_difference, rms_difference: merged against base + adapter.
        bound: what max_difference may be.
        rounding_noise: largest difference that rounding the merged weights once more makes.
        adapter_effect: largest difference between base + adapter and the bare base: what is being proven to be there.
        top1_agreement: share of positions where the most probable next token is the same.
    """

    status: Literal["passed", "failed", "skipped"]
    reason: str
    positions: int = 0
    max_difference: float = 0.0
    rms_difference: float = 0.0
    bound: float = 0.0
    rounding_noise: float = 0.0
    adapter_effect: float = 0.0
    top1_agreement: float = 0.0


def check_files(folder: Path, shards: Mapping[str, list[TensorSpec]]) -> None:
    """Open each written shard with the safetensors library and compare names, shapes and dtypes."""
    for name, specs in shards.items():
        with safe_open(folder / name, framework="pt") as file:
            found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            wanted = {spec.name: (spec.dtype, list(spec.shape)) for spec in specs}
            read = {key: (piece.get_dtype(), list(piece.get_shape())) for key, piece in found.items()}
            assert read == wanted, f"{folder / name}: safetensors reads another header than was written"


def verify_merge(
    base: Path,
    adapter: Adapter | None,
    merged: Path,
    tensors: Mapping[str, TensorSpec],
    rounded: Mapping[str, str],
    available_bytes: int | None = None,
) -> Verification:
    """Compare the folder `merged` with base + adapter on the built-in prompts.

    Args:
        adapter: None compares with the bare base (a conversion).
        tensors: the merged checkpoint's tensors, for the size of the model.
        rounded: tensor name -> dtype in the file that its values were rounded to.
        available_bytes: memory that may be used; None asks the machine.
    """
    available = available_memory() if available_bytes is None else available_bytes
    needed = _memory_needed(adapter, tensors)
    if needed > available:
        return Verification("skipped", f"it needs {needed / 1e9:.1f} GB of memory; {available / 1e9:.1f} GB are free")
    encoding = load_encoding(base)
    prompts = [encode_prompt(encoding, Conversation(None, (Turn("user", text),))) for text in PROMPTS]
    prompts_T = [torch.tensor(ids) for ids in prompts]

    model = _load(base)
    base_PV = _logits(model, prompts_T)
    expected_PV = base_PV
    if adapter is not None:
        expected_PV = _logits(load_adapter(model, adapter.folder), prompts_T)
    del model
    gc.collect()  # peft's wrappers refer to each other

    model = _load(merged)
    merged_PV = _logits(model, prompts_T)
    _round_once_more(model, rounded)
    noise = float((_logits(model, prompts_T) - merged_PV).abs().max())

    difference_PV = merged_PV - expected_PV
    largest = float(difference_PV.abs().max())
    bound = ROUNDINGS_ALLOWED * noise + FP32_NOISE * float(expected_PV.abs().max())
    # NaN compares as false: it must not pass.
    passed = largest <= bound
    return Verification(
        status="passed" if passed else "failed",
        reason=f"largest difference of logits {largest:.3g}, allowed {bound:.3g}",
        positions=expected_PV.shape[0],
        max_difference=largest,
        rms_difference=float(difference_PV.square().mean().sqrt()),
        bound=bound,
        rounding_noise=noise,
        adapter_effect=float((expected_PV - base_PV).abs().max()),
        top1_agreement=float((merged_PV.argmax(1) == expected_PV.argmax(1)).float().mean()),
    )


def _memory_needed(adapter: Adapter | None, tensors: Mapping[str, TensorSpec]) -> int:
    items = sum(spec.num_rows * spec.items_per_row for spec in tensors.values())
    added = sum(torch.Size(shape).numel() for shape in adapter.shapes.values()) if adapter is not None else 0
    # fp32; loading holds the largest tensor twice; about 200 positions of logits, four times; half a GB of activations.
    largest = max(spec.num_rows * spec.items_per_row for spec in tensors.values())
    logits = 4 * 200 * max(spec.num_rows for spec in tensors.values())
    return 4 * (items + 2 * added + largest + logits) + 2**29


def _load(folder: Path) -> QWenLMHeadModel:
    return QWenLMHeadModel.from_pretrained(str(folder), dtype=torch.float32).eval()


@torch.inference_mode()
def _logits(model: torch.nn.Module, prompts_T: list[Tensor]) -> Tensor:
    return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in prompts_T])


@torch.no_grad()
def _round_once_more(model: torch.nn.Module, rounded: Mapping[str, str]) -> None:
    """Add to each rounded tensor what a rounding to its dtype adds: uniform noise of plus or minus half a step."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    for name, dtype in rounded.items():
        for rows in parameters[name].data.split(_NOISE_ROWS):
            _, exponent = torch.frexp(rows)  # value = mantissa * 2**exponent, mantissa in [0.5, 1)
            step = torch.ldexp(torch.ones_like(rows), exponent - _SIGNIFICANT_BITS[dtype])
            step.clamp_(min=_SMALLEST_STEP[dtype])
            rows.add_(step.mul_(torch.rand(rows.shape, generator=generator) - 0.5))
