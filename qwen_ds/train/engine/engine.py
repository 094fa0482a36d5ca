"""DeepSpeed's engine, reduced to what one step needs: forward, backward, totals, step.

Shapes: B rows of a micro-batch, T its longest row, P its target tokens, M micro-batches of a step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from qwen_ds import dist
from qwen_ds.errors import UserError
from qwen_ds.model.family import family_of
from qwen_ds.plan.deepspeed_json import ResolvedConfig
from qwen_ds.recipe.deepspeed_json import Json
from qwen_ds.recipe.options import OptimOptions
from qwen_ds.train.engine.compiled import cpu_adam
from qwen_ds.train.engine.state import VALUE, TrainableState
from qwen_ds.train.lora import numel
from qwen_ds.train.loss import TrainingModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Totals:
    """Numbers of a step over all ranks, known before the weights change."""

    loss: float  # sum over the target tokens, nats
    bad: int  # micro-batches whose loss is not finite
    noted: float  # the largest of the ranks' `noted`
    grad_norm: float | None
    """2-norm of the whole gradient before clipping; None where DeepSpeed alone can tell."""


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
        return cpu_adam(parameters, settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


def _own_update(resolved: ResolvedConfig) -> tuple[Json, bool, bool]:
    """The JSON for DeepSpeed's engine, whether the gradient is clipped here, and whether its norm
    is found here.

    DeepSpeed's own norm and clipping make the CPU wait for the GPU some five times a step, and the
    losses wait once more; here all of it is read together. DeepSpeed keeps its own way where it
    has no switch for that: gradients in CPU memory, fp16's loss scale, bf16 weights under ZeRO-1;
    and under ZeRO-3, where at least the norm need not be read a second time.
    """
    config, stage = resolved.engine_json, resolved.stage
    if resolved.offload_optimizer or "fp16" in config or (stage == 1 and "bf16" in config):
        return config, False, False
    if stage == 3:
        return config, False, True
    config = config | {"gradient_clipping": 0.0}
    if stage:
        zero = config["zero_optimization"] | {"compute_grad_norm": False}
        config = config | {"zero_optimization": zero}
    if "bf16" in config:
        config["bf16"] = config["bf16"] | {"check_grad_overflow": False}
    return config, True, True


def _allow_fp16() -> None:
    """Let DeepSpeed train in fp16 on every CPU. It asks for fp16 instructions (AVX512-FP16 or AMX),
    without which torch computes the same, slowly.

    Raises UserError on a GPU that DeepSpeed trains in fp16 no more (Pascal and older).
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        accelerator.is_fp16_supported = lambda: True
    elif not accelerator.is_fp16_supported():
        raise UserError(
            "model.dtype is float16, which DeepSpeed does not train on this GPU; expected one of "
            "compute capability 7.0 or newer (V100 on), or model.dtype float32"
        )


def _gather_by_block(model: TrainingModel) -> None:
    """Let ZeRO-3 gather the weights of a block together, and average its gradients together.

    DeepSpeed's hooks then run once for each block and not for its ten modules: they are most of the
    CPU's work under ZeRO-3.
    """
    deepspeed.utils.set_z3_leaf_modules(model, [family_of(model.transformer.config).block_class])


def _feed_gradients_to_blocks(model: TrainingModel) -> None:
    """Let the first block's input have a gradient: only then does the hook by which DeepSpeed
    averages a block's gradients wait for them. To be called when DeepSpeed's own hooks are there,
    or it would gather the embedding for the backward pass."""

    def need_gradient(_module: nn.Module, _inputs: object, x_BTD: Tensor) -> Tensor:
        return x_BTD.requires_grad_() if torch.is_grad_enabled() else x_BTD

    model.transformer.get_input_embeddings().register_forward_hook(need_gradient)


