"""Training over several machines: two hosts made of this one, each with its own network, name, disk
and processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.jobs import ROOT

pytestmark = pytest.mark.job
BIN = Path(sys.executable).parent
TRAIN = str(ROOT / "launch" / "train.py")
SSHD = "/usr/sbin/sshd"
SLURM = ("munged", "slurmctld", "slurmd", "sbatch")
# What a host does with itself, in its own namespaces: nothing of it is seen outside, and all of it
# goes with them.
HOST = """
mount --make-rprivate /
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount -t tmpfs none /run
mkdir /run/sshd /run/munge
mount --bind {folder}/{name} {folder}/disk
echo disks
read cable
ip address add {address}/24 dev cable
ip link set cable up
ip link set lo up
echo network
while sleep 1; do :; done  # a shell, which also buries what the daemons leave behind
"""


@dataclass
class Host:
    """One host. `disk` is where its own disk is seen from outside; inside it lies where the other's
    lies there, too."""

    name: str
    address: str
    disk: Path
    process: subprocess.Popen[str]

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        pid = self.process.pid
        children = f"--pid=/proc/{pid}/ns/pid_for_children"
        inside = ["nsenter", "--target", str(pid), "--mount", "--net", "--uts", children]
        disk = self.disk.with_name("disk")
        left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        base = {k: v for k, v in os.environ.items() if k not in left_out} | {
            "HOME": str(disk / "home"), "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }  # fmt: skip
        return subprocess.Popen(
            [*inside, "env", "--chdir", str(disk / "work"), *command], env=base | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, command: Sequence[str], **environment: str) -> str:
        """What it prints; it must end well."""
        return finish(self.start(command, **environment))


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-4000:]
    return out


@pytest.fixture
def hosts(tmp_path: Path, rows_file: Path) -> Iterator[list[Host]]:
    """Two hosts that reach each other by name and share the code and the model, but neither data
    nor home nor runs."""
    if os.geteuid() or not all(shutil.which(name) for name in ("unshare", "nsenter", "ip")):
        pytest.skip("making two hosts of one needs root, unshare, nsenter and ip")
    unshare = "unshare --net --mount --uts --pid --fork".split()
    if subprocess.run([*unshare, "true"]).returncode:
        pytest.skip("this machine permits no namespaces")
    places = {"host1": "10.77.0.1", "host2": "10.77.0.2"}
    names = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in places.items())]
    (tmp_path / "disk").mkdir()
    (tmp_path / "hosts").write_text("\n".join(names) + "\n")
    made: list[Host] = []
    try:
        for name, address in places.items():
            disk = tmp_path / name
            (disk / "work").mkdir(parents=True), (disk / "home").mkdir()
            shutil.copy(rows_file, disk / "work" / "rows.jsonl")
            script = HOST.format(name=name, address=address, folder=tmp_path)
            process = subprocess.Popen(
                [*unshare, "--kill-child", "--mount-proc", "sh", "-ec", script],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            made.append(Host(name, address, disk, process))
        assert all(host.says() == "disks" for host in made)
        one, other = (f"cable netns {host.process.pid}" for host in made)
        subprocess.run(f"ip link add {one} type veth peer name {other}".split(), check=True)
        for host in made:
            assert host.process.stdin is not None
            print(file=host.process.stdin, flush=True)
        assert all(host.says() == "network" for host in made)
        yield made
    finally:
        for host in made:
            host.process.kill()  # and with it every process of the host
            host.process.wait()


def options(small_dir: Path, rows: Path, cache: Path | None = None) -> list[str]:
    """Options of a short job; without `cache` the token rows go under the home directory."""
    words = (
        f"--model.path {small_dir} --data.train {rows} --model.dtype float32 --lora.dropout 0 "
        f"--batch.rows_per_step 16 --batch.tokens_per_micro_batch 400 --optim.max_steps 3 "
        f"--optim.lr 1e-3 " + (f"--data.cache_dir {cache}" if cache else "")
    )
    return words.split()


def same_adapter(one: Path, other: Path) -> None:
    """B begins with zeros, so it is what training has changed."""
    a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    assert max(float((a[k] - b[k]).norm() / a[k].norm()) for k in a if "lora_B" in k) < 1e-4


@pytest.fixture(scope="module")
def one_host(
    job: Callable, small_dir: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run folder of the same job on one host: two ranks, ZeRO-2."""
    folder = tmp_path_factory.mktemp("one_host")
    own = [*options(small_dir, rows_file, folder / "cache"), "--output_dir", str(folder / "run")]
    job(own, 2).ok()
    return folder / "run"


