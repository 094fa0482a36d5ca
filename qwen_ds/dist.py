"""Who this process is among the ranks, and the few collectives that the training loop makes, each by its meaning.

The only place that reads a launcher's environment variables: torch and DeepSpeed (RANK, LOCAL_RANK, WORLD_SIZE), Slurm
(SLURM_*) and Open MPI (OMPI_*). Reading them starts no process group; `train/engine/engine.py` does that.
"""

from __future__ import annotations

import datetime
import os
import re
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from qwen_ds.errors import UserError

_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
_WORLD = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_LOCAL_WORLD = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
# Ports below those that Linux hands out by itself (32768 and up): nobody has one by chance.
_SLURM_PORTS = range(20000, 32000)


def _launcher_number(names: tuple[str, ...], otherwise: int) -> int:
    for name in names:
        value = os.environ.get(name)
        if value is not None:
            return int(value)
    return otherwise


def rank() -> int:
    """Index of this process among all ranks; 0 without a launcher."""
    return _launcher_number(_RANK, 0)


def local_rank() -> int:
    """Index of this process on its machine; 0 without a launcher."""
    return _launcher_number(_LOCAL_RANK, 0)


def world_size() -> int:
    """Number of ranks; 1 without a launcher."""
    return _launcher_number(_WORLD, 1)


def local_world_size() -> int:
    """Number of ranks on this machine; all of them where no launcher says."""
    return _launcher_number(_LOCAL_WORLD, world_size())


def export_ranks(master_addr: str | None = None, master_port: int | None = None) -> None:
    """Give Slurm's and MPI's numbers the names that torch and DeepSpeed read, and say where the ranks meet."""
    values: dict[str, object] = {
        "RANK": rank(),
        "LOCAL_RANK": local_rank(),
        "WORLD_SIZE": world_size(),
    }
    if master_addr is None and _started_by_srun():
        master_addr, master_port = slurm_rendezvous()
    values |= (
        {} if master_addr is None else {"MASTER_ADDR": master_addr, "MASTER_PORT": master_port}
    )
    for name, value in values.items():
        os.environ.setdefault(name, str(value))


def has_rendezvous() -> bool:
    """Whether the launcher said where the ranks meet; srun says on which machines they are, which is enough."""
    return {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() or _started_by_srun()


def _started_by_srun() -> bool:
    """Whether this is one of several tasks of srun. An interactive shell is a step of one task, whose variables each
    run in it has; under an mpirun they are those of its daemons."""
    others = {"RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID"}
    several = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    return several and "SLURM_STEP_NODELIST" in os.environ and not others & os.environ.keys()


def slurm_rendezvous() -> tuple[str, int]:
    """Address and port on which all tasks of an srun agree without a word: the step's first machine, where Slurm puts
    task 0, and a port from the numbers of job and step."""
    nodes = os.environ["SLURM_STEP_NODELIST"]  # such as gpu[01-03,7],big1
    first = re.match(r"(?:\[[^]]*\]|[^,[])+", nodes)
    assert first is not None, nodes
    job, step = (int(os.environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0]), _SLURM_PORTS[
        (job * 16 + step) % len(_SLURM_PORTS)
    ]


def free_port_over_mpi() -> int:
    """A port that is free on rank 0, told to the others through MPI (a collective of mpirun's ranks).

    Raises:
        UserError: MPI knows of other ranks than the environment, so nothing says where they meet.
    """
    from mpi4py import MPI

    ranks = MPI.COMM_WORLD
    if ranks.Get_size() != world_size():
        raise UserError(
            f"the environment says {world_size()} ranks and MPI {ranks.Get_size()}; expected mpirun, srun, or a "
            f"launcher that sets MASTER_ADDR and MASTER_PORT"
        )
    return int(ranks.bcast(free_port() if ranks.Get_rank() == 0 else None))


def free_port() -> int:
    """A port that nobody on this machine listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def job_ends_at() -> float | None:
    """When the Slurm job that we run in is killed, in seconds since 1970; None without one.

    Newer Slurm says so in a variable. An older one is asked, by rank 0 alone: the others get None.
    """
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        return float(end)
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or rank() != 0:
        return None
    command = ["squeue", "--noheader", "--job", job, "--format", "%e"]
    try:
        # A user's SLURM_TIME_FORMAT would change the answer.
        environment = os.environ | {"SLURM_TIME_FORMAT": "standard"}
        answer = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        return datetime.datetime.fromisoformat(
            answer.stdout.strip()
        ).timestamp()  # local time, as squeue prints it
    except (OSError, subprocess.SubprocessError, ValueError):  # no squeue here, no answer, or N/A
        return None


def nvidia_card_present() -> bool:
    """Whether the system knows an NVIDIA GPU, whatever torch thinks of it."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*"))


