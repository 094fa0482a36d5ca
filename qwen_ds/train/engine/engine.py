"""The only module that knows DeepSpeed: process group, device, partitioned loading, and the engine itself."""

from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.git_version_info import installed_ops
from deepspeed.runtime.config import DeepSpeedConfigError
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils import cpp_extension

from qwen_ds import dist
from qwen_ds.errors import UserError
from qwen_ds.plan.deepspeed_json import Json, ResolvedConfig
from qwen_ds.recipe.options import OptimOptions
from qwen_ds.train.engine.state import VALUE, TrainableState
from qwen_ds.train.lora import borrowed_weights
from qwen_ds.train.loss import TrainingModel

log = logging.getLogger(__name__)


def choose_device(wanted: str) -> torch.device:
    """The device of this rank: its own GPU, or the CPU. Also tells DeepSpeed.

    Raises:
        UserError: an NVIDIA card is there that torch cannot use (an old driver or a CPU build of torch): training on
            the CPU instead would look like a hang; or more ranks than GPUs.
    """
    if wanted != "cpu" and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if dist.local_rank() >= count:
            raise UserError(
                f"rank {dist.rank()} has no GPU: {count} on this machine; expected --num_gpus {count} at most"
            )
        torch.cuda.set_device(dist.local_rank())
        return torch.device("cuda", dist.local_rank())
    if wanted == "cuda" or (wanted == "auto" and dist.nvidia_card_present()):
        built_for = torch.version.cuda or "no CUDA at all"
        raise UserError(
            f"torch {torch.__version__} cannot use this machine's NVIDIA GPU (built for: {built_for}); expected a "
            f"newer driver or another torch build (see README, drivers); --device cpu trains on the CPU"
            if dist.nvidia_card_present()
            else "--device cuda: this machine shows no NVIDIA GPU; expected one, or --device cpu"
        )
    # A machine with a GPU and --device cpu: DeepSpeed would still pick the GPU by itself.
    set_accelerator(CPU_Accelerator())
    return torch.device("cpu")


def check_config(engine_json: Json) -> None:
    """Let DeepSpeed read its configuration, before a model is loaded for it.

    Raises:
        UserError: a key that a section does not have, or a value of the wrong type; named.
    """
    try:
        deepspeed.DeepSpeedConfig(engine_json)
    except ValidationError as error:
        first = error.errors()[0]
        key, came = ".".join(map(str, first["loc"])), first.get("input")
        raise UserError(
            f"DeepSpeed JSON: {error.title}: {key} is {came!r}: {first['msg']}"
        ) from None
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError) as error:
        raise UserError(f"DeepSpeed JSON: {' '.join(str(error).split())}") from None


def can_quantise_weights(device: torch.device) -> bool:
    """Whether every rank has DeepSpeed's CUDA quantiser, compiled or with what compiles it at the start (a collective).
    There is none for CPUs."""
    ready = device.type == "cuda" and (
        installed_ops.get("quantizer", False)
        or (cpp_extension.CUDA_HOME is not None and cpp_extension.is_ninja_available())
    )
    return set(dist.gather_texts(str(ready))) == {"True"}


def start_process_group(device: torch.device, timeout_minutes: float) -> None:
    """Join the other ranks (launcher's variables, else mpi4py under mpirun, else a group of one).

    DeepSpeed's shared-memory op for CPUs is left out: it compiles for 45 s, a killed run leaves a lock that hangs the
    next start, and its all-reduce waits for ever for a dead peer. gloo is as fast here and has a time-out.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    port = 0
    if dist.has_rendezvous():
        dist.export_ranks()
    elif dist.world_size() == 1:
        dist.export_ranks("127.0.0.1", dist.free_port())
    else:  # DeepSpeed would take the same port for every mpirun
        port = dist.free_port_over_mpi()
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(minutes=timeout_minutes),
        distributed_port=port,
        verbose=False,
    )


def stop_process_group() -> None:
    """Leave the group; a rank that merely exits makes its peers print errors."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def partitioned_loading(resolved: ResolvedConfig, dtype: torch.dtype) -> Iterator[None]:
    """Within it, `from_pretrained` partitions parameters as they arrive (ZeRO-3), and peft gathers those it reads; at
    other stages it does nothing.

    transformers looks for a living HfDeepSpeedConfig. zero.Init takes its dtype from that JSON, so it gets the base's
    own precision section, also where the training JSON has none: without it the base would arrive in fp32.
    """
    if resolved.stage < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    loading = {k: v for k, v in resolved.engine_json.items() if k not in ("bf16", "fp16")}
    if dtype != torch.float32:
        loading["bf16" if dtype == torch.bfloat16 else "fp16"] = {"enabled": True}
    alive = HfDeepSpeedConfig(loading)
    try:
        yield
    finally:
        del alive
        unset_hf_deepspeed_config()


