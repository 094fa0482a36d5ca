"""The control flow of gpu.py, by processes that only pretend to measure, and each measurement on a
CPU with a tiny shape, where its figures mean nothing."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import venv
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from tests.benchmarks import (
    gpu,
    gpu_plan,
    gpu_processes,
    gpu_profile,
    gpu_results,
    gpu_step,
    gpu_worker,
)
from tests.benchmarks.gpu_plan import Plan
from tests.jobs import fork

ROOT = Path(__file__).parents[2]
OURS, HALF = "ours, r 64, 4 x 2048", "ours, r 64, 2 x 2048"
PEER = "HF Trainer + peft, r 64, 4 x 2048"
TINY = Plan(
    vocab=512, hidden=32, layers=1, heads=2, intermediate=64, lengths=(64,), length=32, rows=2,
    micro_batches=2, r=4, small_r=2, timed_steps=1, fresh_lengths=2, repeats=1, compiled=False,
)  # fmt: skip

# It notes its number and its variables, and does what the test wants of the measurement.
_PRETENDER = """
import json, os, subprocess, sys, threading, time
from tests.benchmarks.gpu_processes import end_with_parent
line = sys.stdin.readline()
if not line:
    sys.exit()
threading.Thread(target=end_with_parent, daemon=True).start()
question, wanted, journal = json.loads(line), json.loads(sys.argv[1]), sys.argv[2]
name, say = question["name"], lambda answer: print(json.dumps(answer), flush=True)
what = wanted.get(name, "figures")
child = subprocess.Popen(["sleep", "600"]).pid if what == "hang" else None
with open(journal, "a") as out:
    out.write(json.dumps({"name": name, "pids": [os.getpid(), child], "env": dict(os.environ)}))
    out.write("\\n")
figures = {"gb": 21.0, "seconds": 2.0, "tokens_per_second": 18000.0, "mfu": 0.56}
if question["kind"] == "peer":
    figures["tokens_per_second"] = 10000.0
if what == "hang":
    time.sleep(600)
elif what == "killed":
    os.kill(os.getpid(), 9)
elif what == "memory":
    say({"remark": "does not fit the memory", "device": "NVIDIA H200"})
elif what == "error":
    say({"failed": "ValueError: this and that"})
    sys.exit(1)
else:
    say({**figures, "device": wanted.get("device", "NVIDIA H200")})
say({"end": True})
"""


class Card:
    """gpu.py with processes that pretend; `wanted` says how a measurement by this name ends."""

    def __init__(self, folder: Path) -> None:
        self.journal, self.file = folder / "journal.jsonl", folder / "gpu.jsonl"
        (folder / "pretender.py").write_text(_PRETENDER)
        self._command = [sys.executable, str(folder / "pretender.py")]

    def command(self, wanted: dict[str, str]) -> list[str]:
        return [*self._command, json.dumps(wanted), str(self.journal)]

    def run(self, *arguments: str, **wanted: str) -> int:
        named = {k.replace("_", " "): v for k, v in wanted.items()}
        return self.run_with(named, *arguments)

    def run_with(self, wanted: dict[str, str], *arguments: str) -> int:
        return gpu.main(["--json", str(self.file), *arguments], self.command(wanted))

    @property
    def began(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.journal.read_text().splitlines()]

    @property
    def names(self) -> list[str]:
        return [one["name"] for one in self.began]


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Card:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Card(tmp_path)


def row(text: str, name: str) -> list[str]:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in found.split("|")[1:-1]]


def is_gone(pid: int) -> bool:
    """Whether a process has ended; nobody may have asked for its code yet."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def until(is_so: Callable[[], bool], seconds: float = 60) -> bool:
    ends = time.monotonic() + seconds
    while not is_so() and time.monotonic() < ends:
        time.sleep(0.05)
    return is_so()


def test_checks_come_first_then_goals_then_peers_and_the_longest_rows_before_short_ones() -> None:
    first, second = list(gpu_plan.first_part(Plan())), list(gpu_plan.second_part(Plan()))
    assert [m.kind for m in first] == ["attention", "block", "step", "ours", "peer", "ours"]
    assert sum(m.seconds for m in first) < 4 * 60 and gpu.FIRST_MINUTES < 4
    assert (first[3].setting, first[3].kind) == (first[4].setting, "ours"), "side by side"
    kinds = [m.kind for m in second]
    assert "peer" not in kinds[kinds.index("ours") :]
    lengths = [m.setting.length for m in second if m.official]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 12
    names = [m.name for m in [*first, *second]]
    assert len(set(names)) == len(names)


