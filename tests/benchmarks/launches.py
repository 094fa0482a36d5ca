"""Count the launches of a micro-batch, and the bytes that operations other than products move.

    python tests/benchmarks/launches.py                    # Qwen-7B's block, no weights, no GPU
    python tests/benchmarks/launches.py --against TREE     # and CPU times beside another checkout's

A block of Qwen-7B runs forward and backward on the meta device, in bf16 with the adapter of
launch/recipes/lora_zero2.yaml, and a dispatch mode (tests/moved.py) looks at every operation. The
kernels of CUDA are assumed where the meta device has none: its fused RMSNorm, dropout and flash
attention. A compiled block's bytes are those of inductor's schedule.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenBlock, QWenLMHeadModel
from qwen_ds.recipe.options import LoraOptions
from qwen_ds.train import lora_product
from qwen_ds.train.lora import add_lora
from tests.moved import Moved, fused

ROOT = Path(__file__).parents[2]
ROWS, LENGTH = 4, 512
TOKENS = ROWS * LENGTH


def megabytes(moved: Moved) -> float:
    """Of each of TOKENS tokens, in 10^6 bytes."""
    return moved.bytes.total() / TOKENS / 1e6


class _CudaNorm(torch.autograd.Function):
    """RMSNorm without a weight as CUDA runs it: one kernel forward and one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, moved: Moved) -> Tensor:
        out, rms = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        moved.note("rms_norm", x, (out, rms))
        ctx.save_for_backward(x, rms)
        ctx.moved = moved
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = torch.empty_like(grads[0])
        ctx.moved.note("rms_norm_backward", (*grads, *ctx.saved_tensors), grad)
        return grad, None


def _flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, is_causal: bool
) -> Tensor:
    assert mask is None
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, is_causal)[0]


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p else x


@contextmanager
def as_on_cuda(moved: Moved) -> Iterator[None]:
    """CUDA's kernels in place of what the meta device would make of these functions."""

    def norm(x: Tensor, shape: Sequence[int], weight: None, eps: float) -> Tensor:
        return _CudaNorm.apply(x, moved)

    with (
        mock.patch.object(F, "rms_norm", norm),
        mock.patch.object(F, "scaled_dot_product_attention", _flash),
        mock.patch.object(F, "dropout", _dropout),
    ):
        yield


def block_7b(lora: LoraOptions) -> QWenBlock:
    """A block of Qwen-7B with an adapter, in bf16, without numbers."""
    with torch.device("meta"):
        config = QWenConfig(num_hidden_layers=1, vocab_size=64)
        model = QWenLMHeadModel._from_config(config, dtype=torch.bfloat16)
        add_lora(model, lora, base="", seed=0)
    block = model.train().transformer.h[0]
    assert isinstance(block, QWenBlock)
    return block


def inputs(rows: int = ROWS, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Input of a block in the middle, whose gradient is needed, cosines and sines."""
    x_BTD = torch.empty(rows, length, 4096, dtype=torch.bfloat16, device="meta")
    cos, sin = (torch.empty(1, length, 1, 1, 64, device="meta") for _ in range(2))
    return x_BTD.requires_grad_(), cos, sin


def run(block: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    x_BTD, *tables = arguments
    # Not a leaf itself: a block in the middle does not add its input's gradient to another.
    out = block(x_BTD.view_as(x_BTD), *tables)
    out.backward(torch.empty_like(out))


def count(lora: LoraOptions) -> Moved:
    """Launches and bytes of one eager micro-batch of ROWS x LENGTH tokens in one block, whose
    gradients accumulate as in every micro-batch but the first."""
    block, arguments = block_7b(lora), inputs()
    moved = Moved()
    with as_on_cuda(moved):
        run(block, arguments)
        with moved:
            moved.clear()
            run(block, arguments)
    return moved


def compiled_bytes(lora: LoraOptions, width: int = 4096) -> float:
    """MB (10^6 bytes) that a token moves in a compiled block, forward and backward, as inductor
    counts the reads and writes of the kernels that it fuses: products and attention left out.

    The block runs on this CPU, with the dropout of a GPU, which draws in the kernel. At another
    `width` all but LoRA's small middles has its share, by which the result is scaled.
    """
    heads = width // 128
    config = QWenConfig(
        num_hidden_layers=1, vocab_size=64, hidden_size=width, num_attention_heads=heads,
        intermediate_size=22016 * width // 4096,
    )  # fmt: skip
    model = QWenLMHeadModel._from_config(config, dtype=torch.bfloat16)
    add_lora(model, lora, base="", seed=0)

    def drop(x: Tensor, p: float) -> tuple[Tensor, None, float]:
        return F.dropout(x, p), None, 1.0

    with fused() as moved, mock.patch.object(lora_product, "drop", drop):
        block = torch.compile(model.train().transformer.h[0])
        x_BTD = torch.zeros(ROWS, LENGTH, width, dtype=torch.bfloat16, requires_grad=True)
        out = block(x_BTD, *(torch.zeros(1, LENGTH, 1, 1, 64) for _ in range(2)))
        out.backward(torch.zeros_like(out))
    torch._dynamo.reset()
    return moved.bytes / TOKENS / 1e6 * 4096 / width


def compare(tree: Path, rounds: int) -> None:
    """CPU time of a micro-batch here and in another tree as it is, by turns: medians and their
    ratio."""
    for stage, compiled in ((2, False), (2, True), (3, False)):
        here, there = [], []
        for _ in range(rounds):
            here.append(milliseconds(ROOT, stage, ["--model.compile", "true"] if compiled else []))
            there.append(milliseconds(tree, stage))
        ours, theirs = statistics.median(here), statistics.median(there)
        name = f"ZeRO-{stage}" + ", compiled here as on a GPU" * compiled
        print(f"{name}: {ours:.0f} ms here, {theirs:.0f} ms there: ratio {ours / theirs:.2f}")


def milliseconds(tree: Path, stage: int, options: Sequence[str] = ()) -> float:
    """Median CPU time of forward and backward (launches_time.py) with the code of `tree`."""
    command = [sys.executable, str(Path(__file__).with_name("launches_time.py"))]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"ds_configs/zero{stage}.json", *options],
        cwd=tree, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return float(json.loads(done.stdout.splitlines()[-1])["milliseconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another tree, to compare CPU times with")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    moved = count(LoraOptions())
    for name, launches in moved.launches.most_common():
        print(f"{name:45s} {launches:4d} {moved.bytes[name] / TOKENS / 1e6:8.3f} MB")
    print(f"{'all':45s} {moved.launches.total():4d} {megabytes(moved):8.3f} MB a token")
    print(f"{'all, compiled':50s} {compiled_bytes(LoraOptions()):8.3f} MB a token")
    if options.against:
        compare(options.against.resolve(), options.rounds)


if __name__ == "__main__":
    main()