class TrainingEngine:
    """DeepSpeed's engine around the training model.

    Attributes:
        overflows: fp16 steps skipped since the run began.
        state: fp32 values and moments of the trainable parameters, for checkpoints.

    Raises UserError if a monitor that the JSON asks for does not begin.
    """

    def __init__(self, model: TrainingModel, optim: OptimOptions, resolved: ResolvedConfig) -> None:
        config, self._clips, self._knows_norm = _own_update(resolved)
        self._max_grad_norm = optim.max_grad_norm
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.stage = resolved.stage
        self.overflows = 0
        self._uses_loss_scale = "fp16" in resolved.engine_json
        self._sums_locally, self._summing = resolved.sums_locally, ExitStack()
        if self._uses_loss_scale:
            _allow_fp16()
        if self.stage == 3:
            _gather_by_block(model)
            # ZeRO-3 gathers a weight for the module that owns it. The loss uses the head's.
            for weight in model.loss_head.borrowed:
                deepspeed.zero.register_external_parameter(model.loss_head, weight)
        try:
            self._ds, self._optimizer, _, _ = deepspeed.initialize(
                model=model,
                model_parameters=trainable,
                optimizer=make_optimizer(trainable, optim, resolved),
                config=config,
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
        if self.stage == 3:
            _feed_gradients_to_blocks(model)
        self.device = self._ds.device
        self.model: TrainingModel = self._ds.module
        self.state = TrainableState(self.model.model, self._optimizer, self.stage, self.device)

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def train(self, mode: bool) -> None:
        self._ds.train(mode)

    def loss_sum(self, ids_BT: Tensor, labels_BT: Tensor, places_P: Tensor | None = None) -> Tensor:
        """Sum of the cross-entropy over the micro-batch's target tokens, an fp32 scalar.

        Under ZeRO-3 a collective: the ranks gather each layer's weights together. places_P: see
        `LossHead`.
        """
        given = (ids_BT, labels_BT) if places_P is None else (ids_BT, labels_BT, places_P)
        return self._ds(*(tensor.to(self.device, non_blocking=True) for tensor in given))

    def token_losses(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Cross-entropy of each target token, float32 [B, T]; see model/token_loss.py. The caller
        sees to eval mode. Under ZeRO-3 a collective, as `loss_sum` is."""
        return self._ds(ids_BT.to(self.device), labels_BT.to(self.device), of_each_token=True)

    def backward(self, loss: Tensor, *, last_of_step: bool) -> None:
        """Accumulate the gradient; `last_of_step` averages it over the ranks.

        A collective in the step's last micro-batch; under ZeRO-2 and 3 in each of them, unless the
        ranks sum by themselves (`ResolvedConfig.sums_locally`).
        """
        if self._sums_locally and not self._ds.inside_no_sync_ctxt:  # the first of a step
            self._summing.enter_context(self._ds.coalesce_grad_reduction())
        # The number of micro-batches differs from step to step: DeepSpeed must neither count them
        # nor divide the loss by a fixed number.
        self._ds.set_gradient_accumulation_boundary(last_of_step)
        self._ds.backward(loss, scale_wrt_gas=False)
        if last_of_step:
            self._summing.close()
            # The sum's context has put back what this was in the step's first micro-batch.
            self._ds.set_gradient_accumulation_boundary(True)

    def totals(self, loss_sums: Sequence[Tensor], noted: float = 0.0) -> Totals:
        """Sum a step's losses and gradient over the ranks, after its last backward (a collective).

        The only place of a step where this project makes the CPU wait for the GPU; DeepSpeed waits
        on its own where its step is kept (`_own_update`). `noted` is a number of this rank that
        travels along.
        """
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        losses_M = torch.stack(list(loss_sums)).double() if loss_sums else zero[None]
        grads = self._gradients() if self._knows_norm else []
        norm = torch.nn.utils.get_total_norm(grads).double() if grads else zero
        numbers = losses_M.sum(), (~losses_M.isfinite()).sum(), norm, torch.full_like(zero, noted)
        of_ranks = dist.gather_numbers(torch.stack([number.double() for number in numbers]))
        losses, bad, norms, notes = zip(*of_ranks, strict=True)
        # Without ZeRO each rank has the whole gradient, with it a piece of its own.
        whole = norms[0] if self.stage == 0 else math.sqrt(sum(norm**2 for norm in norms))
        return Totals(sum(losses), int(sum(bad)), max(notes), whole if self._knows_norm else None)

    def _gradients(self) -> list[Tensor]:
        """This rank's part of the averaged gradient of a step."""
        if self.stage == 0:
            return [p.grad for p in self.model.parameters() if p.grad is not None]
        return [grad for group in self._optimizer.averaged_gradients.values() for grad in group]

    def step(self, grad_norm: float | None = None) -> StepResult:
        """Clip and apply the accumulated gradient (a collective).

        A gradient that is not finite never reaches the weights (tests/train/test_not_finite.py).
        `grad_norm` is that of `totals`, which is asked if it is missing.
        """
        if grad_norm is None and self._knows_norm:
            grad_norm = self.totals([]).grad_norm
        if not self._clips:
            return self._deepspeeds_step(grad_norm)
        assert grad_norm is not None
        if not math.isfinite(grad_norm):
            self._drop_gradients()
            return StepResult(grad_norm, f"gradient norm ({grad_norm})")
        scale = self._max_grad_norm / (grad_norm + 1e-6)
        if 0.0 < scale < 1.0:  # a maximum of 0 is none
            torch._foreach_mul_(self._gradients(), scale)
        self._ds.step()
        return StepResult(grad_norm)

    def _drop_gradients(self) -> None:
        """Forget a gradient that is not finite, and leave the weights and the moments alone."""
        if self.stage == 0:
            self._ds.zero_grad()
            return
        # ZeRO's own way, on all ranks alike: it looks for NaN, finds it and skips the step.
        torch._foreach_mul_(self._gradients(), math.nan)
        self._optimizer.check_grad_overflow = True
        self._ds.step()
        self._optimizer.check_grad_overflow = False

    def _deepspeeds_step(self, grad_norm: float | None) -> StepResult:
        """Let DeepSpeed clip and apply the gradient, and find its norm where `grad_norm` is
        None."""
        skipped = self._ds.skipped_steps
        try:
            self._ds.step()
        except Exception as error:
            # DeepSpeed's way to say that the gradient overflows even at the smallest loss scale.
            if self._uses_loss_scale and "minimum" in str(error):
                return StepResult(math.inf, "gradient (fp16 overflows at the smallest loss scale)")
            raise
        norm = grad_norm
        if norm is None:
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