def make_optimizer(
    parameters: list[nn.Parameter], optim: OptimOptions, resolved: ResolvedConfig
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019). torch's own, which needs no compiler; DeepSpeed's compiled one only where
    the JSON offloads the optimizer on a GPU machine, where the update runs on the CPU and its speed counts."""
    settings: dict[str, Any] = {
        "lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay,
    }  # fmt: skip
    if resolved.offload_optimizer and get_accelerator().device_name() == "cuda":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)
    return torch.optim.AdamW(parameters, **settings)


@dataclass(frozen=True, slots=True)
class StepResult:
    """grad_norm: 2-norm of the whole gradient before clipping. applied: False when the weights were left alone
    (a gradient that is not finite; with fp16 also DeepSpeed's overflow, which only lowers the loss scale)."""

    grad_norm: float
    applied: bool


class Engine:
    """DeepSpeed's engine, reduced to what a step is: forward, backward, step."""

    def __init__(self, model: TrainingModel, optim: OptimOptions, resolved: ResolvedConfig) -> None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.stage = resolved.stage
        self.uses_loss_scale = "fp16" in resolved.engine_json
        self.overflows = 0
        if self.stage == 3:
            # ZeRO-3 brings a weight in for the module that owns it; these modules use one that another owns.
            for weight in model.loss_head.borrowed:
                deepspeed.zero.register_external_parameter(model.loss_head, weight)
            for module, weight in borrowed_weights(model):
                deepspeed.zero.register_external_parameter(module, weight)
        self._ds, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=trainable,
            optimizer=make_optimizer(trainable, optim, resolved),
            config=resolved.engine_json,
            dist_init_required=False,
        )
        self.device = self._ds.device
        self.model: TrainingModel = self._ds.module
        self.state = TrainableState(self.model.model, self._optimizer, self.stage, self.device)

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def train(self, mode: bool) -> None:
        self._ds.train(mode)

    def loss_sum(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Sum of the cross-entropy over the micro-batch's targets, fp32. Under ZeRO-3 a collective."""
        return self._ds(
            ids_BT.to(self.device, non_blocking=True), labels_BT.to(self.device, non_blocking=True)
        )

    def backward(self, loss: Tensor, *, last_of_step: bool) -> None:
        """Accumulate the gradient; `last_of_step` lets DeepSpeed average it over the ranks (a collective)."""
        self._ds.set_gradient_accumulation_boundary(last_of_step)
        self._ds.backward(loss, scale_wrt_gas=False)

    def step(self) -> StepResult:
        """Clip and apply the window's gradient. One that is not finite never reaches the weights."""
        if self.stage == 0:
            # DeepSpeed's plain path has no look at the gradient: it would write a NaN into the weights.
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
            if not math.isfinite(norm):
                self._ds.zero_grad()
                return StepResult(norm, applied=False)
            self._ds.step()
            return StepResult(norm, applied=True)
        skipped = self._ds.skipped_steps
        try:
            self._ds.step()
        except Exception as error:
            # DeepSpeed's word for a gradient that overflows even at the smallest fp16 loss scale.
            if self.uses_loss_scale and "minimum" in str(error):
                raise FloatingPointError("fp16 overflows at the smallest loss scale") from error
            raise
        raw = self._ds.get_global_grad_norm()
        norm = float("nan") if raw is None else float(raw)
        applied = self._ds.skipped_steps == skipped
        if self.uses_loss_scale and not applied:
            self.overflows += 1
            log.info(
                "fp16 overflow: the step is skipped, the loss scale is now %g",
                self._ds.optimizer.cur_scale,
            )
        return StepResult(norm, applied)

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Complete fp32 values of all trainable parameters by name, on the CPU; empty on ranks other than 0.

        A collective: ZeRO keeps the fp32 values in pieces over the ranks.
        """
        found = {name: tensor for name, _, tensor in self.state.gather(VALUE)}
        return found if dist.rank() == 0 else {}

    def all_tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, complete, on the CPU (a collective); empty on ranks other than 0."""
        trained = set(self.state.names())
        for name, _, tensor in self.state.gather(VALUE):
            yield name, tensor.to(dtype)
        for name, parameter in self.model.model.named_parameters():
            if name not in trained:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                    value = (
                        parameter.detach().to(dtype).cpu() if dist.rank() == 0 else torch.empty(0)
                    )
                yield name, value
