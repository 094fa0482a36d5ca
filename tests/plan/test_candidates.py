"""The planner and automatic activation checkpointing: what they choose, what they say, and what they refuse."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_ds import dist
from qwen_ds.data.batches import Part, StepSampler
from qwen_ds.errors import UserError
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.plan import candidates as plan
from qwen_ds.plan.activations import Saving, recomputed_blocks
from qwen_ds.plan.candidates import Workload
from qwen_ds.plan.deepspeed_json import read_json, resolve
from qwen_ds.plan.gpus import gpu_named
from qwen_ds.plan.memory import peak_memory
from qwen_ds.plan.shape import Shape
from qwen_ds.plan.traffic import Collective, Links, Zero, traffic
from qwen_ds.recipe.loading import load_recipe
from qwen_ds.recipe.options import BatchOptions, LoraOptions, ModelOptions, Recipe
from qwen_ds.train import setup
from qwen_ds.train.run import run_in_group
from qwen_ds.train.survive import resume
from qwen_ds.train.survive.watchdog import Watchdog

ROOT = Path(__file__).parents[2]
QWEN_7B = Shape.of(QWenConfig())
BF16 = ModelOptions(dtype="bfloat16")
HOW = Saving.of(Recipe(model=BF16, lora=LoraOptions(special_rows="off")), on_gpu=True)


pytestmark = pytest.mark.usefixtures("pytests_log_handlers")


class Rows:
    """Token rows of which only the lengths are asked for."""

    pad_id = 0

    def __init__(self, lens: Sequence[int] | np.ndarray) -> None:
        self.lens = np.asarray(lens, np.int32)
        self.parts = (Part(len(self.lens), 1.0),)

    def __len__(self) -> int:
        return len(self.lens)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(self.lens[row], np.int32), np.zeros(self.lens[row], np.int32)


def chosen(small_dir: Path, lens: list[int], **model: object) -> tuple[str | int, str]:
    options = ModelOptions(path=str(small_dir), dtype="bfloat16", **model)  # type: ignore[arg-type]
    recipe = Recipe(model=options)
    resolved = resolve(read_json(None), recipe, frozenset(), hidden_size=64, world=1)
    rows = Rows(lens)
    data = setup.Data(rows, None, StepSampler(rows, 128, 0, 1, 0, 2048))  # type: ignore[arg-type]
    recipe, why = setup.choose_recomputation(recipe, resolved, data, torch.device("cpu"))
    return recipe.model.activation_checkpointing, why


def test_auto_takes_the_least_recomputation_that_fits(small_dir: Path) -> None:
    """From none to all blocks as the memory shrinks; each choice fits, and the next lesser one does not."""
    lens = [400] * 32
    recipe = Recipe(model=BF16)
    shape, how = Shape.of(QWenConfig.from_pretrained(small_dir)), Saving.of(recipe, on_gpu=False)
    batch = plan.largest_micro_batch(np.array(lens), BatchOptions(), 1)
    zero = Zero.of(
        resolve(read_json(None), recipe, frozenset(), hidden_size=64, world=1).engine_json, 1
    )
    peaks = {
        every: peak_memory(shape, how, zero, batch, every).total
        for every in plan.recomputations(shape.layers)
    }
    assert list(peaks) == [0, 3, 2, 1] and list(peaks.values()) == sorted(
        peaks.values(), reverse=True
    )
    for every, peak in peaks.items():
        enough = peak / (1 - plan.MARGIN) / 1e9
        assert chosen(small_dir, lens, memory_gb=1.0001 * enough)[0] == plan.in_recipe(every)
        assert (
            chosen(small_dir, lens, memory_gb=0.9999 * enough)[0] != plan.in_recipe(every)
            or every == 1
        )


def test_auto_says_what_it_chose_and_why(small_dir: Path) -> None:
    choice, why = chosen(small_dir, [30] * 8)
    assert choice == "none" and why.startswith(
        "activation checkpointing auto is none: predicted peak 0.0"
    )
    assert "of free memory for each rank" in why
    choice, why = chosen(small_dir, [30] * 8, memory_gb=1e-4)
    assert choice == "all" and why.endswith("GB that model.memory_gb allows, more than there is")
    assert chosen(small_dir, [30] * 8, activation_checkpointing=2) == (2, "")


def test_all_ranks_take_the_choice_of_the_one_with_the_least_memory(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "gather", lambda value: [value, 100000.0])
    assert chosen(small_dir, [30] * 8)[0] == "all"


def test_the_start_screen_and_the_recipe_that_goes_on_hold_a_definite_value(
    small_job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--output_dir", str(tmp_path / "run"), "--dry_run", "true", "--model.memory_gb", "1"]
    run_in_group(
        load_recipe([*small_job, *options]), torch.device("cpu"), Watchdog(10, launched=False)
    )
    assert (
        "memory    activation checkpointing auto is none: predicted peak" in capsys.readouterr().out
    )


def test_a_run_is_taken_up_whatever_auto_chooses_then() -> None:
    """The memory that is free may have changed, the numbers have not."""
    models = (
        ModelOptions(activation_checkpointing="none"),
        ModelOptions(activation_checkpointing=2, memory_gb=10.0),
    )
    first, second = (resume.identity(Recipe(model=model), {}, "") for model in models)
    assert first == second != resume.identity(Recipe(seed=1), {}, "")


def test_no_micro_batch_of_training_exceeds_the_one_that_is_planned_for() -> None:
    rng = np.random.default_rng(0)
    for world, rows, budget in ((1, 16, 300), (8, 128, 2048), (3, 7, 64), (4, 64, 10**6)):
        lens = rng.integers(2, 300, 200).astype(np.int32)
        planned = plan.largest_micro_batch(lens, BatchOptions(rows, budget), world)
        sampler = StepSampler(Rows(lens), rows, 0, world, 0, budget)
        largest = max(
            len(part) * int(lens[part].max())
            for step in range(sampler.steps_per_epoch)
            for parts in sampler._plan(0, step)
            for part in parts
            if len(part)
        )
        assert largest <= planned.tokens


def table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str
) -> list[str]:
    spec = importlib.util.spec_from_file_location("launch_plan", ROOT / "launch" / "plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["plan.py", *options])
    monkeypatch.chdir(ROOT)
    assert module.main() == 0
    return capsys.readouterr().out.splitlines()


COLUMN_OF = {"GB": 10, "s/step": 11}  # where "recomputed" is one word
RECIPE = ("--config", "launch/recipes/lora_zero2.yaml")


def test_the_printed_command_is_the_best_row_and_keeps_the_users_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = table(
        capsys, monkeypatch, *RECIPE, "--gpus", "16", "--gpu_memory", "80", "--gpu=a100", "--lora.r", "16",
        "--batch.tokens_per_micro_batch", "512", "--data.train", "a b.json", "c.json",
    )  # fmt: skip
    (best,) = [line.split() for line in lines if line.endswith("  best")]
    words = shlex.split(lines[-1])
    assert words[:6] == ["deepspeed", "--num_nodes", "2", "--num_gpus", "8", "launch/train.py"]
    loaded = load_recipe(words[6:])
    assert loaded.recipe.data.train == ["a b.json", "c.json"] and loaded.recipe.lora.r == 16
    assert loaded.recipe.deepspeed == f"ds_configs/zero{best[0]}.json"
    assert loaded.recipe.batch.tokens_per_micro_batch == int(best[1])
    assert loaded.recipe.model.activation_checkpointing == best[2] == "none"


def test_the_best_row_is_the_fastest_that_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 GB hold the whole 7B in bf16 and not a row of 8,192 tokens beside it; with ZeRO-3 they do."""
    lines = table(
        capsys, monkeypatch, *RECIPE, "--gpu", "rtx4090", "--gpu_memory", "20", "--longest_row", "8192",
        "--row_tokens", "1500",
    )  # fmt: skip
    rows = [line.split() for line in lines if re.match(r"   \d  ", line)]
    fits = [row for row in rows if row[-1] != "fit"]
    assert {row[0] for row in fits} == {"3"} and {row[0] for row in rows} == {"0", "1", "2", "3"}
    seconds, gigabytes = COLUMN_OF["s/step"], COLUMN_OF["GB"]
    (best,) = [row for row in rows if row[-1] == "best"]
    assert float(best[seconds]) <= 1.02 * min(float(row[seconds]) for row in fits)
    assert all((float(row[gigabytes]) <= 0.92 * 20) == (row in fits) for row in rows)


