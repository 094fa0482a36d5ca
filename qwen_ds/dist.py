"""This process's place among the ranks, and the collectives of training by their meaning.

This is the only module that reads a launcher's environment variables: those of torch and DeepSpeed
(RANK, LOCAL_RANK, WORLD_SIZE), of Slurm (SLURM_*) and of Open MPI (OMPI_*). Reading them starts no
process group; `train/engine/start.py` does that.
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
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from qwen_ds import network
from qwen_ds.errors import UserError
from qwen_ds.signals import Stopped

_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
_WORLD = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_LOCAL_WORLD = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
# Linux hands out ports from 32768 up by itself, so no process has one of these by chance.
_SLURM_PORTS = range(20000, 32000)
# Waiting at the store has no useful limit: tokenising a large corpus takes hours, and the watchdog
# ends a run whose other ranks are gone.
_WAIT = datetime.timedelta(days=7)
T = TypeVar("T")


def _launcher_number(names: tuple[str, ...], otherwise: int) -> int:
    name = next((name for name in names if name in os.environ), None)
    if name is None:
        return otherwise
    if not re.fullmatch(r"\d{1,9}", os.environ[name]):
        raise UserError(f"{name} is {os.environ[name]!r}; expected the number that a launcher sets")
    return int(os.environ[name])


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


def check_place() -> None:
    """Raise UserError unless the launcher's numbers say which one of how many ranks this is."""
    if not rank() < world_size() or not local_rank() < local_world_size():
        raise UserError(
            f"the environment says rank {rank()} of {world_size()}, and {local_rank()} of"
            f" {local_world_size()} on this machine; expected a launcher's RANK, WORLD_SIZE,"
            " LOCAL_RANK, or none of them"
        )


def started_by_deepspeed() -> bool:
    """Whether DeepSpeed's launcher started this process."""
    return {"CROSS_RANK", "CROSS_SIZE"} <= os.environ.keys()


def export_ranks(master_addr: str | None = None, master_port: int | None = None) -> None:
    """Export Slurm's and MPI's numbers, and the meeting point, under the names that torch reads."""
    if master_addr is None and _started_by_srun():
        master_addr, master_port = slurm_rendezvous()
    values: dict[str, object] = {"MASTER_ADDR": master_addr, "MASTER_PORT": master_port}
    values |= {"RANK": rank(), "LOCAL_RANK": local_rank(), "WORLD_SIZE": world_size()}
    for name, value in values.items():
        if value is not None:
            os.environ.setdefault(name, str(value))


def record_collectives() -> None:
    """Let torch's flight recorder keep the newest collectives of a group that starts after this;
    train/survive/collectives.py reads them. A user's own size wins."""
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # the older name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


def meeting_point() -> tuple[str, int]:
    """Address and port where the ranks meet, once they are exported."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not re.fullmatch(r"\d{1,5}", port) or int(port) > 65535:
        raise UserError(f"MASTER_PORT is {port!r}; expected a port, 0 to 65535")
    return address, int(port)


def has_rendezvous() -> bool:
    """Whether the launcher says where the ranks meet; srun naming their machines is enough."""
    return {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() or _started_by_srun()


def _started_by_srun() -> bool:
    """Whether this is one of several tasks of srun.

    An interactive shell is a step of one task, and every run started in it inherits its variables.
    Under mpirun Slurm's variables are those of mpirun's daemons.
    """
    others = {"RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID"}
    several = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    return several and "SLURM_STEP_NODELIST" in os.environ and not others & os.environ.keys()


def slurm_rendezvous() -> tuple[str, int]:
    """Address and port that each task of an srun derives by itself, alike on all of them: the
    step's first machine, where Slurm puts task 0, and a port by the numbers of job and step."""
    nodes = os.environ["SLURM_STEP_NODELIST"]  # such as gpu[01-03,7],big1
    first = re.match(r"(?:\[[^]]*\]|[^,[])+", nodes)
    assert first is not None, nodes
    job, step = (int(os.environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    # Sixteen ports for each job, whose steps may run side by side.
    port = _SLURM_PORTS[(job * 16 + step) % len(_SLURM_PORTS)]
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0]), port


def meet_over_mpi() -> None:
    """Export the ranks' numbers and a meeting point: rank 0's address, as the other machines see
    it, and a port that is free there, sent through MPI (mpirun's collective). A user's own
    MASTER_ADDR wins.

    Raises UserError if MPI knows of other ranks than the environment: nothing says where they meet.
    """
    from mpi4py import MPI

    ranks = MPI.COMM_WORLD
    if ranks.Get_size() != world_size():
        raise UserError(
            f"the environment says {world_size()} ranks and MPI {ranks.Get_size()}; expected "
            f"mpirun, srun, or a launcher that sets MASTER_ADDR and MASTER_PORT"
        )
    own = MPI.Get_processor_name()
    others = [name for name in ranks.allgather(own) if name != own]
    address = network.local_address_to(others[0]) if others else "127.0.0.1"
    here = address or socket.gethostbyname(socket.gethostname()), free_port()
    export_ranks(*ranks.bcast(here if ranks.Get_rank() == 0 else None))


def use_network() -> None:
    """Have gloo and NCCL use the interface that leads to the meeting point, where there are several
    machines. A user's own choice wins.

    NCCL looks for InfiniBand's interfaces (ib0 ...) first, and is left to find them.
    """
    if not _spans_machines():
        return
    name = network.interface_to(os.environ["MASTER_ADDR"])
    if name is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if not any(other.startswith("ib") for other in network.addresses().values()):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": no name that begins like it


