"""The state that training changes, moved into and out of DeepSpeed's optimizers.

DeepSpeed keeps the fp32 values ("masters") flat and cut over the ranks, each stage in its own way,
and AdamW's moments beside them. Its own checkpoints are pickles of these pieces, tied to stage and
world size. Here a small state moves whole, by parameter name, so that it fits any stage and any
number of ranks. A large one moves as each rank's pieces.

Nothing here imports deepspeed: the optimizer objects of the engine do the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qwen_ds import dist
from qwen_ds.train.lora_product import values_changed

VALUE = "value"
MOMENTS = ("exp_avg", "exp_avg_sq")
# State of the fp16 loss scaler (deepspeed/runtime/fp16/loss_scaler.py).
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class TrainableState:
    """The fp32 values and moments of all trainable parameters of an engine.

    Args:
        model: its parameters that require gradients are the trainable ones.
        optimizer: as `deepspeed.initialize` returned it: torch's own at stage 0, else DeepSpeed's
            wrapper around it.
        stage: 0 to 3.
    """

    def __init__(self, model: nn.Module, optimizer: Any, stage: int, device: torch.device) -> None:
        self._zero, self._stage, self._device = optimizer, stage, device
        self._adamw: torch.optim.Optimizer = optimizer.optimizer if stage else optimizer
        # Any: ZeRO gives them attributes and methods of its own (ds_*, *_hp_param).
        self._parameters: dict[str, Any] = {
            name: p for name, p in model.named_parameters() if p.requires_grad
        }

    def names(self) -> list[str]:
        return list(self._parameters)

    @property
    def steps(self) -> int:
        """AdamW's count of updates, without skipped steps: the exponent of its bias correction."""
        first = self._adamw.state.get(self._masters()[0], {})
        return int(first.get("step", 0))

    def gather(self, *kinds: str) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (name, kind, complete fp32 tensor on the CPU) for kinds of VALUE and MOMENTS.

        A collective. The tensors are copies; ranks other than 0 get empty ones.
        """
        self.make_moments()
        for name, parameter in self._parameters.items():
            for kind in kinds:
                full = self._full(parameter, kind)
                yield name, kind, full.float().cpu() if dist.rank() == 0 else torch.empty(0)

    def restore(self, read: Callable[[str, str], Tensor], steps: int) -> None:
        """Set all values and moments from what rank 0 reads (a collective).

        `read` (name, kind) -> complete tensor is called on rank 0 only; `steps` is AdamW's count.
        """
        self.make_moments(steps)
        for name, parameter in self._parameters.items():
            shape = parameter.ds_shape if self._stage == 3 else parameter.shape
            for kind in (VALUE, *MOMENTS):
                if dist.rank() == 0:
                    full = read(name, kind).to(self._device, torch.float32)
                    assert full.shape == shape, (name, kind, full.shape, shape)
                else:
                    full = torch.empty(tuple(shape), dtype=torch.float32, device=self._device)
                # All ranks, once for each value and moment: rank 0 alone has read the file.
                torch.distributed.broadcast(full, src=0)
                self._set(parameter, kind, full)
        self._push_down()

    def pieces(self) -> dict[str, Tensor]:
        """This rank's flat pieces, not copied, by name: "value.0", "exp_avg.0" ..."""
        self.make_moments()
        return {
            f"{kind}.{i}": self._held(master, kind)
            for i, master in enumerate(self._masters())
            for kind in (VALUE, *MOMENTS)
        }

    def restore_pieces(self, read: Callable[[str], Tensor], steps: int) -> None:
        """Set this rank's pieces; stage and world size must be those of the save.

        A collective: the module's weights follow.
        """
        self.make_moments(steps)
        for name, piece in self.pieces().items():
            saved = read(name)
            assert saved.shape == piece.shape, (name, saved.shape, piece.shape)
            piece.copy_(saved)
        self._push_down()

    def loss_scaler(self) -> dict[str, float]:
        """State of the fp16 loss scaler; empty without fp16."""
        if not hasattr(self._zero, "loss_scaler") or self._zero.loss_scaler is None:
            return {}
        scaler = vars(self._zero.loss_scaler)
        return {key: float(scaler[key]) for key in _SCALER_STATE if key in scaler}

    def restore_loss_scaler(self, saved: dict[str, float]) -> None:
        scaler = self.loss_scaler()
        for key, value in saved.items():
            if key in scaler:  # else the run began in fp16 under ZeRO and resumes without
                kind = float if key == "cur_scale" else int
                setattr(self._zero.loss_scaler, key, kind(value))

    def _masters(self) -> list[Tensor]:
        """The tensors that AdamW updates on this rank."""
        if self._stage == 0:
            return list(self._parameters.values())
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        # DeepSpeed's bf16 optimizer, at stage 1, names them differently.
        if hasattr(self._zero, "fp32_groups_flat_partition"):
            return self._zero.fp32_groups_flat_partition
        return self._zero.single_partition_of_fp32_groups

    def make_moments(self, steps: int | None = None) -> None:
        """Make AdamW's state, zeros, before its first step does; `steps` sets its count."""
        in_tensor = isinstance(self._adamw, torch.optim.AdamW)  # DeepSpeed's own counts in an int
        for master in self._masters():
            state = self._adamw.state[master]
            for kind in MOMENTS:
                if kind not in state:
                    state[kind] = torch.zeros_like(master, requires_grad=False)
            if "step" not in state or steps is not None:
                # Beside the weights: there the fused kernel counts.
                count = torch.tensor(float(steps or 0), device=master.device)
                state["step"] = count if in_tensor else steps or 0
        if self._stage in (1, 2):
            # Links each parameter to its part of the moments.
            self._zero._lazy_init_hp_params_optimizer_state()

    def _held(self, master: Tensor, kind: str) -> Tensor:
        return master.detach() if kind == VALUE else self._adamw.state[master][kind]

    def _full(self, parameter: Any, kind: str) -> Tensor:
        if self._stage == 0:
            return self._held(parameter, kind).clone()
        key = None if kind == VALUE else kind
        if self._stage == 3:
            return self._zero.get_full_hp_param(parameter, key)
        return parameter.get_full_hp_param(key)

    def _set(self, parameter: Any, kind: str, full: Tensor) -> None:
        key = None if kind == VALUE else kind
        if self._stage == 0:
            self._held(parameter, kind).copy_(full)
        elif self._stage == 3:
            # DeepSpeed's set_full_hp_param fails on the last rank where a size is not a multiple of
            # the world size.
            size = parameter.ds_tensor.numel()
            piece = full.flatten()[dist.rank() * size : (dist.rank() + 1) * size]
            padded = torch.nn.functional.pad(piece, (0, size - piece.numel()))
            self._zero.set_local_hp_param(padded, parameter, key)
        else:
            parameter.set_full_hp_param(full, key)

    def _push_down(self) -> None:
        """Copy the masters into the module's own weights (a collective)."""
        values_changed()
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            # As DeepSpeed does it around a load: the small weights that stay whole are gathered
            # anew, and hpZ's second copies are dropped.
            self._zero._partition_all_parameters()
            for i in range(len(self._masters())):
                self._zero._reassign_or_swap_out_partitioned_parameters(i)
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)
            self._zero.invalidate_secondary_tensor()
