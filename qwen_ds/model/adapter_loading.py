"""Adapters put onto a model by peft, whose arithmetic is the one that counts.

peft gets no configuration of the user's: the one it gets is made from what was read and checked
(qwen_ds/model/adapter.py), and names each module in full. So what is served, what a merge is proven
against and what is merged are one and the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwen_ds.errors import UserError
from qwen_ds.model.adapter import Adapter, LoraPair, check_adapter_fits, read_adapter
from qwen_ds.model.adapter_asked import NO_TARGETS

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


@torch.no_grad()
def put_adapter(module: nn.Module, adapter: Adapter) -> PeftModel | None:
    """Put the adapter's parts for `module` in place, in fp32.

    Saved tensors and token rows overwrite the module's, and peft wraps the linear layers that LoRA
    is on. `module` may be a part of a model, if its modules are named as in the whole model. The
    result is the wrapped module in eval mode; None if LoRA is on none of its layers.
    """
    from peft import PeftModel, set_peft_model_state_dict

    parameters = dict(module.named_parameters())
    for name in adapter.saved.keys() & parameters.keys():
        parameters[name].copy_(adapter.tensor(adapter.saved[name]))
    for owner, rows in adapter.token_rows.items():
        if f"{owner}.weight" in parameters:
            parameters[f"{owner}.weight"][list(rows.indices)] = adapter.tensor(rows.key).float()
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


def _lora_config(pairs: Mapping[str, LoraPair], adapter: Adapter, **more: Any) -> LoraConfig:
    """A configuration that names each module in full, with its own rank and alpha: peft gets no
    pattern of the user's, and can't match other modules than were checked."""
    from peft import LoraConfig

    r, alpha = adapter.config["r"], adapter.config["lora_alpha"]
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=list(pairs) or NO_TARGETS,
        rank_pattern={re.escape(name): pair.r for name, pair in pairs.items() if pair.r != r},
        alpha_pattern={
            re.escape(name): pair.alpha for name, pair in pairs.items() if pair.alpha != alpha
        },
        use_rslora=bool(adapter.config.get("use_rslora")),
        use_dora=bool(adapter.config.get("use_dora")),
        inference_mode=True,
        **more,
    )


@torch.no_grad()
def load_adapter(
    model: PreTrainedModel, folder: Path | str, *, allow_pickle: bool = False
) -> PeftModel:
    """Put the adapter in `folder` (a stock PEFT folder) onto `model` for inference, in eval mode.

    The model's modules are wrapped in place. LoRA matrices stay fp32; the rest keeps its dtype.
    UserErrors are those of `read_adapter` and `check_adapter_fits`, and a value that is not finite.
    """
    from peft import PeftModelForCausalLM, set_peft_model_state_dict

    adapter = read_adapter(folder, allow_pickle=allow_pickle)
    parameters = dict(model.named_parameters())
    check_adapter_fits(adapter, {name: tuple(p.shape) for name, p in parameters.items()})
    _check_copies(adapter, parameters)
    state = adapter.state_dict()
    # A module that is saved whole gets peft's wrapper. A bias alone, or a copy of embedding or
    # head beside the adapter, takes the base's place, as peft's own loading does it.
    modules = {name.rpartition(".")[0] for name in adapter.saved}
    whole = {m for m in modules if all(n in adapter.saved for n in parameters if _owner(n) == m)}
    for name, key in adapter.saved.items():
        if _owner(name) not in whole:
            parameters[name].copy_(state.pop(key))
    rows = {module: list(rows.indices) for module, rows in adapter.token_rows.items()}
    config = _lora_config(
        adapter.pairs,
        adapter,
        task_type="CAUSAL_LM",
        modules_to_save=sorted(whole) or None,
        trainable_token_indices=rows or None,
    )
    wrapped = PeftModelForCausalLM(model, config)
    unknown = set_peft_model_state_dict(wrapped, state).unexpected_keys  # type: ignore[attr-defined]
    assert not unknown, f"{adapter.folder}: peft does not take {unknown[0]}"
    return wrapped.eval()


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _check_copies(adapter: Adapter, parameters: Mapping[str, Tensor]) -> None:
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
