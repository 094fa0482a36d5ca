"""DeepSpeed before there is a model: process group, configuration, compiled operations."""

from __future__ import annotations

import datetime

import deepspeed
import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.op_builder.builder import MissingCUDAException, installed_cuda_version
from deepspeed.runtime.config import DeepSpeedConfigError
from pydantic import ValidationError
from torch.utils import cpp_extension

from qwen_ds import dist, signals
from qwen_ds.errors import Failed, UserError
from qwen_ds.model.attention_kernels import without_cudnn_attention
from qwen_ds.plan.deepspeed_json import Json


def start_process_group(device: torch.device, timeout_minutes: float) -> None:
    """Join the other ranks: by the launcher's variables, else mpi4py, else in a group of one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        without_cudnn_attention()
    else:  # on a machine with a GPU DeepSpeed would pick that one by itself
        set_accelerator(CPU_Accelerator())
    # DeepSpeed's shared-memory all-reduce for CPUs compiles for 45 s, a killed run leaves a lock
    # that hangs the next start, and it waits for ever for a dead peer. gloo is as fast and times
    # out.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.record_collectives()
    if dist.has_rendezvous():
        dist.export_ranks()
        dist.meeting_point()  # its checks
    elif dist.world_size() == 1:
        dist.export_ranks("127.0.0.1", dist.free_port())
    else:  # DeepSpeed itself takes the first of rank 0's addresses, and one port for every mpirun
        dist.meet_over_mpi()
    dist.use_network()
    try:
        with signals.at_once():
            deepspeed.init_distributed(
                dist_backend="nccl" if device.type == "cuda" else "gloo",
                timeout=datetime.timedelta(minutes=timeout_minutes),
                verbose=False,
            )
    except torch.distributed.DistNetworkError as error:
        raise _unreachable(error) from None


def _unreachable(error: torch.distributed.DistNetworkError) -> Exception:
    """A UserError where the meeting point itself is wrong; else the error without C++'s frames."""
    address, port = dist.meeting_point()
    if "EADDRINUSE" in str(error):
        return UserError(
            f"port {port} of {address} (MASTER_PORT) is in use by another process; expected a free "
            "one: deepspeed --master_port N, or MASTER_PORT=N"
        )
    if "EACCES" in str(error):
        return UserError(f"port {port} (MASTER_PORT) is not permitted; expected one above 1023")
    reason = str(error).splitlines()[0]
    return Failed(f"the ranks cannot meet at {address}:{port}: {reason}")


def stop_process_group() -> None:
    """Leave the group; a rank that merely exits makes its peers print errors."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_config(engine_json: Json, file: str | None = None) -> None:
    """Let DeepSpeed read its configuration, before a model is loaded for it.

    Raises UserError, which names `file` and what DeepSpeed itself objects to.
    """
    file = file or "DeepSpeed JSON"
    try:
        deepspeed.DeepSpeedConfig(engine_json)
    except ValidationError as error:
        first = error.errors()[0]
        key, came = ".".join(map(str, first["loc"])), first.get("input")
        raise UserError(f"{file}: {error.title}: {key} is {came!r}: {first['msg']}") from None
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from None


def _has_matching_nvcc() -> bool:
    """Whether there is a compiler of CUDA with torch's major version: code of another one brings a
    second CUDA runtime in."""
    try:
        major, _ = installed_cuda_version()
    except (MissingCUDAException, ValueError):  # none, or one that says something else
        return False
    return str(major) == (torch.version.cuda or "").partition(".")[0]


def can_quantise_weights(device: torch.device) -> bool:
    """Whether every rank has DeepSpeed's CUDA quantiser, built or buildable (a collective).

    There is none for CPUs.
    """
    can_build = _has_matching_nvcc() and cpp_extension.is_ninja_available()
    ready = device.type == "cuda" and (installed_ops.get("quantizer", False) or can_build)
    return all(dist.gather(ready))