def deepspeed(hosts: list[Host], folder: Path, slots: int) -> list[str]:
    """The launcher's command, with so many ranks on each host."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots={slots}\n" for host in hosts))
    return ["deepspeed", "--hostfile", str(hostfile), "--master_addr", hosts[0].name]


def test_two_hosts_train_what_one_does(
    hosts: list[Host], one_host: Path, small_dir: Path, tmp_path: Path
) -> None:
    """The deepspeed command on each of two hosts with two ranks each, ZeRO-3 with hpZ, and no disk
    in common. Rank 0's host has the whole run folder, the other no more than its own logs; each has
    its own cache of token rows."""
    launcher = [*deepspeed(hosts, tmp_path, slots=2), "--no_ssh", "--node_rank"]
    own = "--output_dir run --deepspeed ds_configs/zero3_hpz.json --save.every_steps 2".split()
    script = [TRAIN, *options(small_dir, Path("rows.jsonl")), *own]
    running = [host.start([*launcher, str(i), *script]) for i, host in enumerate(hosts)]
    for process in running:
        finish(process)
    first, second = (host.disk / "work" for host in hosts)
    files = [
        sorted(p.relative_to(w).as_posix() for p in w.rglob("run/**/*") if p.is_file())
        for w in (first, second)
    ]
    assert files[1] == ["run/logs/rank_2.log", "run/logs/rank_3.log"]
    assert "run/adapter/adapter_model.safetensors" in files[0] and files[1][0] not in files[0]
    caches = [
        [p.name for p in (host.disk / "home/.cache/qwen_ds/rows").glob("*.arrow")] for host in hosts
    ]
    assert caches[0] == caches[1] and len(caches[0]) == 1
    stored = json.loads((first / "run" / "ds_config.json").read_text())["zero_optimization"]
    assert (stored["zero_hpz_partition_size"], stored["zero_quantized_weights"]) == (2, False)
    same_adapter(one_host, first / "run")


@pytest.mark.skipif(
    not all(map(shutil.which, ("pdsh", "ssh-keygen", SSHD))), reason="needs pdsh, ssh and sshd"
)
def test_pdsh_starts_both_hosts(
    hosts: list[Host], one_host: Path, small_dir: Path, tmp_path: Path
) -> None:
    """The launcher as its users call it, once, on the first host; sshd runs on both."""
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    settings = f"-oStrictModes=no -oUsePAM=no -oPidFile=none -oAuthorizedKeysFile={key}.pub"
    for host in hosts:
        host.run([SSHD, "-f", "/dev/null", "-h", str(key), *settings.split()])
        # What pdsh does not carry over goes into this file.
        (host.disk / "work" / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    launcher = [*deepspeed(hosts, tmp_path, slots=1), "--no_ssh_check"]
    login = f"-i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    script = [TRAIN, *options(small_dir, Path("rows.jsonl"), Path("cache")), "--output_dir", "run"]
    hosts[0].run([*launcher, *script], PDSH_SSH_ARGS_APPEND=login)
    same_adapter(one_host, hosts[0].disk / "work" / "run")
    assert (hosts[1].disk / "work" / "run" / "logs" / "rank_1.log").exists()


SLURM_CONF = """
ClusterName=test
SlurmctldHost=host1
SlurmUser=root
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
StateSaveLocation={disk}/state
SlurmdSpoolDir={disk}/spool
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
NodeName=host[1-2] CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def start_slurm(hosts: list[Host], folder: Path) -> dict[str, str]:
    """A cluster of both hosts; the variables that its commands need."""
    (folder / "slurm.conf").write_text(SLURM_CONF.format(disk=folder / "disk"))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    conf = {"SLURM_CONF": str(folder / "slurm.conf")}
    munged = (
        f"munged --force --pid-file=/run/munged.pid --key-file={folder}/munge.key "
        f"--log-file={folder}/disk/munge.log --seed-file={folder}/disk/munge.seed"
    )
    for host in hosts:
        for name in ("state", "spool"):
            (host.disk / name).mkdir()
        host.run(munged.split())
    hosts[0].run(["slurmctld", "-L", str(folder / "slurmctld.log")], **conf)
    for host in hosts:
        host.run(["slurmd", "-N", host.name, "-L", str(folder / f"{host.name}.log")], **conf)
    return conf


@pytest.mark.skipif(not all(map(shutil.which, SLURM)), reason="needs Slurm's programs")
def test_slurm_requeues_a_job_that_stops_before_its_time_limit(
    hosts: list[Host], one_host: Path, small_dir: Path, tmp_path: Path
) -> None:
    """The sbatch script on a real Slurm: srun starts a rank on each host, which find each other by
    Slurm's variables. The job's five minutes are less than save.before_minutes, so it stops after
    its first step; with more time, the same job goes on from there to the adapter of a run that was
    never stopped."""
    conf = start_slurm(hosts, tmp_path)
    for host in hosts:
        (host.disk / "work" / "launch").symlink_to(ROOT / "launch")
    size = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 --time=5".split()
    own = [*options(small_dir, Path("rows.jsonl"), Path("cache")), "--output_dir", "run"]
    sbatch = ["sbatch", "--parsable", *size, "launch/cluster/train.sbatch", *own]
    job_id = hosts[0].run(sbatch, **conf).strip()
    squeue = ["squeue", "-h", "-j", job_id, "-o", "%T %r"]

    def wait_for(*states: str) -> None:
        ends = time.monotonic() + 200
        while (state := hosts[0].run(squeue, **conf).strip()) not in states:
            log = work / f"slurm-{job_id}.log"
            assert time.monotonic() < ends, f"{state}\n{log.read_text() if log.exists() else ''}"
            time.sleep(1)

    work = hosts[0].disk / "work"
    wait_for("PENDING BeginTime")
    assert (work / "run" / "latest").read_text().strip() == "step_000001"
    hosts[0].run(["scontrol", "update", f"JobId={job_id}", "TimeLimit=60", "StartTime=now"], **conf)
    wait_for("COMPLETED None", "")
    assert "step 1 of 3" in (work / f"slurm-{job_id}.log").read_text()
    same_adapter(one_host, work / "run")
