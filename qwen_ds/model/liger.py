"""The pieces of a block as liger-kernel's Triton kernels compute them, one kernel for each pass.

They fill the norm and the gate. The rotation stays ours: liger-kernel's takes q and k as contiguous
tensors, and ours are views of the fused projection, so it would copy both in each block and the
copies would stay for the backward pass, beside the projection that v still needs.

Shapes: D hidden, I inner width.
"""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec

from torch import Tensor

from qwen_ds.errors import UserError
from qwen_ds.model.pieces import EAGER, Pieces

OLDEST = (0, 8, 5)
"""The first release that computes no gradient of a frozen norm's weight."""


def liger_version() -> str | None:
    """The version of liger-kernel, where it is installed, can be used and is not too old."""
    if find_spec("liger_kernel") is None or find_spec("triton") is None:
        return None
    version = metadata.version("liger-kernel")
    numbers = tuple(map(int, re.findall(r"\d+", version)[: len(OLDEST)]))
    return version if numbers >= OLDEST else None


def liger_pieces() -> Pieces:
    """Pieces whose norm and gate liger-kernel computes, on a GPU.

    The graph of a forward pass can run backward once: the gate's gradients take the place of its
    inputs, as liger-kernel writes them. UserError: liger-kernel cannot be imported.
    """
    try:
        # Not from liger_kernel.ops, where the environment can put other functions in their place.
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError as error:
        raise UserError(
            f"liger-kernel is installed and cannot be imported: {error}; expected the versions of "
            "torch and Triton that it needs, or `pip uninstall liger-kernel`"
        ) from error

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`pieces.norm` of [..., D]."""
        # "llama" rounds before the product with the weight. In place, the gradient of x would take
        # the memory of the result's gradient, which belongs to whoever passed it.
        offset, in_place = 0.0, False
        out: Tensor = LigerRMSNormFunction.apply(x, weight, eps, offset, "llama", in_place)
        return out

    def gated(up: Tensor, gate: Tensor) -> Tensor:
        """`pieces.gated` of [..., I]."""
        out: Tensor = LigerSiLUMulFunction.apply(gate, up)  # silu(first) * second
        return out

    return Pieces(norm, gated, EAGER.rotated)