def test_the_plan_is_listed_without_torch_and_without_a_gpu() -> None:
    script = str(ROOT / "tests" / "benchmarks" / "gpu.py")
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['gpu.py', '--list'];"
    code += f"runpy.run_path({script!r}, run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    assert OURS in run.stdout and PEER in run.stdout and "LoRA, 8192" in run.stdout


def test_each_measurement_is_a_process_that_knows_no_launcher(
    card: Card, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID", "PMI_RANK")
    for name in (*launchers, "OMPI_COMM_WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert card.run("--first") == 0
    assert card.names == [m.name for m in gpu_plan.first_part(Plan())]
    assert len({one["pids"][0] for one in card.began}) == len(card.names)
    for one in card.began:
        assert not {"ACCELERATE_USE_FSDP", "OMPI_COMM_WORLD_SIZE", *launchers} & one["env"].keys()
        assert one["env"]["CUDA_VISIBLE_DEVICES"] == "5"  # HF's Trainer would take all
    assert all(is_gone(one["pids"][0]) for one in card.began)


def test_goals_and_the_official_figures_stand_beside_the_measured(
    card: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    assert card.run() == 0
    text = capsys.readouterr().out
    assert row(text, OURS)[5:7] == ["18,000", "15,000"]
    assert row(text, "ours, r 8, 4 x 2048, compiled")[5:] == ["18,000", "18,000", "56.0%", "55%"]
    assert row(text, "LoRA, 8192")[1:5] == ["21.0", "36.6, 24", "2.00", "21.3"]
    assert row(text, "LoRA + embedding and head, 512")[1:5] == ["21.0", "34.1", "2.00", "1.6"]
    assert "is 1.80 times as fast as HF Trainer + peft" in text and "(goal: 1.5)" in text


def test_a_measurement_that_fails_costs_no_other(
    card: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    assert card.run_with({"attention": "killed", "block": "error", OURS: "killed"}, "--first") == 0
    text = capsys.readouterr().out
    assert "- attention: remark ended by SIGKILL" in text
    assert "- block: remark ValueError: this and that" in text
    assert row(text, OURS)[1].startswith("ended by SIGKILL") and row(text, PEER)[5] == "10,000"


def test_what_does_not_fit_is_followed_by_half_of_it(
    card: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    card.run_with({OURS: "memory"}, "--first")
    text = capsys.readouterr().out
    assert row(text, OURS)[1] == gpu_results.OUT_OF_MEMORY
    assert row(text, HALF)[5:7] == ["18,000", "15,000"]
    assert card.names.index(HALF) == card.names.index(OURS) + 1
    card.journal.write_text("")
    card.run_with({OURS: "memory"}, "--first")
    assert card.names == [] and row(capsys.readouterr().out, HALF)[5] == "18,000"


def test_what_hangs_is_ended_with_what_it_started(
    card: Card, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "PATIENCE", 0.2)  # of the block's 35 s
    assert card.run("--only", "block", block="hang") == 0
    assert "- block: remark ended after 7 s" in capsys.readouterr().out
    ((child, grandchild),) = [one["pids"] for one in card.began]
    assert is_gone(child) and until(lambda: is_gone(grandchild))


def test_what_has_no_time_left_is_a_line(card: Card, capsys: pytest.CaptureFixture[str]) -> None:
    assert card.run("--minutes", "0.45") == 0  # enough for what takes less than 27 s
    text = capsys.readouterr().out
    assert row(text, "LoRA, 8192")[1] == row(text, PEER)[1] == gpu_results.OUT_OF_TIME
    assert "attention" in card.names and OURS not in card.names
    card.journal.write_text("")
    assert card.run("--first") == 0  # with the time of another run
    assert OURS in card.names and "attention" not in card.names
    text = capsys.readouterr().out
    assert row(text, PEER)[5] == "10,000" and gpu_results.OUT_OF_TIME not in row(text, OURS)


def test_a_killed_run_keeps_its_figures_and_goes_on_from_there(
    card: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    card.run("--only", "block")
    with card.file.open("a") as out:
        out.write('{"measurement": "step", "line": "st')
    card.journal.write_text("")
    assert card.run("--first") == 0
    assert "block" not in card.names and "step" in card.names
    assert "- block: gb 21" in capsys.readouterr().out
    assert all(json.loads(line) for line in card.file.read_text().splitlines())


@pytest.mark.parametrize("arguments", [["--plan", '{"r": 8}'], []])
def test_figures_of_another_plan_or_device_are_never_mixed(
    card: Card, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    card.run("--only", "block")
    before = card.file.read_bytes()
    assert card.run("--only", "step", *arguments, device="NVIDIA A100") == 2
    assert card.file.read_bytes() == before
    assert "name another file" in capsys.readouterr().err


def test_a_file_of_something_else_is_left_alone(
    card: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    card.file.write_text("a diary\n")
    assert card.run("--first") == 2
    assert card.file.read_text() == "a diary\n" and not card.journal.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_run(card: Card, number: signal.Signals) -> None:
    arguments = ["--json", str(card.file), "--first"]
    command = card.command({"block": "hang"})
    code = f"from tests.benchmarks import gpu; gpu.main({arguments}, {command})"
    run = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert until(lambda: card.journal.exists() and "block" in card.names)
    run.send_signal(number)
    text, _ = run.communicate(timeout=60)
    pids = [pid for one in card.began for pid in one["pids"] if pid]
    assert until(lambda: all(map(is_gone, pids)))
    if number != signal.SIGKILL:  # the figures so far are shown
        assert "- attention: gb 21" in text and run.returncode != 0
    assert gpu.main([*arguments, "--only", "attention"], card.command({})) == 0
    assert card.names.count("attention") == 1


def asked(name: str, plan: Plan = TINY) -> dict[str, Any]:
    (found,) = [m for m in gpu_plan.first_part(plan) if m.name == name]
    return {"plan": asdict(plan), "device": "cpu", **asdict(found)}


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), gpu_processes.END),
        (RuntimeError("CUDA error: out of memory"), gpu_processes.END),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), gpu_processes.END),
        (RuntimeError("an illegal\naddress"), {gpu_processes.FAILED: "RuntimeError: an illegal"}),
    ],
)
def test_a_lack_of_memory_is_a_result_and_any_other_error_is_none(
    error: Exception, last: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object) -> None:
        raise error

    monkeypatch.setitem(gpu_worker.KINDS, "block", measure)
    out = io.StringIO()
    is_well = gpu_worker.answer(asked("block"), out)
    answers = [json.loads(line) for line in out.getvalue().splitlines()]
    assert answers[-1] == last and is_well is (last == gpu_processes.END)
    assert is_well is any(a.get("remark") == gpu_results.OUT_OF_MEMORY for a in answers)


@pytest.mark.parametrize("kind", list(gpu_worker.KINDS))
def test_only_what_is_ours_runs_without_cudnns_attention(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block alone, too: it has no group of ranks, whose start switches that off in training."""
    is_on: list[bool] = []

    def measure(*_: object) -> None:
        is_on.append(torch.backends.cuda.cudnn_sdp_enabled())

    monkeypatch.setitem(gpu_worker.KINDS, kind, measure)
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        assert gpu_worker.answer({**asked("block"), "kind": kind}, io.StringIO())
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert is_on == [kind in ("attention", "peer")]


def test_without_a_gpu_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not gpu_worker.answer({**asked("block"), "device": "cuda"}, out)
    (line,) = out.getvalue().splitlines()
    assert "no NVIDIA GPU" in json.loads(line)[gpu_processes.REFUSED]
    command = [sys.executable, "-c", f"print('noise'); print({line!r}, flush=True)"]
    assert gpu.main(["--json", str(tmp_path / "gpu.jsonl"), "--first"], command) == 2
    shown = capsys.readouterr()
    assert "no NVIDIA GPU" in shown.err and "remark" not in shown.out
    assert "noise" in (tmp_path / "gpu.log").read_text()


def test_a_synchronisation_is_told_by_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def switch(mode: str) -> None:  # as torch warns of itself, once a process
        if mode == "warn":
            warnings.warn("a prototype, detects not all synchronizing operations", stacklevel=1)

    def step() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", switch)
    found = gpu_profile.synchronisations(step, torch.device("cuda"))
    ((place, number),) = found.items()
    assert number == 3 and place.startswith("test_gpu_benchmark.py:") and "warnings.warn" in place


def test_launches_belong_to_a_micro_batch_or_to_the_step() -> None:
    counts = {"cudaLaunchKernel": 5, "cudaLaunchKernelExC": 2, "aten::mm": 9}
    events = [SimpleNamespace(key=key, count=count) for key, count in counts.items()]
    assert gpu_step.calls(events, gpu_step.LAUNCHES) == 7
    assert gpu_step._shares(13, 33) == {"a_micro_batch": 10, "a_step": 3}


def _checks(file: Path) -> None:
    """All checks, one after another: in a process that has everything imported."""
    with file.open("w") as out:
        for name in ("attention", "block", "step"):
            assert gpu_worker.answer(asked(name), out)


@pytest.mark.job
def test_the_checks_run_through_on_a_cpu(tmp_path: Path) -> None:
    process = fork(_checks, tmp_path / "answers")
    process.join()
    assert process.exitcode == 0
    answers = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    by_line = {answer["line"]: answer for answer in answers if "line" in answer}
    assert list(by_line) == [
        "attention", "attention, as torch chooses", "attention, cuDNN off",
        "attention, cuDNN alone", "attention, kernels", "block, eager", "step, synchronisations",
        "step, a micro-batch", "step, launches", "step, calls that wait", "step, ms of the device",
    ]  # fmt: skip
    assert "FLASH_ATTENTION" in by_line["attention"]["priority"]
    assert by_line["attention, cuDNN off"]["lengths"] == TINY.fresh_lengths
    assert by_line["attention, cuDNN off"]["fresh_ms"] > 0
    assert by_line["block, eager"]["mb_a_token"] > 0
    assert by_line["step, ms of the device"]["a_micro_batch"] != 0
    assert by_line["step, synchronisations"]["a_step"] == 0  # no CUDA


# What trains, by the names of packages; what these need comes with them, without extras.
_TRAINS = (
    "torch", "transformers", "accelerate", "peft", "datasets", "deepspeed", "tiktoken",
    "jsonargparse", "docstring-parser", "typeshed-client",
)  # fmt: skip


def needed(names: tuple[str, ...]) -> Iterator[importlib.metadata.Distribution]:
    """The installed packages by these names, and those that they need."""
    seen, waiting = set(), list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name not in seen:
            seen.add(name)
            found = importlib.metadata.distribution(name)
            yield found
            for text in found.requires or ():
                one = Requirement(text)
                if one.marker is None or one.marker.evaluate({"extra": ""}):
                    waiting.append(one.name)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has what trains and nothing else, and a stranger's package called tests."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "tests").mkdir()
    (site / "tests" / "__init__.py").write_text("")
    for package in needed(_TRAINS):
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(package.locate_file(top)))
    return folder / "bin" / "python"


@pytest.mark.job
def test_it_needs_only_what_trains(bare_python: Path, tmp_path: Path) -> None:
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    script, plan = ROOT / "tests" / "benchmarks" / "gpu.py", json.dumps(asdict(TINY))
    names = ["LOCAL_RANK", "RANK"]  # a job of one rank, to HF's Trainer
    command = [bare_python, script, "--first", "--device", "cpu", "--only", "r 4, 2 x 32"]
    run = subprocess.run(
        [*command, "--plan", plan],
        cwd=tmp_path, env=variables | dict.fromkeys(names, "0"), capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    ours, peer = (
        row(run.stdout, "ours, r 4, 2 x 32"),
        row(run.stdout, "HF Trainer + peft, r 4, 2 x 32"),
    )
    log = (tmp_path / "gpu.log").read_text()
    assert float(ours[5].replace(",", "")) > 0, log[-3000:]
    assert float(peer[5].replace(",", "")) > 0, log[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    # The same shape and random tokens: both begin at the loss of a guess, log(512).
    assert losses == pytest.approx([6.24, 6.24], abs=0.1)
    assert not list(tmp_path.glob("*/"))  # HF's output folder
    run = subprocess.run(
        [bare_python, script.with_name("gpu_serve.py"), "--help"],
        cwd=tmp_path, env=variables, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
