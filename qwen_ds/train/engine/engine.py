"""DeepSpeed's engine, reduced to what one step needs: forward, backward, step.

Shapes: B rows of a micro-batch, T its longest row.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from qwen_ds import dist
from qwen_ds.errors import UserError
from qwen_ds.plan.deepspeed_json import ResolvedConfig
from qwen_ds.recipe.options import OptimOptions
from qwen_ds.train.engine.state import VALUE, TrainableState
from qwen_ds.train.lora import borrowed_weights, numel
from qwen_ds.train.loss import TrainingModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of one optimizer update."""

    grad_norm: float  # 2-norm of the whole gradient before clipping
    not_finite: str = ""
    """The quantity that is not finite, in words; the weights were left alone. An fp16 overflow does
    not count: DeepSpeed skips the step and lowers the loss scale."""


def make_optimizer(
    parameters: list[nn.Parameter], optim: OptimOptions, resolved: ResolvedConfig
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019): torch's own, which needs no compiler, as one kernel.

    That kernel reads each number once and makes no temporaries. It asks for floating point on a GPU
    or a CPU, which DeepSpeed's flat masters are at every stage. On one core it updates 10 million
    parameters in 32 ms, where the default takes 190.

    DeepSpeed's compiled one serves only where the JSON offloads the optimizer on a GPU machine:
    there the update runs on the CPU, and its speed counts.
    """
    settings: dict[str, Any] = {
        "lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay,
    }  # fmt: skip
    if resolved.offload_optimizer and get_accelerator().device_name() == "cuda":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


class TrainingEngine:
    """DeepSpeed's engine around the training model.

    Attributes:
        overflows: fp16 steps skipped since the run began.
        state: fp32 values and moments of the trainable parameters, for checkpoints.

    Raises UserError if a monitor that the JSON asks for does not begin.
    """

    def __init__(self, model: TrainingModel, optim: OptimOptions, resolved: ResolvedConfig) -> None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.stage = resolved.stage
        self.overflows = 0
        self._uses_loss_scale = "fp16" in resolved.engine_json
        if self.stage == 3:
            # ZeRO-3 gathers a weight for the module that owns it. These modules use another's.
            of_head = ((model.loss_head, weight) for weight in model.loss_head.borrowed)
            for module, weight in (*of_head, *borrowed_weights(model)):
                deepspeed.zero.register_external_parameter(module, weight)
        try:
            self._ds, self._optimizer, _, _ = deepspeed.initialize(
                model=model,
                model_parameters=trainable,
                optimizer=make_optimizer(trainable, optim, resolved),
                config=resolved.engine_json,
                dist_init_required=False,
            )
        except Exception as error:
            # On rank 0, where DeepSpeed's monitor begins: nobody has logged in, or no network.
            library = type(error).__module__.partition(".")[0]
            if library not in ("wandb", "comet_ml"):
                raise
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"{resolved.recipe.deepspeed}: {library}: {reason}; expected a login, or the "
                "variable by which it works offline, such as WANDB_MODE=offline"
            ) from None
        self.device = self._ds.device
        self.model: TrainingModel = self._ds.module
        self.state = TrainableState(self.model.model, self._optimizer, self.stage, self.device)

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def train(self, mode: bool) -> None:
        self._ds.train(mode)

    def loss_sum(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Sum of the cross-entropy over the micro-batch's target tokens, an fp32 scalar.

        Under ZeRO-3 a collective: the ranks gather each layer's weights together.
        """
        return self._ds(
            ids_BT.to(self.device, non_blocking=True), labels_BT.to(self.device, non_blocking=True)
        )

    def token_losses(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Cross-entropy of each target token, float32 [B, T]; see model/token_loss.py. The caller
        sees to eval mode. Under ZeRO-3 a collective, as `loss_sum` is."""
        return self._ds(ids_BT.to(self.device), labels_BT.to(self.device), of_each_token=True)

    def backward(self, loss: Tensor, *, last_of_step: bool) -> None:
        """Accumulate the gradient; `last_of_step` lets DeepSpeed average it over the ranks.

        A collective in the step's last micro-batch, under ZeRO-2 and 3 in each of them.
        """
        # The number of micro-batches differs from step to step: DeepSpeed must neither count them
        # nor divide the loss by a fixed number.
        self._ds.set_gradient_accumulation_boundary(last_of_step)
        self._ds.backward(loss, scale_wrt_gas=False)

    def step(self) -> StepResult:
        """Clip and apply the accumulated gradient (a collective).

        A gradient that is not finite never reaches the weights (tests/train/test_not_finite.py).
        """
        if self.stage == 0:
            # DeepSpeed's path without ZeRO does not look at the gradient: a NaN would be applied.
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
            if not math.isfinite(norm):
                self._ds.zero_grad()
                return StepResult(norm, f"gradient norm ({norm})")
            self._ds.step()
            return StepResult(norm)
        skipped = self._ds.skipped_steps
        try:
            self._ds.step()
        except Exception as error:
            # DeepSpeed's way to say that the gradient overflows even at the smallest loss scale.
            if self._uses_loss_scale and "minimum" in str(error):
                return StepResult(math.inf, "gradient (fp16 overflows at the smallest loss scale)")
            raise
        raw = self._ds.get_global_grad_norm()
        norm = float("nan") if raw is None else float(raw)
        if self._ds.skipped_steps == skipped:
            return StepResult(norm)
        if not self._uses_loss_scale:
            return StepResult(norm, f"gradient norm ({norm})")
        self.overflows += 1
        log.info("fp16 overflow: skipped; the loss scale is now %g", self._ds.optimizer.cur_scale)
        return StepResult(norm)

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Complete fp32 values of all trainable parameters by name, on the CPU.

        A collective, since ZeRO keeps the values in pieces; empty on ranks other than 0.
        """
        found = {name: tensor for name, _, tensor in self.state.gather(VALUE)}
        return found if dist.rank() == 0 else {}

    def sizes(self) -> dict[str, int]:
        """Number of elements of every parameter by name, in the order of `all_tensors`."""
        named = dict(self.model.model.named_parameters())
        names = dict.fromkeys([*self.state.names(), *named])  # each once, in the order of the first
        return {name: numel(named[name]) for name in names}

    def all_tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, complete, on the CPU (a collective); empty on ranks other than 0."""
        trained = set(self.state.names())
        for name, _, tensor in self.state.gather(VALUE):
            yield name, tensor.to(dtype)
        for name, parameter in self.model.model.named_parameters():
            if name not in trained:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                    writes = dist.rank() == 0
                    value = parameter.detach().to(dtype).cpu() if writes else torch.empty(0)
                yield name, value