def test_what_fits_nowhere_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = table(capsys, monkeypatch, *RECIPE, "--gpus", "1", "--gpu_memory", "12")
    assert lines[-1].startswith("Nothing fits") and not any(
        line.startswith("deepspeed") for line in lines
    )


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--gpu", "abacus"], "gpu is 'abacus'; expected one of b200, h200"),
        (["--gpus", "0"], "gpus is 0"),
        (["--learnt_share", "2"], "learnt_share is 2"),
        (["--lora.variant", "dora"], "dora"),
        (["--gpu_memori", "80"], "the nearest is gpu_memory"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match=expected) as error:
        table(capsys, monkeypatch, *RECIPE, *options)
    assert "\n" not in str(error.value)


def test_time_grows_linearly_with_the_tokens() -> None:
    gpu = gpu_named("h100")
    assert gpu is not None
    links, zero = Links(8, gpu.link), Zero(2, 8, 4096**2, overlap=True)

    def seconds(rows: int) -> float:
        workload = Workload.like(rows, 157, 0.66, 508)
        work = plan.split(workload, 8, 2048)
        return plan.step_seconds(QWEN_7B, HOW, zero, links, gpu, work, 0.66, 0).total

    assert seconds(2048) / seconds(512) == pytest.approx(4, rel=0.05)


