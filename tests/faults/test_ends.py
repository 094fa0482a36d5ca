"""The end of every command, by a signal, a full disk or a port in use: one line, the promised exit
code, nothing left behind, and the same command goes on."""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests import jobs
from tests.jobs import ROOT, Job, fork, shared_memory, shared_memory_left

pytestmark = pytest.mark.job


def command(words: Sequence[str], place: str, largest_file: int | None, hold: str | None) -> None:
    """In the child: a command, its output in files; `hold` names a function to stand still in."""
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{place}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
    os.chdir(ROOT)
    import torch

    torch.set_num_threads(1)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if hold is not None:
        module, _, name = hold.rpartition(":")
        __import__(module)
        owner, attribute = sys.modules[module], name
        if "." in name:
            above, attribute = name.split(".")
            owner = vars(owner)[above]

        def stand_still(*arguments: object, **named: object) -> None:
            Path(place, "there").touch()
            time.sleep(100)

        setattr(owner, attribute, stand_still)
    script, *sys.argv[1:] = words
    sys.argv[0] = script
    sys.modules.pop(script, None)  # imported ahead by tests/jobs.py; runpy would warn of it
    run: Callable[..., object] = runpy.run_path if script.endswith(".py") else runpy.run_module
    run(str(ROOT / script) if script.endswith(".py") else script, run_name="__main__")


class Command:
    """A command in a child of its own folder, which holds its stdout and stderr, too."""

    def __init__(
        self,
        words: Sequence[str | Path],
        place: Path,
        largest_file: int | None = None,
        hold: str | None = None,
    ) -> None:
        place.mkdir(exist_ok=True)
        self.place = place
        self.process: ForkServerProcess = fork(
            command, [*map(str, words)], str(place), largest_file, hold
        )

    def until(self, holds: Callable[[], bool]) -> Command:
        ends = time.monotonic() + 90
        while not holds():
            assert time.monotonic() < ends and self.process.is_alive(), self.err
            time.sleep(0.01)
        return self

    def send(self, *numbers: signal.Signals) -> Command:
        assert self.process.pid is not None
        for number in numbers:
            os.kill(self.process.pid, number)
        return self

    def ended(self) -> int | None:
        self.process.join(90)
        self.process.kill()
        return self.process.exitcode

    @property
    def err(self) -> str:
        return (self.place / "err").read_text()


def visible(folder: Path) -> set[str]:
    """Everything below a folder but the child's own output."""
    own = {"out", "err", "there"}
    return {path.name for path in folder.rglob("*")} - own


@pytest.fixture
def words(small_dir: Path, rows_file: Path, golden: Path, tmp_path: Path) -> dict[str, list[str]]:
    """Each command with its outputs in `tmp_path`/made."""
    made, adapter = tmp_path / "made", golden / "lora" / "adapter"
    answers = ["--max_new_tokens", "4", "--batch_size", "4", "--device", "cpu"]
    return {
        "data": [
            "qwen_ds.data", "encode", "--model.path", small_dir, "--data.train", rows_file,
            "--data.cache_dir", made / "cache", "--output", made / "rows.jsonl",
        ],
        "merge": [
            "launch/merge.py", "--base", small_dir, "--adapter", adapter, "--output", made / "model"
        ],
        "predict": [
            "serve.predict", "--model", small_dir, "--input", rows_file,
            "--output", made / "answers.jsonl", *answers,
        ],
        "evaluate": [
            "serve.evaluate", "--model", small_dir, "--data", rows_file,
            "--output_dir", made / "scores", *answers,
        ],
    }  # fmt: skip