def _spans_machines() -> bool:
    """Whether the ranks are on several machines; srun does not say how many are on this one."""
    return local_world_size() < world_size() or _launcher_number(("SLURM_STEP_NUM_NODES",), 1) > 1


def free_port() -> int:
    """A port that no process on this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def job_ends_at() -> float | None:
    """End of the Slurm job around this process, in seconds since 1970; None outside of one.

    Newer Slurm exports it. With an older one rank 0 asks squeue, and the other ranks get None.
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
        # squeue prints local time, which is what a datetime without a zone means.
        return datetime.datetime.fromisoformat(answer.stdout.strip()).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError):  # no squeue here, no answer, or N/A
        return None


def _reduced(values: tuple[float, ...], op: torch_dist.ReduceOp.RedOpType) -> list[float]:
    # NCCL needs the numbers on the GPU. fp64 is exact for every token count below 2**53.
    on_gpu = torch_dist.get_backend() == "nccl"
    tensor = torch.tensor(values, dtype=torch.float64, device="cuda" if on_gpu else "cpu")
    torch_dist.all_reduce(tensor, op=op)
    return tensor.tolist()


def sum_floats(*values: float) -> list[float]:
    """Element-wise sums over all ranks (a collective)."""
    return _reduced(values, torch_dist.ReduceOp.SUM)


def max_floats(*values: float) -> list[float]:
    """Element-wise maxima over all ranks (a collective)."""
    return _reduced(values, torch_dist.ReduceOp.MAX)


def gather_numbers(own_N: Tensor) -> list[list[float]]:
    """Every rank's numbers, in rank order, on every rank (a collective).

    For numbers that a GPU has computed: the CPU waits for it once, as they are read here.
    """
    if not torch_dist.is_initialized():
        return [own_N.tolist()]
    found = [torch.empty_like(own_N) for _ in range(world_size())]
    torch_dist.all_gather(found, own_N)
    return torch.stack(found).tolist()


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank (a collective). For small values only."""
    if not torch_dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def from_rank_0(value: T) -> T:
    """Rank 0's value (a collective); what the other ranks pass is ignored."""
    return gather(value)[0]


def barrier() -> None:
    """Wait for every rank (a collective, with its time-out)."""
    torch_dist.barrier()


def ranks_per_machine() -> list[int]:
    """Number of ranks on each machine, in rank order (a collective).

    Raises UserError unless each machine's ranks are consecutive: `once_per_machine` and ZeRO++'s
    hpZ rely on it.
    """
    counts: list[int] = []
    for index, local in enumerate(gather(local_rank())):
        if local == 0:
            counts.append(0)
        if not counts or local != counts[-1]:
            raise UserError(
                f"rank {index} is number {local} of its machine; expected consecutive ranks on "
                f"each machine (srun --distribution=block, mpirun --map-by slot)"
            )
        counts[-1] += 1
    return counts


def _default_store() -> Any:  # torch's type stubs lack both the function and Store.clone
    return torch_dist.distributed_c10d._get_default_store()


def own_store(name: str) -> torch_dist.Store:
    """A connection of its own to the rendezvous store, so that a call that waits on it blocks no
    other thread; its keys begin with `name`."""
    return torch_dist.PrefixStore(name, _default_store().clone())


_times: Counter[str] = Counter()


def _key(name: str) -> str:
    """A store key for this visit of the place `name`, which all ranks visit equally often."""
    _times[name] += 1
    return f"{name}/{_times[name]}"


def meet(name: str) -> None:
    """Wait for every rank, for as long as it takes: at the store, since a collective times out."""
    if world_size() == 1:
        return
    store, key = _default_store(), _key(f"meet/{name}")
    if store.add(key, 1) == world_size():
        store.set(key + "/all", "")
    store.wait([key + "/all"], _WAIT)


def once(make: Callable[[], object], name: str) -> None:
    """Run `make` on rank 0 while all other ranks wait; see `once_per_machine`."""
    _lead(make, _key(f"once/{name}"), leads=rank() == 0, readers=world_size() - 1)


def once_per_machine(make: Callable[[], object], name: str) -> None:
    """Run `make` on the first rank of each machine while the others there wait.

    The ranks wait at the rendezvous store and not in a collective: preparing a large data set takes
    longer than a collective's time-out, and a UserError that `make` raises on the first rank must
    reach the others, which raise it with the same text.
    """
    key = f"once_per_machine/{name}/{rank() - local_rank()}"
    _lead(make, key, leads=local_rank() == 0, readers=local_world_size() - 1)


def _lead(make: Callable[[], object], key: str, *, leads: bool, readers: int) -> None:
    if world_size() == 1:
        make()
        return
    store = _default_store()
    if leads:
        try:
            make()
        except BaseException as error:
            # U: the user's mistake, which all ranks raise alike. S: a signal. E: a defect of ours.
            told = f"U{error}" if isinstance(error, UserError) else f"E{error!r}"
            store.set(key, f"S{error.number}" if isinstance(error, Stopped) else told)
            # Rank 0 serves the store: it must not leave before the others have read why.
            ends = time.monotonic() + 10
            while store.add(key + "/read", 0) < readers and time.monotonic() < ends:
                time.sleep(0.05)
            raise
        store.set(key, "ok")
        return
    store.wait([key], _WAIT)
    answer = store.get(key).decode()
    store.add(key + "/read", 1)
    if answer.startswith("U"):
        raise UserError(answer[1:])
    if answer.startswith("S"):
        raise Stopped(int(answer[1:]))
    if answer.startswith("E"):
        raise RuntimeError(f"{key} failed on the rank that leads: {answer[1:]}")
