"""Adapters put onto a model by peft, whose arithmetic is the one that counts.

peft gets no configuration of the user's: the one it gets is made from what was read and checked
(qwen_ds/model/adapter.py), and names each module in full. So what is merged and what it is proven
against are one and the same. Serving has layers of its own, which compute what peft computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qwen_ds.errors import UserError
from qwen_ds.model.adapter import Adapter, LoraPair

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


@torch.no_grad()
def put_adapter(module: nn.Module, adapter: Adapter) -> PeftModel | None:
    """Put the adapter's parts for `module` in place, LoRA's matrices in fp32.

    Saved tensors and token rows overwrite the module's, and peft wraps the linear layers that LoRA
    is on. `module` may be a part of a model, if its modules are named as in the whole model. The
    result is the wrapped module in eval mode; None if LoRA is on none of its layers.
    """
    from peft import PeftModel, set_peft_model_state_dict

    parameters = dict(module.named_parameters())
    for name in adapter.saved.keys() & parameters.keys():
        parameters[name].copy_(adapter.tensor(adapter.saved[name]))
    for owner, rows in adapter.token_rows.items():
        if (weight := parameters.get(f"{owner}.weight")) is not None:
            weight[list(rows.indices)] = adapter.tensor(rows.key).to(weight)
    here = sorted({name for name, _ in module.named_modules()} & adapter.pairs.keys())
    if not here:
        return None
    wrapped = PeftModel(module, _lora_config({name: adapter.pairs[name] for name in here}, adapter))
    pairs = [adapter.pairs[name] for name in here]
    keys = (key for pair in pairs for key in (pair.a_key, pair.b_key, pair.magnitude_key))
    state = {key: adapter.tensor(key).float() for key in keys if key is not None}
    unknown = set_peft_model_state_dict(wrapped, state).unexpected_keys  # type: ignore[attr-defined]
    assert not unknown, f"{adapter.folder}: peft does not take {unknown[0]}"
    return wrapped.eval()


def _lora_config(pairs: Mapping[str, LoraPair], adapter: Adapter) -> LoraConfig:
    """A configuration that names each module in full, with its own rank and alpha: peft gets no
    pattern of the user's, and can't match other modules than were checked."""
    from peft import LoraConfig

    r, alpha = adapter.config["r"], adapter.config["lora_alpha"]
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=list(pairs),
        rank_pattern={re.escape(name): pair.r for name, pair in pairs.items() if pair.r != r},
        alpha_pattern={
            re.escape(name): pair.alpha for name, pair in pairs.items() if pair.alpha != alpha
        },
        use_rslora=bool(adapter.config.get("use_rslora")),
        use_dora=bool(adapter.config.get("use_dora")),
        inference_mode=True,
    )


def check_copies(adapter: Adapter, parameters: Mapping[str, Tensor]) -> None:
    """Raise UserError where an unchanged copy of a tensor is not the base's, in the narrower of
    the dtypes of both."""
    for name, key in adapter.copies.items():
        copy, own = adapter.tensor(key), parameters[name]
        same = copy.shape == own.shape and (
            torch.equal(copy.to(own), own) or torch.equal(copy, own.to(copy))
        )
        if not same:
            raise UserError(
                f"{adapter.folder}: its copy of {name} differs from the base's; expected an adapter"
                " that was trained on this base"
            )