# Where each command stands when the signal comes, and what it may leave (resumable, or a lock).
PLACES = {
    "data while rows are tokenised": ("data", "qwen_ds.data.rows.cache:encode_all"),
    "merge while weights stream": ("merge", "qwen_ds.export.build:write_shard"),
    "merge in its proof": ("merge", "qwen_ds.export.merge:verify_merge"),
    "predict while the base is loaded": ("predict", "serve.files.sources:load_engine"),
    "predict while rows are read": ("predict", "serve.files.prediction:PromptReader.survey"),
    "predict in a batch": ("predict", "qwen_ds.decode.engine:sample"),
    "evaluate in a batch": ("evaluate", "qwen_ds.decode.engine:sample"),
    "evaluate in the scores": ("evaluate", "serve.scores.scored:measure"),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("where", PLACES)
def test_a_signal_ends_a_command_with_one_line_and_no_half_output(
    words: dict[str, list[str]], tmp_path: Path, where: str, number: signal.Signals
) -> None:
    name, hold = PLACES[where]
    made = tmp_path / "made"
    made.mkdir()
    shared = shared_memory()
    running = Command(words[name], tmp_path / "child", hold=hold)
    running.until(lambda: (tmp_path / "child" / "there").exists())
    running.send(number, number)
    assert running.ended() == 128 + number
    # Bars are drawn over one line; what is said stands on a line of its own.
    said = [line for line in running.err.replace("\r", "\n").splitlines() if line.strip()]
    assert [line for line in said if "%|" not in line] == [f"stopped by {number.name}"], said
    left = visible(made)
    assert not any("unfinished" in name or "partial" in name for name in left), left
    assert not left & {"model", "answers.jsonl", "rows.jsonl", "metrics.json"}, left
    assert not shared_memory_left(shared)
    again = Command(words[name], tmp_path / "again")
    assert again.ended() == 0, again.err
    assert visible(made) & {"model", "answers.jsonl", "rows.jsonl", "metrics.json"}


def test_a_full_disk_while_predicting_keeps_the_rows_and_goes_on(
    words: dict[str, list[str]], tmp_path: Path
) -> None:
    made = tmp_path / "made"
    calm = Command(words["predict"], tmp_path / "calm")
    assert calm.ended() == 0, calm.err
    whole = (made / "answers.jsonl").read_bytes()
    (made / "answers.jsonl").unlink()
    full = Command(words["predict"], tmp_path / "full", largest_file=len(whole) // 2)
    assert full.ended() == 1, full.err
    last = full.err.replace("\r", "\n").splitlines()[-1]
    assert last.startswith(f"error: {made / 'answers.jsonl'}: File too large; expected room")
    assert "Traceback" not in full.err and not (made / "answers.jsonl").exists()
    again = Command(words["predict"], tmp_path / "again")
    assert (
        again.ended() == 0
        and "rows are there from an interrupted run" in (tmp_path / "again" / "out").read_text()
    )
    assert (made / "answers.jsonl").read_bytes() == whole


def test_a_port_in_use_is_named(
    small_job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(jobs, "free_port", lambda: port)
        # No launcher is there to end the other rank, which waits for the first.
        job = Job([*small_job, "--output_dir", str(tmp_path / "run")], 2).wait(mercy=0.1)
    assert job.codes == [2, -9]
    assert job.err.count("\n") == 1 and f"port {port} of 127.0.0.1 (MASTER_PORT)" in job.err
    assert "--master_port" in job.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 3), (signal.SIGHUP, 3), (signal.SIGINT, 130)]
)
def test_a_signal_to_one_rank_before_the_first_step_ends_all_alike(
    small_job: list[str], tmp_path: Path, number: signal.Signals, code: int, rank: int
) -> None:
    """The ranks have met, and have not begun: rank 0 makes rows, and the other waits for it."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import runpy, sys, time\n"
        "from pathlib import Path\n"
        "from qwen_ds.train import setup\n"
        "def prepare(*arguments):\n"
        f"    Path({str(tmp_path / 'there')!r}).touch(); time.sleep(100)\n"
        "setup.prepare = prepare\n"
        f"runpy.run_path({str(jobs.SCRIPT)!r}, run_name='__main__')\n"
    )
    job = Job([*small_job, "--output_dir", str(tmp_path / "run")], 2, script)
    job.until(lambda: (tmp_path / "there").exists())
    job.send(number, [rank]).wait(60)
    assert job.codes == [code, code], job.err[-2000:]
    assert job.err == f"stopped by {number.name}\n"


def test_a_signal_inside_an_evaluation_saves_at_once(small_job: list[str], tmp_path: Path) -> None:
    """The evaluation is given up and made up for: the same best loss as without the signal."""
    script = tmp_path / "held.py"
    script.write_text(
        "import os, runpy, signal\n"
        "from qwen_ds.train.observe import evaluation\n"
        "batches, seen = evaluation.evaluation_batches, []\n"
        "def held(*arguments):\n"
        "    for i, batch in enumerate(batches(*arguments)):\n"
        "        if i == 1 and len(seen) == 1: os.kill(os.getpid(), signal.SIGTERM)\n"
        "        yield batch\n"
        "    seen.append(1)\n"
        "evaluation.evaluation_batches = held\n"
        f"runpy.run_path({str(jobs.SCRIPT)!r}, run_name='__main__')\n"
    )
    options = [
        *small_job, "--data.eval_fraction", "0.3", "--eval.every_steps", "2", "--optim.max_steps",
        "6", "--eval.samples", "0", "--save.every_steps", "100",
    ]  # fmt: skip
    calm, run = tmp_path / "calm", tmp_path / "run"
    Job([*options, "--output_dir", str(calm)], 1).wait().ok()
    job = Job([*options, "--output_dir", str(run)], 1, script).wait()
    assert job.codes == [3] and "stopped by SIGTERM after step 4, which is saved" in job.out
    state = json.loads((run / "checkpoints" / "step_000004" / "state.json").read_text())
    assert state["evaluated"] is False
    Job([*options, "--output_dir", str(run)], 1).wait().ok()
    losses = [
        [line["eval_loss"] for line in map(json.loads, lines) if "eval_loss" in line]
        for lines in ((folder / "metrics.jsonl").read_text().splitlines() for folder in (calm, run))
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_stop_does_not_wait_until_all_of_the_base_is_compared(
    small_job: list[str], tmp_path: Path
) -> None:
    """The checkpoint says so, and the next start compares it; nothing else is different."""
    script, calm, run = tmp_path / "slow.py", tmp_path / "calm", tmp_path / "run"
    script.write_text(
        "import os, runpy, signal, sys, time\n"
        "from qwen_ds.train import loop\n"
        "from qwen_ds.train.survive import identity\n"
        "train_step, stops_after = loop.train_step, int(sys.argv.pop())\n"
        "def stopping(session, number, *more):\n"
        "    if number == stops_after: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return train_step(session, number, *more)\n"
        "loop.train_step = stopping\n"
        "if stops_after == 6: identity.WholeFiles._sha256 = lambda *_: time.sleep(1000)\n"
        f"runpy.run_path({str(jobs.SCRIPT)!r}, run_name='__main__')\n"
    )
    job = [*small_job, "--output_dir", str(run)]
    Job([*small_job, "--output_dir", str(calm)], 1).wait().ok()
    compared = {}
    for step in (4, 6):
        stopped = Job([*job, str(step)], 1, script).wait(90)
        assert stopped.codes == [3], stopped.out[-2000:] + stopped.err[-2000:]
        state = run / "checkpoints" / f"step_{step:06d}" / "state.json"
        compared[step] = json.loads(state.read_text())["compared"]
    assert compared == {4: True, 6: False}
    last = Job(job, 1).wait().ok()
    assert "step_000006: saved at a stop, before all of the base was compared" in last.out
    state = run / "checkpoints" / "step_000010" / "state.json"
    assert json.loads(state.read_text())["compared"] is True
    results = [(f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (calm, run)]
    assert results[0] == results[1]


def test_a_full_disk_under_the_logs_and_tensorboard_costs_no_step(
    small_job: list[str], tmp_path: Path
) -> None:
    """TensorBoard's own thread gets the error, and hands it to whoever calls next."""
    script, run = tmp_path / "full.py", tmp_path / "run"
    script.write_text(
        "import errno, os, runpy\n"
        "from tensorboard.summary.writer.record_writer import RecordWriter\n"
        "write, written = RecordWriter.write, []\n"
        "def full(self, data):\n"
        "    written.append(data)\n"
        "    if len(written) > 20: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "    write(self, data)\n"
        "RecordWriter.write = full\n"
        f"runpy.run_path({str(jobs.SCRIPT)!r}, run_name='__main__')\n"
    )
    (run / "logs").mkdir(parents=True)
    for rank in range(2):
        (run / "logs" / f"rank_{rank}.log").symlink_to("/dev/full")
    job = Job([*small_job, "--output_dir", str(run)], 2, script).wait().ok()
    assert "Traceback" not in job.err + job.out
    words = "TensorBoard is given up, and the training goes on: No space left on device"
    assert job.out.count(words) == 1
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11)) and (run / "adapter" / "adapter_model.safetensors").is_file()
