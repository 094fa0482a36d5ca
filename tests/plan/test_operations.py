"""Bytes that a block's memory-bound operations move, counted by hand and by what torch runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.family import QWEN
from qwen_ds.plan.activations import Saving
from qwen_ds.plan.operations import block_bytes_moved, moved
from qwen_ds.plan.shape import Shape
from qwen_ds.recipe.options import LoraOptions, ModelOptions, Recipe
from tests.moved import Moved

QWEN_7B = Shape.of(QWenConfig())


def saving(dtype: Any = "bfloat16", method: Any = "lora", **lora: Any) -> Saving:
    recipe = Recipe(
        method=method,
        model=ModelOptions(dtype=dtype),
        lora=LoraOptions(**({"special_rows": "off"} | lora)),
    )
    return Saving.of(recipe, on_gpu=True, family=QWEN)


def test_the_gate_moves_what_torch_runs() -> None:
    tokens, inner = 64, QWEN_7B.inner
    gate, up = (torch.ones(tokens, inner, requires_grad=True) for _ in range(2))
    gradient, counted = torch.ones(tokens, inner), Moved()
    with counted:
        product = F.silu(gate) * up
        forward = counted.bytes.total()
        torch.autograd.grad(product, (gate, up), gradient)
    parts = {part.part: part for part in moved(QWEN_7B, saving("float32"), compiled=False)}
    assert forward == tokens * parts["gate"].forward
    assert counted.bytes.total() - forward == tokens * parts["gate"].backward


def test_a_branch_moves_what_its_products_read_and_write() -> None:
    """mlp.c_proj alone, 11,008 to 4,096, rank 8: x A^T, B^T added in place; backward dB, dA, and
    the gradient of x through B and A, added in place. Dropout adds a copy and a mask each way."""
    x, y, r = 11008, 4096, 8
    plain, dropped = (
        {
            p.part: p
            for p in moved(QWEN_7B, saving(targets=["mlp.c_proj"], dropout=rate), compiled=c)
        }
        for rate, c in ((0.0, False), (0.1, True))
    )
    branch = plain["LoRA of mlp.c_proj"]
    assert branch.forward == 2 * (x + r + r + y + y)
    assert branch.backward == 2 * ((y + r) + (y + r) + (x + r) + (r + x + x))
    more = dropped["LoRA of mlp.c_proj"]
    assert more.forward - branch.forward == more.backward - branch.backward == 2 * 2 * x + x


def test_two_maps_of_one_input_read_and_drop_it_once() -> None:
    """w1 and w2, 4,096 to 11,008, rank 8. Each by itself has all that reads or writes x, too: x A^T
    and the gradient of A read it, the gradient of x is read and written."""
    x = 4096

    def branches(*targets: str) -> tuple[float, float]:
        parts = moved(QWEN_7B, saving(targets=list(targets), dropout=0.1), compiled=False)
        (branch,) = (part for part in parts if "LoRA" in part.part)
        return branch.forward, branch.backward

    both, alone = branches("w1", "w2"), (branches("w1"), branches("w2"))
    dropped = 2 * 2 * x + x
    assert alone[0] == alone[1]
    assert 2 * alone[0][0] - both[0] == 2 * x + dropped
    assert 2 * alone[0][1] - both[1] == 2 * (x + 2 * x) + dropped


@pytest.mark.parametrize("compiled", [False, True])
def test_fewer_operations_move_fewer_bytes(compiled: bool) -> None:
    """lora_zero2.yaml's block, and what changes its bytes. Rotating step by step in fp32 once moved
    0.8 MB by itself, of 1.94: neither way may come near that again."""
    how = saving()

    def bytes_of(how: Saving, again: float = 0.0) -> float:
        return block_bytes_moved(QWEN_7B, how, compiled=compiled, again=again)

    total = bytes_of(how)
    assert total < (1.0e6 if compiled else 1.4e6)
    assert total < bytes_of(saving(targets=["c_attn", "c_proj", "w1", "w2"]))
    assert bytes_of(replace(how, dropout=False)) < total < bytes_of(replace(how, b=4))
    assert total < bytes_of(how, again=0.5) < bytes_of(how, again=1.0) < 2 * total
    parts = [part.part for part in moved(QWEN_7B, saving(method="full"), compiled=compiled)]
    assert not any("LoRA" in part for part in parts)


def test_compiled_blocks_move_less() -> None:
    eager, compiled = (moved(QWEN_7B, saving(), compiled=c) for c in (False, True))
    for one, other in zip(eager, compiled, strict=True):
        assert one.part == other.part
        smaller = other.forward + other.backward, one.forward + one.backward
        assert smaller[0] < smaller[1] or "LoRA" in one.part
