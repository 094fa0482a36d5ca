"""Compiled training on a CPU: few shapes, and memory that does not fall to pieces for them.

oneDNN makes each product anew for each shape, and keeps what it made (model/token_grid.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qwen_ds.data.batches import StepSampler
from qwen_ds.model.modeling import QWenModel
from qwen_ds.model.token_grid import TokenGrid


def use_few_shapes(transformer: nn.Module, sampler: StepSampler, *, partitioned: bool) -> None:
    """Let the compiled blocks of the original Qwen see few shapes on a CPU. To be called before
    DeepSpeed's engine is made.

    Args:
        transformer: the decoder, whose blocks are compiled. Of another family it is left alone.
        sampler: of the run, for the numbers of tokens that its micro-batches have.
        partitioned: whether ZeRO-3 holds the weights, which nobody gathers for a block alone.
    """
    if not isinstance(transformer, QWenModel):
        return
    config = transformer.config
    if config._attn_implementation != "eager" or config.attn_dropout_prob:
        return  # only plain attention finds the rows of a flat micro-batch
    if transformer.dtype.itemsize != 2:
        # Another library multiplies fp32, with one code for all shapes. A single row then has no
        # compilation of its own, and that is all.
        transformer.token_grid = TokenGrid(step=1)
        return
    transformer.token_grid = TokenGrid.of(sampler.token_counts)
    if not partitioned:
        meet_shapes_first(transformer.h[0])


def meet_shapes_first(block: nn.Module) -> None:
    """Run `block`, the first of the model, forward and backward on zeros before a flat micro-batch
    with a number of tokens that is new.

    oneDNN then makes its products, which stay, while no block has saved anything for the backward
    pass. Made in between, they would lie scattered over the memory that is freed after the pass,
    and what is left between them would be too small for the next: after six steps of the benchmark
    malloc held 741 MB for at most 539 in use, and so 597.
    """
    seen: set[int] = set()

    def meet(block: Any, inputs: tuple[Any, ...]) -> None:
        x_1MD, *others = inputs
        tokens = x_1MD.shape[1]
        if tokens in seen or not torch.is_grad_enabled():
            return
        seen.add(tokens)
        zeros_1MD = torch.zeros_like(x_1MD, requires_grad=True)
        wanted: list[Tensor] = [zeros_1MD, *(p for p in block.parameters() if p.requires_grad)]
        # In a block that is recomputed, the hooks of the recomputation would take this for a part.
        as_it_is = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with torch.random.fork_rng([]), as_it_is:
            torch.autograd.grad(block.forward(zeros_1MD, *others).sum(), wanted)

    block.register_forward_pre_hook(meet)
