"""Whole jobs on inputs that changed, and on a folder that another job writes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.jobs import Job, run_job

pytestmark = pytest.mark.job


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def with_base(job: list[str], base: Path) -> list[str]:
    at = job.index("--model.path") + 1
    return [*job[:at], str(base), *job[at + 1 :]]


def test_a_run_is_not_resumed_on_another_base(
    small_job: list[str], small_dir: Path, tmp_path: Path
) -> None:
    """Nor on one whose change only the whole hash sees; with the old base it goes on."""
    base, run = Path(shutil.copytree(small_dir, tmp_path / "base")), tmp_path / "run"
    file, calm = base / "model.safetensors", tmp_path / "calm"
    job = [*with_base(small_job, base), "--save.every_steps", "2"]
    run_job([*job, "--output_dir", str(calm)]).ok()
    Job([*job, "--output_dir", str(run)], 1).until(
        lambda: (run / "checkpoints" / "step_000002").is_dir()
    ).send(signal.SIGKILL).wait()
    kept, files = file.read_bytes(), sorted(run.rglob("checkpoints/*/*"))
    save_file({k: 2 * v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    refused = run_job([*job, "--output_dir", str(run)], 2)
    assert refused.codes == [2, 2] and "base: model.safetensors was sha256" in refused.err
    assert sorted(run.rglob("checkpoints/*/*")) == files

    file.write_bytes(kept)
    identity = run / "identity.json"
    state = next(iter(sorted((run / "checkpoints").glob("*/state.json"), reverse=True)))
    for path in (identity, state):  # as if a byte had changed that the quick hash does not see
        content = json.loads(path.read_text())
        began = content if path == identity else content["began_with"]
        began["whole"] = {"base/model.safetensors": "0" * 64}
        path.write_text(json.dumps(content))
    refused = run_job([*job, "--output_dir", str(run)])
    assert refused.codes == [2] and "nothing was saved since this start" in refused.err
    assert sorted(run.rglob("checkpoints/*/*")) == files

    for path in (identity, state):
        content = json.loads(path.read_text())
        (content if path == identity else content["began_with"])["whole"] = {}
        path.write_text(json.dumps(content))
    run_job([*job, "--output_dir", str(run)]).ok()
    assert steps(run) == steps(calm)
    results = [load_file(f / "adapter" / "adapter_model.safetensors") for f in (calm, run)]
    assert all(bool((results[0][name] == results[1][name]).all()) for name in results[0])
    whole = json.loads(identity.read_text())["whole"]
    assert set(whole) <= {"base/model.safetensors"}


def test_the_second_of_two_runs_on_a_folder_is_refused(
    small_job: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = [*small_job, "--optim.max_steps", "60", "--optim.epochs", "99", "--output_dir", str(run)]
    first = Job(job, 2).until(lambda: (run / ".lock").exists())
    second = run_job(job, 2)
    assert second.codes == [2, 2], second.err
    told = f"output_dir {run} is being written by process {first.ranks[0].pid} on "
    assert second.err.count(told) == 2 and "Traceback" not in second.err
    first.send(signal.SIGKILL).wait()
    third = Job(job, 1).wait().ok()
    assert steps(run) == list(range(1, 61)) and "is being written" not in third.err
    assert not (run / ".lock").exists()