def test_collectives_move_what_ring_algorithms_move() -> None:
    """Hand-made: 100 bytes over 4 ranks, 75 received at a gather, 150 at an all-reduce; and the slower link counts."""
    assert (
        Collective("gather", 100, 1, 4).moved == 75
        and Collective("reduce", 100, 1, 4, rounds=2).moved == 150
    )
    links = Links(per_machine=4, inside=100e9, between=10e9)
    one, two = (links.seconds(Collective("gather", 1e12, 1, n)) for n in (4, 8))
    assert one == pytest.approx(7.5, rel=1e-4)  # 3/4 of it over 100 GB/s
    assert two == pytest.approx(
        12.5, rel=1e-4
    )  # half of it comes from the other machine, over 4 adapters


def test_zero_3_gathers_the_weights_twice_a_micro_batch_and_hpz_within_the_machine() -> None:
    zero = Zero(3, 16, 4096**2, small=40960)
    load = plan.load(QWEN_7B, HOW, zero, micro_batches=5)
    blocks, ends = 2 * QWEN_7B.block_matrices, 2 * 2 * QWEN_7B.head
    far, gradients, _ = traffic(zero, load)
    assert far.size == pytest.approx(5 * (2 * blocks + ends), rel=0.01) and far.ranks == 16
    assert gradients.size == 5 * 4 * 10_158_080
    adapter, near, *_ = traffic(replace(zero, hpz=8), load)
    assert (adapter.ranks, near.ranks) == (16, 8) and adapter.size < 4 * 10_158_080
    assert adapter.size + near.size == pytest.approx(far.size)
    full = plan.load(
        QWEN_7B, Saving.of(Recipe(method="full", model=BF16), on_gpu=True), zero, micro_batches=5
    )
    assert traffic(replace(zero, hpz=8), full)[0].size == pytest.approx(blocks + ends)
    assert traffic(Zero(3, 1), load) == []


def test_zero_2_averages_after_each_micro_batch_and_zero_1_once() -> None:
    load = plan.load(QWEN_7B, HOW, Zero(1, 8), micro_batches=5)
    once, often = (traffic(Zero(stage, 8), load)[0] for stage in (1, 2))
    assert (once.size, often.size) == (
        4 * 10_158_080,
        5 * 4 * 10_158_080,
    ) and often.count == 5 * once.count


def test_recomputations_go_from_none_to_all_without_repeating_a_count() -> None:
    counts = [recomputed_blocks(32, every) for every in plan.recomputations(32)]
    assert counts == sorted(set(counts)) and counts[0] == 0 and counts[-1] == 32
