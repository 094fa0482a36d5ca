"""What launchers say about the ranks, in their environment variables and programs."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as torch_dist

from qwen_ds import dist, network
from qwen_ds.errors import UserError
from qwen_ds.runlog import run_command

# Task 3 of `srun --nodes=2 --ntasks-per-node=2`, as Slurm 22.05 sets them.
SRUN = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "2",
}  # fmt: skip

MPIRUN = Path(__file__).parents[1] / "launch" / "cluster" / "mpirun.sh"


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment of a test's own: what it exports ends with it."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in names and not k.startswith(("SLURM_", "OMPI_", "PMI_"))
    }
    monkeypatch.setattr(os, "environ", kept)
    return kept


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[01-03,7],big1", "gpu01"),
        ("big1,gpu[01-03]", "big1"),
        ("a-1.site,b", "a-1.site"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("n[7]", "n7"),
    ],
)
def test_ranks_of_srun_meet_at_the_steps_first_machine(
    variables: dict[str, str], nodes: str, first: str
) -> None:
    variables |= SRUN | {"SLURM_STEP_NODELIST": nodes}
    assert dist.slurm_rendezvous()[0] == first


def test_all_tasks_of_a_step_choose_the_same_port_and_two_steps_do_not(
    variables: dict[str, str],
) -> None:
    variables |= SRUN
    ports = set()
    for job, step in (("41", "2"), ("41", "3"), ("42", "2"), ("9999999", "0")):
        variables |= {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}
        here = {dist.slurm_rendezvous()[1] for variables["SLURM_PROCID"] in ("0", "3")}
        assert len(here) == 1
        ports |= here
    assert len(ports) == 4 and all(1024 < port < 32768 for port in ports)


def test_srun_gets_the_variables_of_torch(variables: dict[str, str]) -> None:
    variables |= SRUN
    assert dist.has_rendezvous()
    dist.export_ranks()
    assert {k: variables[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu07",
    }  # fmt: skip
    assert int(variables["MASTER_PORT"]) == dist.slurm_rendezvous()[1]


def test_a_users_own_meeting_point_stays(variables: dict[str, str]) -> None:
    variables |= SRUN | {"MASTER_ADDR": "ib-gpu07", "MASTER_PORT": "4711"}
    dist.export_ranks()
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("ib-gpu07", "4711")


@pytest.mark.parametrize(
    "others",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},  # a shell of salloc, in which a single process is started
        {
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "4",
        },  # Open MPI's daemons are tasks of srun, too
        {"MPI_LOCALRANKID": "1", "PMI_RANK": "1"},  # MPICH's as well
    ],
)
def test_what_is_only_inside_a_slurm_job_is_not_taken_for_srun(
    variables: dict[str, str], others: dict[str, str]
) -> None:
    variables |= SRUN | others
    assert not dist.has_rendezvous()


def test_ranks_without_a_meeting_point_do_not_train_each_for_itself(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of mpirun MPI's world is the process alone."""
    alone = SimpleNamespace(Get_size=lambda: 1, Get_rank=lambda: 0, bcast=lambda value: value)
    monkeypatch.setitem(
        sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=alone))
    )
    variables |= {"RANK": "1", "WORLD_SIZE": "2"}
    with pytest.raises(UserError, match="2 ranks and MPI 1; expected.*MASTER_ADDR"):
        dist.meet_over_mpi()


