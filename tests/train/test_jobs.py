"""Whole training jobs: what a run computes does not depend on how it is spread, and what it leaves
behind is whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.recipe.options import LoraOptions
from qwen_ds.train.lora import add_lora, plain_name
from tests.jobs import free_port

pytestmark = pytest.mark.job
ROOT = Path(__file__).parents[2]


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def token_losses(folder: Path, when: str) -> list[list[float]]:
    """The losses of each token of five rows, at the start or at the end."""
    lines = [json.loads(line) for line in (folder / "token_losses.jsonl").read_text().splitlines()]
    assert [line["when"] for line in lines] == ["start"] * 5 + ["end"] * 5
    assert [line["source"] for line in lines[:5]] == [line["source"] for line in lines[5:]]
    found = [line["losses"] for line in lines if line["when"] == when]
    return [[loss for loss in losses if loss is not None] for losses in found]


def fresh_adapter(small_dir: Path) -> dict[str, Tensor]:
    """The adapter before the first step: random A from the recipe's seed, zero B."""
    base = QWenLMHeadModel.from_pretrained(small_dir)
    model = add_lora(base, LoraOptions(dropout=0.0), base="", seed=42)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {plain_name(name): p.detach().clone() for name, p in trained.items()}


def largest_difference(
    a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]
) -> float:
    """Largest relative Frobenius norm over the tensors, of the change that training made."""
    assert a.keys() == b.keys() == start.keys()
    return max(float((a[k] - b[k]).norm() / (a[k] - start[k]).norm()) for k in a)


