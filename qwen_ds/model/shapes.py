"""The tensors of a model: what config.json describes against what the weight files hold."""

from __future__ import annotations

import copy
import re

import torch

from qwen_ds.errors import UserError
from qwen_ds.model.family import ModelConfig, family_of

Shapes = dict[str, tuple[int, ...]]
"""Tensor's name -> shape."""
# Tables that early releases stored; both Qwen and Qwen2 compute them.
_COMPUTED = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(bias|masked_bias))")


def state_shapes(config: ModelConfig) -> Shapes:
    """Shape of each tensor of the model, in its own order; nothing of its size is made."""
    family, one_block = family_of(config), copy.deepcopy(config)
    # Blocks are alike: one is built, and the others have its shapes.
    one_block.num_hidden_layers = 1
    with torch.device("meta"):
        state = family.model_class(one_block).state_dict()
    first = f"{family.blocks}.0."
    block = {name: tuple(state[name].shape) for name in state if name.startswith(first)}
    shapes: Shapes = {}
    for name, tensor in state.items():
        if name not in block:
            shapes[name] = tuple(tensor.shape)
        elif name not in shapes:
            shapes |= {
                f"{family.blocks}.{i}.{inner.removeprefix(first)}": shape
                for i in range(config.num_hidden_layers)
                for inner, shape in block.items()
            }
    return shapes


def check_shapes(found: Shapes, expected: Shapes) -> Shapes:
    """The shapes `found` without the tables that are computed. UserError names the first tensor
    that is not as expected, is missing, or is in surplus."""
    found = {name: shape for name, shape in found.items() if not _COMPUTED.fullmatch(name)}
    for name in sorted(found.keys() ^ expected.keys()):
        extra = "the weights and not in the model that config.json describes"
        where = extra if name in found else "none of the shards"
        raise UserError(f"{name}: in {where}; expected the {len(expected)} tensors of that model")
    for name, shape in found.items():
        if shape != expected[name]:
            raise UserError(
                f"{name} is {list(shape)}; expected {list(expected[name])}, as config.json says"
            )
    return found