def _reduced(values: list[float], op: torch_dist.ReduceOp.RedOpType) -> list[float]:
    # fp64 on the CPU side of gloo, on the device for NCCL: exact for every token count that fits 2**53.
    on_gpu = torch_dist.get_backend() == "nccl"
    tensor = torch.tensor(values, dtype=torch.float64, device="cuda" if on_gpu else "cpu")
    torch_dist.all_reduce(tensor, op=op)
    return tensor.tolist()


def sum_floats(*values: float) -> list[float]:
    """Element-wise sums over all ranks (a collective)."""
    return _reduced(list(values), torch_dist.ReduceOp.SUM)


def max_floats(*values: float) -> list[float]:
    """Element-wise maxima over all ranks (a collective)."""
    return _reduced(list(values), torch_dist.ReduceOp.MAX)


def broadcast(tensor: torch.Tensor) -> None:
    """Overwrite every rank's tensor with rank 0's (a collective); same shape and dtype everywhere."""
    torch_dist.broadcast(tensor, src=0)


def broadcast_text(text: str) -> str:
    """Rank 0's text (a collective)."""
    return gather_texts(text if rank() == 0 else "")[0]


def barrier() -> None:
    """Wait for every rank (a collective)."""
    torch_dist.barrier()


def gather_texts(text: str) -> list[str]:
    """Every rank's text, in rank order (a collective)."""
    if not torch_dist.is_initialized():
        return [text]
    texts: list[str] = [""] * world_size()
    torch_dist.all_gather_object(texts, text)
    return texts


def ranks_per_machine() -> list[int]:
    """Number of ranks on each machine, in rank order (a collective).

    Raises:
        UserError: the ranks of a machine are not consecutive, which `once_per_machine` and ZeRO++'s hpZ count on.
    """
    counts: list[int] = []
    for index, local in enumerate(int(text) for text in gather_texts(str(local_rank()))):
        if local == 0:
            counts.append(0)
        if not counts or local != counts[-1]:
            raise UserError(
                f"rank {index} is number {local} of its machine; expected consecutive ranks on each machine "
                f"(srun --distribution=block, mpirun --map-by slot)"
            )
        counts[-1] += 1
    return counts


def own_store(name: str) -> torch_dist.Store:
    """The rendezvous store through a connection of its own (a waiting call blocks nobody else), keys under `name`."""
    store: Any = torch_dist.distributed_c10d._get_default_store()
    return torch_dist.PrefixStore(name, store.clone())  # clone: not in torch's type stubs


def once(make: Callable[[], object], name: str) -> None:
    """Run `make` on rank 0 while all other ranks wait, for as long as it takes; see `once_per_machine`."""
    _lead(make, f"once/{name}/{_next(name)}", leads=rank() == 0)


def meet(name: str) -> None:
    """Wait for every rank, for as long as it takes: at the store, not in a collective, which has a time-out."""
    if world_size() == 1:
        return
    store = torch_dist.distributed_c10d._get_default_store()
    key = f"meet/{name}/{_next(name)}"
    if store.add(key, 1) == world_size():
        store.set(key + "/all", "")
    store.wait([key + "/all"], datetime.timedelta(days=7))


_times: Counter[str] = Counter()


def _next(name: str) -> int:
    """How often this place was reached: all ranks reach it equally often, and each time has a key of its own."""
    _times[name] += 1
    return _times[name]


def once_per_machine(make: Callable[[], object], name: str) -> None:
    """Run `make` on the first rank of each machine while the others wait, for as long as it takes.

    The ranks wait at the rendezvous store, not in a collective: preparing a large data set may take longer than any
    collective's time-out, and a mistake of the user's found by the first rank must reach the others as that mistake.

    Raises:
        UserError: `make` raised it on the first rank; the waiting ranks raise the same text.
    """
    _lead(make, f"once_per_machine/{name}/{rank() - local_rank()}", leads=local_rank() == 0)


def _lead(make: Callable[[], object], key: str, *, leads: bool) -> None:
    if world_size() == 1:
        make()
        return
    store = torch_dist.distributed_c10d._get_default_store()
    if leads:
        try:
            make()
        except BaseException as error:
            store.set(key, f"U{error}" if isinstance(error, UserError) else f"E{error!r}")
            # Rank 0 serves the store: it must not leave before the others have read why.
            _wait_for_readers(store, key + "/read")
            raise
        store.set(key, "ok")
        return
    store.wait([key], datetime.timedelta(days=7))
    answer = store.get(key).decode()
    store.add(key + "/read", 1)
    if answer.startswith("U"):
        raise UserError(answer[1:])
    if answer.startswith("E"):
        raise RuntimeError(f"{key} failed on the rank that leads: {answer[1:]}")


def _wait_for_readers(store: torch_dist.Store, key: str, seconds: float = 10.0) -> None:
    """Until all ranks that the leader answers for have counted themselves under `key`, or the time is over."""
    readers = world_size() - 1 if key.startswith("once/") else local_world_size() - 1
    ends = time.monotonic() + seconds
    while store.add(key, 0) < readers and time.monotonic() < ends:
        time.sleep(0.05)
