"""The values that options of a merge may have.

Apart from the code that acts on them, whose imports take seconds: --help and a misspelt option
need only this.
"""

from __future__ import annotations

from typing import Literal

FormatName = Literal["qwen", "qwen2"]
MergeDtype = Literal["keep", "bfloat16", "float16", "float32"]
"""Of all tensors in the output; keep: of each as in the base."""
ProofKind = Literal["full", "sampled"]
"""full: whole models; sampled: layer by layer, on shorter texts."""
Proof = Literal["auto", "full", "sampled", "off"]
"""auto: full if the model fits in memory."""
