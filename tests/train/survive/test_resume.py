"""The same command goes on; another one is told which key differs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from qwen_ds.disk.write import write_json
from qwen_ds.errors import UserError
from qwen_ds.recipe.loading import LoadedRecipe, write_recipe
from qwen_ds.recipe.options import (
    LoraOptions,
    ModelOptions,
    OptimOptions,
    Recipe,
    ResumeOptions,
    SaveOptions,
)
from qwen_ds.train import job
from qwen_ds.train.survive import resume

ZERO = {"stage": 2, "overlap_comm": True}
DS_JSON: dict[str, Any] = {"zero_optimization": ZERO, "train_batch_size": 128}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_recipe(Recipe(output_dir="elsewhere"), tmp_path / "recipe.yaml")
    write_json(tmp_path / "ds_config.json", DS_JSON)
    return tmp_path


def mistake(run: Path, recipe: Recipe, ds_json: dict[str, Any] = DS_JSON) -> str:
    with pytest.raises(UserError) as error:
        resume.check_same_run(run, recipe, ds_json)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_same_recipe_goes_on_wherever_the_folder_lies(run: Path) -> None:
    recipe = Recipe(output_dir=str(run), dry_run=True, deepspeed="x.json")
    resume.check_same_run(run, recipe, DS_JSON)


def test_a_changed_key_is_named_and_may_be_allowed(run: Path) -> None:
    def changed(*allowed: str) -> Recipe:
        # How many checkpoints stay says nothing about the numbers.
        optim, save = OptimOptions(lr=1e-5), SaveOptions(every_steps=2, keep=7)
        return Recipe(optim=optim, save=save, resume=ResumeOptions(list(allowed)))

    assert "optim.lr was 0.0003 when the run began and is 1e-05 now" in mistake(run, changed())
    assert "--resume.allow_changes save.every_steps" in mistake(run, changed("optim.lr"))
    resume.check_same_run(run, changed("optim", "save.every_steps"), DS_JSON)
    assert "optim.lr" in mistake(run, changed("opti", "save")), "no prefix of a word"


def test_what_is_trained_may_not_change_even_if_it_is_allowed(run: Path) -> None:
    changed = replace(Recipe(), lora=LoraOptions(r=16), resume=ResumeOptions(["lora"]))
    text = mistake(run, changed)
    assert "lora.r was 8" in text and "allow_changes" not in text and "another output_dir" in text
    resume.check_same_run(run, replace(changed, lora=LoraOptions(dropout=0.2)), DS_JSON)


def test_another_stage_is_named_first_and_may_be_allowed(run: Path) -> None:
    other = {"zero_optimization": {"stage": 3, "allgather_bucket_size": 5}, "train_batch_size": 128}
    text = mistake(run, Recipe(), other)
    assert "deepspeed.zero_optimization.stage was 2" in text
    assert "--resume.allow_changes deepspeed," in text
    resume.check_same_run(run, Recipe(resume=ResumeOptions(["deepspeed"])), other)


def test_other_rows_are_refused_unless_allowed() -> None:
    state = {"data_sha256": "a"}
    resume.check_same_data(state, Recipe(), "a")
    with pytest.raises(UserError, match="the rows are not those"):
        resume.check_same_data(state, Recipe(), "b")
    resume.check_same_data(state, Recipe(resume=ResumeOptions(["data"])), "b")


def test_a_recipe_of_an_older_release_lacks_keys_that_have_defaults_now(run: Path) -> None:
    lines = (run / "recipe.yaml").read_text().splitlines()
    (run / "recipe.yaml").write_text("\n".join(line for line in lines if "patience" not in line))
    resume.check_same_run(run, Recipe(), DS_JSON)


def test_what_only_costs_time_may_differ_from_an_older_release(run: Path) -> None:
    timers = {"throughput": {"enabled": False}}
    zero = ZERO | {"overlap_comm": False, "stage3_param_persistence_threshold": 10**6}
    resume.check_same_run(run, Recipe(), DS_JSON | {"zero_optimization": zero, "timers": timers})


def test_an_older_release_left_the_device_open(run: Path) -> None:
    resume.check_same_run(run, replace(Recipe(), device="cpu"), DS_JSON)
    write_recipe(replace(Recipe(), device="cuda"), run / "recipe.yaml")
    assert "device was 'cuda'" in mistake(run, replace(Recipe(), device="cpu"))


def test_a_broken_recipe_is_the_users_to_mend(run: Path) -> None:
    (run / "recipe.yaml").write_text("a: [")
    assert "cannot be read" in mistake(run, Recipe())


def decided_for(folder: Path, model: ModelOptions, monkeypatch: pytest.MonkeyPatch) -> ModelOptions:
    """The model's options of which a start of a run decides on a CPU."""
    decide = Mock(side_effect=InterruptedError)
    monkeypatch.setattr(job.survey, "decide", decide)
    monkeypatch.setattr(job, "log_to_file", lambda folder: None)
    asked = LoadedRecipe(Recipe(output_dir=str(folder), model=model), frozenset())
    with pytest.raises(InterruptedError):
        job._run(asked, torch.device("cpu"), Mock(), "", ExitStack())
    found: ModelOptions = decide.call_args.args[0].recipe.model
    return found


def test_what_was_measured_at_the_start_stays_whatever_a_busy_machine_measures_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user says otherwise, or the run began on a GPU, where nothing is measured."""
    auto, began = ModelOptions(), ModelOptions(dtype="float32", attention="eager")
    assert decided_for(tmp_path, auto, monkeypatch) == auto, "the folder holds no run"
    write_recipe(Recipe(device="cpu", model=began), tmp_path / "recipe.yaml")
    assert decided_for(tmp_path, auto, monkeypatch) == began
    own = ModelOptions(dtype="bfloat16")
    assert decided_for(tmp_path, own, monkeypatch) == replace(own, attention="eager")
    write_recipe(Recipe(device="cuda", model=began), tmp_path / "recipe.yaml")
    assert decided_for(tmp_path, auto, monkeypatch) == auto