def test_ranks_of_mpirun_meet_where_the_other_machine_reaches_rank_0(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hostname -I`, by which DeepSpeed chooses, may name docker's bridge first."""
    sent: list[Any] = []
    for rank, host in enumerate(["gpu01", "gpu02"]):

        def bcast(value: Any) -> Any:
            sent.append(value)
            return sent[0]

        world = SimpleNamespace(
            Get_size=lambda: 2, Get_rank=lambda rank=rank: rank, bcast=bcast,
            allgather=lambda name: ["gpu01", "gpu02"],
        )  # fmt: skip
        mpi = SimpleNamespace(COMM_WORLD=world, Get_processor_name=lambda host=host: host)
        monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
        monkeypatch.setattr(network, "local_address_to", {"gpu02": "10.0.0.1"}.get)
        monkeypatch.setattr(dist.socket, "gethostbyname", lambda name: "127.0.1.1")
        numbers = {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2"}
        kept = dict(variables)
        variables |= numbers
        dist.meet_over_mpi()
        assert (variables["RANK"], variables["MASTER_ADDR"]) == (str(rank), "10.0.0.1")
        assert int(variables["MASTER_PORT"]) == sent[0][1]
        variables.clear(), variables.update(kept)
    assert sent[1] is None


IFNAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize(
    ("given", "interfaces", "expected"),
    [
        ({"LOCAL_WORLD_SIZE": "8"}, ["lo", "eth0"], (None, None)),
        ({"LOCAL_WORLD_SIZE": "4"}, ["lo", "eth0"], ("eth0", "=eth0")),
        ({"SLURM_STEP_NUM_NODES": "2"}, ["lo", "eth0"], ("eth0", "=eth0")),
        ({"LOCAL_WORLD_SIZE": "4"}, ["lo", "eth0", "ib0"], ("eth0", None)),
        ({"LOCAL_WORLD_SIZE": "4", "GLOO_SOCKET_IFNAME": "x"}, ["eth0"], ("x", "=eth0")),
        ({"LOCAL_WORLD_SIZE": "4", "NCCL_SOCKET_IFNAME": "^x"}, ["eth0"], ("eth0", "^x")),
    ],
)
def test_several_machines_use_the_interface_to_the_meeting_point(
    variables: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    interfaces: list[str],
    expected: tuple[str | None, str | None],
) -> None:
    """One machine needs none, NCCL finds InfiniBand by itself, and a user's own choice wins."""
    for name in IFNAMES:
        variables.pop(name, None)
    variables |= {"WORLD_SIZE": "8", "MASTER_ADDR": "gpu01"} | given
    monkeypatch.setattr(network, "interface_to", {"gpu01": "eth0"}.get)
    monkeypatch.setattr(network, "addresses", lambda: dict(enumerate(interfaces)))
    dist.use_network()
    assert tuple(variables.get(name) for name in IFNAMES) == expected


def test_mpirun_passes_on_what_changes_how_the_ranks_run(tmp_path: Path) -> None:
    """The script itself, with an mpirun that tells what it was given."""
    mpirun = tmp_path / "mpirun"
    mpirun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\necho "at $MASTER_ADDR $MASTER_PORT"\n')
    mpirun.chmod(0o755)
    passed = [
        "NCCL_IB_HCA", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "LD_LIBRARY_PATH", "HF_HOME",
        "HF_HUB_OFFLINE", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_HOME",
        "PYTORCH_CUDA_ALLOC_CONF", "PYTHONPATH", "TOKENIZERS_PARALLELISM", "WANDB_MODE",
        "https_proxy", "OMP_NUM_THREADS",
    ]  # fmt: skip
    own = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOSTS": "gpu01:8,gpu02:8"}
    others = {"HOME": "/root", "SLURM_JOB_ID": "3", "SECRET": "s", "EDITOR": "vi"}
    given = own | others | dict.fromkeys(passed, "a value, with 'marks'")

    def run(environment: dict[str, str]) -> list[str]:
        command = ["bash", str(MPIRUN), "--output_dir", "a b"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    words = run(given)
    after = words.index("python")
    assert words[after : after + 3] == ["python", "launch/train.py", "--data.cache_dir"]
    assert words[-3:-1] == ["--output_dir", "a b"], "as one word"
    names = [word for flag, word in pairwise(words) if flag == "-x"]
    assert set(names) == {"PATH", "MASTER_ADDR", "MASTER_PORT", *passed}
    where, address, port = words[-1].split()
    assert (where, address) == ("at", "gpu01") and 20000 <= int(port) < 32000
    assert run(own | {"MASTER_ADDR": "ib1", "MASTER_PORT": "7"})[-1] == "at ib1 7"


@pytest.mark.parametrize(
    ("hosts", "cores", "threads"),
    [("gpu01:8,gpu02:8", 64, 8), ("gpu01:8,gpu02:8", 4, 1), ("gpu01,gpu02", 16, 16)],
)
def test_mpirun_gives_each_rank_its_share_of_the_cores(
    tmp_path: Path, hosts: str, cores: int, threads: int
) -> None:
    """DeepSpeed's CPU Adam computes with them where the optimizer is offloaded."""
    for name, text in (("mpirun", 'echo "$OMP_NUM_THREADS"'), ("nproc", f"echo {cores}")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOSTS": hosts}
    command = ["bash", str(MPIRUN), "--output_dir", "runs/a"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == threads


def test_the_end_of_the_job_comes_from_a_variable_or_from_squeue(
    variables: dict[str, str], tmp_path: Path
) -> None:
    """squeue prints local time, in a format that a user may have changed."""
    assert dist.job_ends_at() is None
    variables |= {
        "SLURM_JOB_ID": "41",
        "SLURM_TIME_FORMAT": "relative",
        "PATH": f"{tmp_path}:{variables['PATH']}",
    }
    squeue = tmp_path / "squeue"

    def answer(text: str) -> None:
        expected = "--noheader --job 41 --format %estandard"
        squeue.write_text(f'#!/bin/sh\n[ "$*$SLURM_TIME_FORMAT" = "{expected}" ] && {text}\n')
        squeue.chmod(0o755)

    answer("echo 2026-11-24T12:48:55")
    assert dist.job_ends_at() == datetime.datetime(2026, 11, 24, 12, 48, 55).timestamp()
    variables["SLURM_PROCID"] = "1"
    assert dist.job_ends_at() is None, "rank 0 alone asks"
    variables |= {"SLURM_PROCID": "0", "SLURM_JOB_END_TIME": "1700000000"}
    assert dist.job_ends_at() == 1700000000
    del variables["SLURM_JOB_END_TIME"]
    for text in ("echo N/A", "exit 1"):
        answer(text)
        assert dist.job_ends_at() is None


def test_ranks_are_counted_by_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread in turns over two machines, rank 3 would wait for what the first rank of the other
    machine makes."""
    seen = [0, 1, 0, 1, 2]
    monkeypatch.setattr(dist, "gather", lambda value: seen)
    assert dist.ranks_per_machine() == [2, 3]
    seen[:] = [0, 0, 1, 1]
    with pytest.raises(
        UserError, match="rank 3 is number 1 of its machine; expected consecutive ranks.*block"
    ):
        dist.ranks_per_machine()


def test_one_rank_of_each_machine_makes_what_all_need(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines with two ranks: the first of each tokenises. A mistake that it finds is its
    neighbour's, too."""

    class Store(torch_dist.HashStore):
        def wait(self, keys: list[str], timeout: datetime.timedelta) -> None:
            assert self.check(keys), f"rank {dist.rank()} waits for {keys} for ever"

    store = Store()
    monkeypatch.setattr(torch_dist.distributed_c10d, "_get_default_store", lambda: store)
    made: list[int] = []
    variables |= {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1"}
    for rank in range(4):
        variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
        dist.once_per_machine(lambda: made.append(dist.rank()), "data")
    assert made == [0, 2]

    def fail() -> None:
        raise UserError("rows.jsonl:3: broken")

    for rank in range(4):
        variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
        with pytest.raises(UserError, match="^rows.jsonl:3: broken$"):
            dist.once_per_machine(fail, "bad data")


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "rank 5 of 2, and 0 of 2"),
        ({"RANK": "1"}, "rank 1 of 1"),
        ({"WORLD_SIZE": "0"}, "rank 0 of 0"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "2 of 2"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'; expected the number"),
    ],
)
def test_numbers_that_make_no_sense_end_every_command_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    numbers: dict[str, str],
    said: str,
) -> None:
    for name, value in numbers.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: pytest.fail("the command began"))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and said in told and told.count("\n") == 1
