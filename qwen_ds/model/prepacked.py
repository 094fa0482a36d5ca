"""Linear layers whose weights lie as the CPU's matrix unit reads them.

oneDNN rearranges a bf16 weight for every product. Done once, a step of one row takes 0.75 of its
time and one of 32 rows 0.87 (tests/benchmarks/serve.py), and no bit of a result changes
(test_prepacked_layers_give_the_same_bits).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS = 32  # tokens of a product that the arrangement is made for; any other number is right, too


class PrepackedLinear(nn.Module):
    """A linear layer for inference. Its weight cannot be read back."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, self._weight, self.bias, "none", [], "")


def prepack(model: nn.Module, keep: tuple[type[nn.Module], ...] = ()) -> int:
    """Put such layers in the place of a model's bf16 ones on a CPU; how many. Children of modules
    of the types `keep`, whose weights may be exchanged, stay as they are."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    places = [
        (module, name)
        for module in model.modules()
        if not isinstance(module, keep)
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
        and child.weight.dtype == torch.bfloat16
        and child.weight.device.type == "cpu"
    ]
    for module, name in places:  # one after another: each frees the weight that it replaces
        setattr(module, name, PrepackedLinear(getattr(module, name)))
    return len(places)
