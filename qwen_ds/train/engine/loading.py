"""Loading of a base that ZeRO-3 partitions while it arrives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qwen_ds.plan.deepspeed_json import ResolvedConfig
from qwen_ds.train.engine.compiled import load_quantizer


@contextmanager
def partitioned_loading(resolved: ResolvedConfig, dtype: torch.dtype) -> Iterator[None]:
    """Let `from_pretrained` partition parameters as they arrive, and peft gather them (ZeRO-3).

    At other stages it does nothing. Raises UserError as `load_quantizer` does.
    """
    if resolved.stage < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    if resolved.engine_json["zero_optimization"].get("zero_quantized_weights"):
        load_quantizer()
    # zero.Init takes its dtype from this JSON, so it gets the base's own precision section even if
    # the training JSON has none: without it the base would arrive in fp32.
    loading = {k: v for k, v in resolved.engine_json.items() if k not in ("bf16", "fp16")}
    if dtype != torch.float32:
        loading["bf16" if dtype == torch.bfloat16 else "fp16"] = {"enabled": True}
    alive = HfDeepSpeedConfig(loading)  # transformers keeps only a weak reference
    try:
        yield
    finally:
        del alive
        unset_hf_deepspeed_config()