def launched(command: list[str]) -> str:
    """What a launcher of the environment prints; the run must end well."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_gradient_does_not_depend_on_the_split(
    job: Callable, small_job: list[str], small_dir: Path, tmp_path: Path
) -> None:
    """ZeRO-0 on one rank, ZeRO-1 to 3 on two, compiled blocks and other micro-batches: one adapter.
    Answers differ in length by a factor of five, so a mean of the ranks' means would be far off.
    tests/plan/test_deepspeed_json.py has ZeRO-1 and 3 without compiling."""
    runs = {
        "zero0": (1, 0, ""),
        "compiled": (2, 1, "--model.compile true"),
        "compiled3": (2, 3, "--model.compile true"),
        "zero2": (2, 2, ""),
        "one_batch": (1, 1, "--batch.tokens_per_micro_batch 9999"),
    }
    for name, (ranks, stage, options) in runs.items():
        options += f" --deepspeed ds_configs/zero{stage}.json --output_dir {tmp_path / name}"
        job([*small_job, *options.split()], ranks).ok()
    start, reference = fresh_adapter(small_dir), adapter(tmp_path / "zero0")
    for name in runs:
        assert largest_difference(reference, adapter(tmp_path / name), start) < 1e-4, name
        for when in ("start", "end"):
            ours, theirs = (token_losses(tmp_path / run, when) for run in (name, "zero0"))
            for losses, wanted in zip(ours, theirs, strict=True):
                assert len(losses) > 10 and losses == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    before, after = (sum(map(sum, token_losses(tmp_path / "zero0", w))) for w in ("start", "end"))
    assert after < before


def test_a_rerun_is_bit_identical(job: Callable, small_job: list[str], tmp_path: Path) -> None:
    """With dropout on and two ranks: adapter and every number that is not a time. The rerun is told
    by what the first run left in its folder. It measures no tokens, which changes nothing."""
    job([*small_job, "--lora.dropout", "0.1", "--output_dir", str(tmp_path / "first")], 2).ok()
    recipe = str(tmp_path / "first" / "recipe.yaml")
    other = ["--log.token_losses_rows", "0", "--output_dir", str(tmp_path / "second")]
    job(["--config", recipe, *other], 2).ok()
    assert (tmp_path / "second" / "token_losses.jsonl").stat().st_size == 0
    first, second = adapter(tmp_path / "first"), adapter(tmp_path / "second")
    assert all(torch.equal(first[k], second[k]) for k in first)
    exact = ("step", "epoch", "loss", "lr", "grad_norm", "padding_share")
    old, new = (
        [[row[k] for k in exact] for row in metrics(tmp_path / name)]
        for name in ("first", "second")
    )
    assert len(old) == 10 and old == new


def test_the_command_of_the_readme_leaves_a_complete_run_folder(
    small_job: list[str], tmp_path: Path
) -> None:
    """The deepspeed launcher itself, ZeRO-3, evaluation and saved steps; stock peft loads the
    adapter."""
    out = tmp_path / "run"
    launcher = f"deepspeed --num_gpus 2 --master_port {free_port()} launch/train.py"
    options = (
        f"--deepspeed ds_configs/zero3.json --data.eval_fraction 0.2 --save.every_steps 4 "
        f"--save.keep 1 --eval.sample_tokens 4 --output_dir {out}"
    )
    stdout = launched([*launcher.split(), *small_job, *options.split()])
    for name in (
        "recipe.yaml", "ds_config.json", "environment.json", "data_report.json", "metrics.jsonl",
        "loss.png", "report.html", "adapter/adapter_config.json",
        "checkpoints/step_000010/adapter/adapter_model.safetensors",
        "checkpoints/step_000010/state.json", "latest", "best", "samples.jsonl",
    ):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    assert list((out / "tensorboard").iterdir())
    # save.keep is 1, and the last one is the best.
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_000010"]
    ds_config, recipe = ((out / name).read_text() for name in ("ds_config.json", "recipe.yaml"))
    assert "auto" not in json.loads(ds_config)["zero_optimization"].values()
    assert "activation_checkpointing: none\n" in recipe, "what auto became"
    assert any("eval_loss" in row for row in metrics(out))
    assert "10 steps in" in stdout and "trainable of" in stdout
    base = QWenLMHeadModel.from_pretrained(small_job[1])
    ids = torch.arange(12)[None]
    before = base(ids).logits.detach().clone()
    after = PeftModel.from_pretrained(base, str(out / "adapter"))(ids).logits
    assert all(t.numel() for t in adapter(out).values())
    assert (after - before).abs().max() > 1e-3


def test_a_tracker_and_deepspeeds_own_monitors_write_beside_each_other(
    job: Callable, small_job: list[str], tmp_path: Path
) -> None:
    """The JSON's monitors get what DeepSpeed gives them; the tracker one run, over a resume."""
    out, sections = tmp_path / "run", ("csv_monitor", "tensorboard")
    config = {
        name: {"enabled": True, "output_path": str(tmp_path / name), "job_name": "mine"}
        for name in sections
    }
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, **config}))
    options = ["--deepspeed", str(file), "--log.trackers", "mlflow", "--output_dir", str(out)]
    options += ["--data.eval_fraction", "0.1", "--eval.samples", "0"]
    job([*small_job, *options, "--optim.max_steps", "2", "--optim.schedule", "linear"]).ok()
    more = ["--optim.max_steps", "4", "--resume.allow_changes", "optim.max_steps"]
    job([*small_job, *options, *more, "--optim.schedule", "linear"]).ok()
    rows = [row for row in metrics(out) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    (losses,) = out.glob("mlruns/*/*/metrics/train/loss")
    points = [line.split()[1:] for line in losses.read_text().splitlines()]
    assert [(int(step), float(loss)) for loss, step in points] == [
        (row["step"], row["loss"]) for row in rows
    ]
    assert (losses.parents[1] / "eval" / "loss").is_file()
    tracked = losses.parents[2]
    assert (tracked / "tags" / "mlflow.runName").read_text() == "run", "the folder's name"
    assert (tracked / "params" / "optim.max_steps").read_text() == "2", "as it began"
    (rates,) = (tmp_path / "csv_monitor" / "mine").glob("*lr*.csv")
    lines = rates.read_text().splitlines()  # DeepSpeed writes the heading in each start
    found = [float(line.split(",")[1]) for line in lines if line != "step,lr"]
    assert found == pytest.approx([row["lr"] for row in rows]) and len(set(found)) > 2
    assert list((tmp_path / "tensorboard" / "mine").iterdir())


@pytest.mark.parametrize("stage", [0, 3])
def test_a_loss_that_is_not_finite_stops_before_the_weights(
    job: Callable, small_job: list[str], tmp_path: Path, stage: int
) -> None:
    """One embedding row is infinite, and one row of the data (line 41) spells it: the run stops in
    the step that draws it, names it, and keeps an adapter that is finite."""
    model = Path(shutil.copytree(small_job[1], tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["transformer.wte.weight"][ord("~")] = float("inf")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = Path(small_job[3]).read_text().splitlines()
    rows[40] = json.dumps({"content": "~", "summary": "x"})
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(rows))
    out = tmp_path / "run"
    options = f"--model.path {model} --deepspeed ds_configs/zero{stage}.json --output_dir {out}"
    words = [str(data) if word == small_job[3] else word for word in small_job]
    result = job([*words, *options.split()], 2)
    assert result.codes[0] == 2
    line = next(text for text in result.err.splitlines() if text.startswith("error:"))
    assert "the loss is not finite" in line and "data.jsonl:41" in line
    (saved,) = (out / "checkpoints").iterdir()
    assert all(t.isfinite().all() for t in adapter(saved).values())


def test_the_first_loss_of_a_bf16_base_is_the_same_at_every_stage(
    job: Callable, small_job: list[str], tmp_path: Path
) -> None:
    """B is zero, so only the frozen base acts."""
    losses = []
    for stage in (0, 2, 3):
        options = f"--deepspeed ds_configs/zero{stage}.json --output_dir {tmp_path / str(stage)}"
        options += " --model.dtype bfloat16 --lora.dropout 0 --optim.max_steps 1"
        job([*small_job, *options.split()]).ok()
        losses.append(metrics(tmp_path / str(stage))[0]["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("kind", ["dora", "float16"])
def test_zero_3_computes_what_zero_2_computes(
    job: Callable, small_job: list[str], tmp_path: Path, kind: str
) -> None:
    """DoRA reads the base's weights in passing, which ZeRO-3 has taken apart; fp16 has DeepSpeed's
    loss scale."""
    options = ["--lora.variant", "dora"] if kind == "dora" else ["--model.dtype", "float16"]
    for stage in (2, 3):
        out = f"--output_dir {tmp_path / str(stage)} --deepspeed ds_configs/zero{stage}.json"
        job([*small_job, *options, *out.split(), "--optim.max_steps", "3"], 2).ok()
    for when in ("start", "end"):
        losses = [sum(map(sum, token_losses(tmp_path / stage, when))) for stage in ("2", "3")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    a, b = adapter(tmp_path / "2"), adapter(tmp_path / "3")
    changed = [k for k in a if "lora_B" in k or "magnitude" in k]
    assert {t.dtype for t in a.values()} == {torch.float32}
    bound = 1e-4 if kind == "dora" else 0.05
    assert max(float((a[k] - b[k]).norm() / a[k].norm()) for k in changed) < bound


def test_eight_ranks_with_fewer_rows_than_ranks_in_the_last_step(
    job: Callable, small_job: list[str], tmp_path: Path
) -> None:
    """100 rows in steps of 16 leave 4 for the seventh: half of the ranks run the dummy row, and all
    stay in step."""
    out = tmp_path / "run"
    options = "--deepspeed ds_configs/zero3.json --optim.epochs 1 --optim.max_steps 7"
    job([*small_job, *options.split(), "--output_dir", str(out)], 8).ok()
    assert [row["step"] for row in metrics(out)] == list(range(1, 8))
    assert all(t.numel() for t in adapter(out).values())


def test_mpirun_finds_its_ranks(small_job: list[str], tmp_path: Path) -> None:
    """Open MPI's variables are read and DeepSpeed's mpi4py discovery fills in the rest."""
    mpirun = f"mpirun --allow-run-as-root --oversubscribe -np 2 {sys.executable} launch/train.py"
    options = ["--optim.max_steps", "2", "--output_dir", str(tmp_path / "run")]
    launched([*mpirun.split(), *small_job, *options])
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"] == 2
