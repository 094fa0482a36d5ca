"""Whole jobs on inputs that changed, and on a folder that another job writes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.jobs import SCRIPT, Job, run_job

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


@pytest.mark.parametrize("what", ["config.json", "the vocabulary", "model.safetensors", "adapter"])
def test_machines_with_different_beginnings_are_told_which_file_it_is(
    small_job: list[str], small_dir: Path, golden: Path, tmp_path: Path, what: str
) -> None:
    """Two machines on one: each rank is the first of its own, and has a disk (a folder) of its own
    on which the same relative paths lead to other files."""
    hosts = [tmp_path / "0", tmp_path / "1"]
    for host in hosts:
        shutil.copytree(small_dir, host / "base")
        shutil.copytree(golden / "lora" / "adapter", host / "adapter")
    changed = hosts[1] / "base"
    if what == "config.json":
        config = json.loads((changed / what).read_text())
        (changed / what).write_text(json.dumps(config | {"layer_norm_epsilon": 1e-5}))
    elif what == "the vocabulary":
        (file,) = changed.glob("*.tiktoken")
        first, second, *rest = file.read_text().splitlines()
        swapped = [f"{a.split()[0]} {b.split()[1]}" for a, b in ((first, second), (second, first))]
        file.write_text("\n".join([*swapped, *rest]) + "\n")
    else:
        file = (
            changed / what if what != "adapter" else hosts[1] / what / "adapter_model.safetensors"
        )
        held = {name: 2 * tensor for name, tensor in load_file(file).items()}
        save_file(held, file, metadata={"format": "pt"})
    script = tmp_path / "host.py"
    script.write_text(
        "import os, runpy\n"
        "os.environ |= {'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1'}\n"
        f"os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    job = with_base(small_job, Path("base"))
    job += ["--lora.init_from", "adapter", "--lora.targets", "c_attn", "c_proj", "w1", "w2"]
    job += ["--lora.r", "4", "--lora.alpha", "8", "--lora.special_rows", "off"]
    ended = Job([*job, "--output_dir", str(tmp_path / "run")], 2, script).wait(mercy=20.0)
    assert ended.codes == [2, 2], ended.err
    said = "adapter_model.safetensors" if what == "adapter" else what
    assert f"{said} is" in ended.err or f"of {said} is" in ended.err, ended.err
    assert "on the machine of rank 1 and" in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "run" / "recipe.yaml").exists()
