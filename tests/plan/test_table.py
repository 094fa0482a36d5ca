"""The planner's answer: the table, the best row, its command, and what it refuses."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from qwen_ds.recipe.loading import load_recipe

ROOT = Path(__file__).parents[2]


Table = Callable[..., list[str]]


@pytest.fixture
def table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Table:
    """The lines that launch/plan.py prints, given its options."""

    def lines(*options: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *options])
        monkeypatch.chdir(ROOT)
        assert runpy.run_path("launch/plan.py")["main"]() == 0
        return capsys.readouterr().out.splitlines()

    return lines


COLUMN_OF = {"GB": 10, "s/step": 11}  # where "recomputed" is one word
RECIPE = ("--config", "launch/recipes/lora_zero2.yaml")


def test_the_printed_command_is_the_best_row_and_keeps_the_users_options(table: Table) -> None:
    machine = ["--gpus", "16", "--gpu_memory", "80", "--gpu=a100"]
    own = ["--lora.r", "16", "--batch.tokens_per_micro_batch", "512"]
    own += ["--data.train", "a b.json", "c.json"]
    lines = table(*RECIPE, *machine, *own)
    (best,) = [line.split() for line in lines if line.endswith("  best")]
    words = shlex.split(lines[-1])
    assert words[:6] == ["deepspeed", "--num_nodes", "2", "--num_gpus", "8", "launch/train.py"]
    loaded = load_recipe(words[6:])
    assert loaded.recipe.data.train == ["a b.json", "c.json"] and loaded.recipe.lora.r == 16
    assert loaded.recipe.deepspeed == f"ds_configs/zero{best[0]}.json"
    assert loaded.recipe.batch.tokens_per_micro_batch == int(best[1])
    assert loaded.recipe.model.activation_checkpointing == best[2] == "none"


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_times_of_a_gpu_that_emulates_bf16_are_said_to_be_float16_s(
    table: Table, dtype: str
) -> None:
    text = "\n".join(table(*RECIPE, "--gpu", "v100", "--model.dtype", dtype))
    emulates = ("these GPUs emulate it" in text, "Times are those of float16" in text)
    assert emulates == ((True, True) if dtype == "auto" else (False, False))


def test_the_best_row_is_the_fastest_that_fits(table: Table) -> None:
    """20 GB hold the whole 7B in bf16 and not a row of 8,192 tokens beside it; with ZeRO-3 they
    do."""
    machine = ["--gpu", "rtx4090", "--gpu_memory", "20"]
    rows = ["--longest_row", "8192", "--row_tokens", "1500"]
    lines = table(*RECIPE, *machine, *rows)
    rows = [line.split() for line in lines if re.match(r"   \d  ", line)]
    fits = [row for row in rows if row[-1] != "fit"]
    assert {row[0] for row in fits} == {"3"} and {row[0] for row in rows} == {"0", "1", "2", "3"}
    seconds, gigabytes = COLUMN_OF["s/step"], COLUMN_OF["GB"]
    (best,) = [row for row in rows if row[-1] == "best"]
    assert float(best[seconds]) <= 1.02 * min(float(row[seconds]) for row in fits)
    assert all((float(row[gigabytes]) <= 0.92 * 20) == (row in fits) for row in rows)


@pytest.mark.parametrize("recipe", ["lora_zero2", "lora_official", "lora_zero3", "full_zero3"])
def test_the_recipes_for_80_gb_fit_with_their_micro_batches_and_no_sliver_is_recommended(
    recipe: str, table: Table
) -> None:
    """Rows of 800 tokens fill micro-batches of 8,192, which fit at the recipe's own stage. An
    adapter's micro-batches are levelled below stage 3, and those of 4,096 are then the same."""
    words = ["--config", f"launch/recipes/{recipe}.yaml", "--row_tokens", "800"]
    rows = [line.split() for line in table(*words, "--longest_row", "2048") if line[:3] == "   "]
    stage = recipe[-1].replace("l", "2")
    own = [row for row in rows if row[0] == stage and int(row[1]) <= 8192]
    largest = max(own, key=lambda row: int(row[1]))
    assert int(largest[1]) == (8192 if stage == "3" else 4096) and largest[-1] != "fit"
    (best,) = [row for row in rows if row[-1] == "best"]
    assert int(best[1]) >= 4096


def test_what_fits_nowhere_is_said(table: Table) -> None:
    lines = table(*RECIPE, "--gpus", "1", "--gpu_memory", "12")
    assert lines[-1].startswith("Nothing fits")
    assert not any(line.startswith("deepspeed") for line in lines)


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
def test_a_mistake_is_one_line(options: list[str], expected: str, table: Table) -> None:
    with pytest.raises(UserError, match=expected) as error:
        table(*RECIPE, *options)
    assert "\n" not in str(error.value)
