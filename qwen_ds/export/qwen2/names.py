"""Qwen and Qwen2, one architecture under two sets of names: the layouts of both ways."""

from __future__ import annotations

import re

from qwen_ds.export.layout import Layout, RowBlock, inverse
from qwen_ds.model.family import QWEN, ModelConfig
from qwen_ds.model.shapes import Shapes, check_shapes, state_shapes

# Modules of a block. Several on the right: the rows of the left one in equal blocks.
# The gate is w2: Qwen computes w1(x) * silu(w2(x)), Qwen2 silu(gate_proj(x)) * up_proj(x).
_IN_BLOCK = {
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.w1": ("mlp.up_proj",),
    "mlp.w2": ("mlp.gate_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
_OUTSIDE = {
    QWEN.embedding: ("model.embed_tokens",),
    QWEN.final_norm: ("model.norm",),
    QWEN.head: ("lm_head",),
}
_BLOCK = re.compile(rf"{re.escape(QWEN.blocks)}\.(\d+)\.(.+)")


def qwen2_modules(module: str) -> tuple[str, ...]:
    """Qwen2's modules for the rows of Qwen's `module`, in order; () where it has none."""
    if found := _BLOCK.fullmatch(module):
        return tuple(f"model.layers.{found[1]}.{name}" for name in _IN_BLOCK.get(found[2], ()))
    return _OUTSIDE.get(module, ())


def layout_to_qwen2(shapes: Shapes, config: ModelConfig) -> Layout:
    """The layout that cuts Qwen2's tensors from Qwen's, in the order of `shapes`.

    UserError for a tensor that Qwen does not have, that is missing, or not as config.json says.
    """
    layout: dict[str, tuple[RowBlock, ...]] = {}
    for name, shape in check_shapes(shapes, state_shapes(config)).items():
        module, _, parameter = name.rpartition(".")
        targets = qwen2_modules(module)
        size = shape[0] // len(targets)
        for i, target in enumerate(targets):
            layout[f"{target}.{parameter}"] = (RowBlock(name, i * size, (i + 1) * size),)
    return layout


def layout_from_qwen2(shapes: Shapes, config: ModelConfig) -> Layout:
    """The layout that stacks Qwen's tensors from Qwen2's; `config` is the Qwen's.

    UserError as in `layout_to_qwen2`.
    """
    whole = state_shapes(config)
    cut = layout_to_qwen2(whole, config)
    expected = {name: (rows.num_rows, *whole[rows.tensor][1:]) for name, (rows,) in cut.items()}
    check_shapes(shapes, expected)
    return inverse(cut)
