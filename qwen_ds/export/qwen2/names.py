"""Qwen and Qwen2, one architecture under two sets of names: the layouts of both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping

from qwen_ds.errors import UserError
from qwen_ds.export.layout import Layout, RowBlock
from qwen_ds.model.family import QWEN, ModelConfig

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
# Tables that early releases stored; both architectures compute them.
_COMPUTED = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(bias|masked_bias))")


def qwen2_modules(module: str) -> tuple[str, ...]:
    """Qwen2's modules for the rows of Qwen's `module`, in order; () where it has none."""
    if found := _BLOCK.fullmatch(module):
        return tuple(f"model.layers.{found[1]}.{name}" for name in _IN_BLOCK.get(found[2], ()))
    return _OUTSIDE.get(module, ())


def layout_to_qwen2(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> Layout:
    """The layout that cuts Qwen2's tensors from Qwen's, in the order of `shapes` (name -> shape).

    Raises:
        UserError: a tensor that Qwen does not have, that is missing, or of another shape than
            config.json says.
    """
    shapes = {name: shape for name, shape in shapes.items() if not _COMPUTED.fullmatch(name)}
    _check_shapes(shapes, qwen_shapes(config))
    layout: dict[str, tuple[RowBlock, ...]] = {}
    for name, shape in shapes.items():
        targets = _qwen2_tensors(name)
        size = shape[0] // len(targets)
        for i, target in enumerate(targets):
            layout[target] = (RowBlock(name, i * size, (i + 1) * size),)
    return layout


def layout_from_qwen2(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> Layout:
    """The layout that stacks Qwen's tensors from Qwen2's; `config` is the Qwen's.

    Raises:
        UserError: as `layout_to_qwen2`.
    """
    expected = qwen_shapes(config)
    parts = {name: _qwen2_tensors(name) for name in expected}
    cut = {
        target: (shape[0] // len(parts[name]), *shape[1:])
        for name, shape in expected.items()
        for target in parts[name]
    }
    shapes = {name: shape for name, shape in shapes.items() if not _COMPUTED.fullmatch(name)}
    _check_shapes(shapes, cut)
    return {
        name: tuple(RowBlock(target, 0, shapes[target][0]) for target in targets)
        for name, targets in parts.items()
    }


def _qwen2_tensors(name: str) -> tuple[str, ...]:
    module, _, parameter = name.rpartition(".")
    return tuple(f"{target}.{parameter}" for target in qwen2_modules(module))


def qwen_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each of Qwen's tensors."""
    hidden, vocabulary = (config.hidden_size,), (config.vocab_size, config.hidden_size)
    block: dict[str, tuple[int, ...]] = {f"{norm}.weight": hidden for norm in QWEN.block_norms}
    for linear in QWEN.linears:
        block[f"{linear.name}.weight"] = (linear.width_out(config), linear.width_in(config))
    fused = QWEN.linears[0]  # q|k|v, the only one with a bias
    block[f"{fused.name}.bias"] = (fused.width_out(config),)
    shapes: dict[str, tuple[int, ...]] = {f"{QWEN.embedding}.weight": vocabulary}
    for i in range(config.num_hidden_layers):
        shapes |= {f"{QWEN.blocks}.{i}.{name}": shape for name, shape in block.items()}
    return {**shapes, f"{QWEN.final_norm}.weight": hidden, f"{QWEN.head}.weight": vocabulary}


def _check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    for name in sorted(found.keys() ^ expected.keys()):
        extra = "the weights and not in the model that config.json describes"
        where = extra if name in found else "none of the shards"
        raise UserError(f"{name}: in {where}; expected the {len(expected)} tensors of that model")
    for name, shape in found.items():
        if shape != expected[name]:
            raise UserError(
                f"{name} is {list(shape)}; expected {list(expected[name])}, as config.json says"
            )
