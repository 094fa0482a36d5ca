"""Mistakes of the user: one line before training that says what came and what was expected."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen_ds import dist
from qwen_ds.errors import UserError
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.plan.resolve import check, resolve
from qwen_ds.plan.run import Base, Machine
from qwen_ds.recipe.loading import load_recipe, write_recipe
from qwen_ds.recipe.options import Recipe
from qwen_ds.train import setup
from qwen_ds.train.job import run_in_group
from qwen_ds.train.survive import run_folder
from qwen_ds.train.survive.watchdog import Watchdog

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("pytests_log_handlers")


def mistake(arguments: list[str]) -> str:
    with pytest.raises(UserError) as error:
        run_in_group(load_recipe(arguments), torch.device("cpu"), Watchdog(10, launched=False))
    assert "\n" not in str(error.value)
    return str(error.value)


def edited(folder: Path, target: Path, change: Callable[[dict], object]) -> list[str]:
    """A copy of a model folder with another config.json, as the option that names it."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return ["--model.path", str(target)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"content": "a", "summary": "b"}\n{"content": \n', "rows.jsonl:2"),
        ("", "empty"),
        ('{"foo": 1}\n', "foo"),
        ('{"messages": [{"role": "bot", "content": "a"}]}\n', "rows.jsonl:1: role is 'bot'"),
        ('{"instruction": "", "input": "", "output": ""}\n' * 35, "rows.jsonl:1"),
        ('{"content": "a", "summary": "b"}\n' * 35, "identical"),
    ],
)
def test_data_that_cannot_be_trained_on(
    small_job: list[str], tmp_path: Path, text: str, expected: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    out = ["--output_dir", str(tmp_path / "run")]
    assert expected in mistake([*trained_on(file, small_job), *out])


def trained_on(file: Path, job: list[str]) -> list[str]:
    at = job.index("--data.train") + 1
    return [*job[:at], str(file), *job[at + 1 :]]


def test_machines_that_hold_other_rows(
    small_job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a shared disk each machine reads its own copy of the data: rank 2 has another."""
    asked = load_recipe([*small_job, "--output_dir", str(tmp_path / "run")])
    machine = Machine(1, 1, False, 8e9, "")
    run = resolve(asked, machine, Base.read(Path(asked.recipe.model.path)))
    monkeypatch.setattr(dist, "gather", lambda value: [value, value, "another hash"])
    with pytest.raises(
        UserError, match="rank 2 reads other rows than rank 0.*same data files on every machine"
    ):
        setup.load_data(run)


def test_a_missing_data_file(small_job: list[str], tmp_path: Path) -> None:
    message = mistake(
        [*trained_on(tmp_path / "no.jsonl", small_job), "--output_dir", str(tmp_path / "run")]
    )
    assert "no.jsonl" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.update(model_type="llama"), "llama"),
        (lambda c: c.update(vocab_size=300), "300"),
        (lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}), "bf16"),
    ],
)
def test_a_model_that_is_none_of_ours(
    small_job: list[str],
    small_dir: Path,
    tmp_path: Path,
    change: Callable[[dict], object],
    expected: str,
) -> None:
    model = edited(small_dir, tmp_path / "model", change)
    assert expected in mistake([*small_job, *model, "--output_dir", str(tmp_path / "run")])


def test_a_folder_without_a_configuration(small_job: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = mistake(
        [*small_job, "--model.path", str(tmp_path / "empty"), "--output_dir", str(tmp_path / "run")]
    )
    assert "config.json" in message


def test_an_adapter_of_another_base_is_named_by_its_shape(
    small_job: list[str], small_dir: Path, tmp_path: Path, golden: Path
) -> None:
    """golden lora is for hidden size 64; a base of 32 has other shapes."""
    config = QWenConfig.from_pretrained(small_dir)
    config.hidden_size, config.num_attention_heads = 32, 2
    shutil.copytree(small_dir, tmp_path / "model")
    QWenLMHeadModel(config).save_pretrained(tmp_path / "model")
    options = [
        "--model.path",
        str(tmp_path / "model"),
        "--lora.init_from",
        str(golden / "lora" / "adapter"),
    ]
    options += ["--lora.r", "4", "--lora.alpha", "8", "--output_dir", str(tmp_path / "run")]
    message = mistake([*small_job, *options])
    assert "[4, 64]" in message and "[4, 32]" in message and "another base" in message


def test_an_adapter_with_whole_matrices_names_the_way_out(
    small_job: list[str], tmp_path: Path, golden: Path
) -> None:
    """The official finetune.py on a base model saves wte and lm_head whole."""
    options = [
        "--lora.init_from",
        str(golden / "lora_base" / "adapter"),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    message = mistake([*small_job, *options])
    assert "launch/merge.py" in message and "lora.modules_to_save" in message


def test_a_target_without_module(small_job: list[str], tmp_path: Path) -> None:
    message = mistake(
        [*small_job, "--output_dir", str(tmp_path / "run"), "--lora.targets", "q_proj"]
    )
    assert "'q_proj' matches no module" in message


def test_a_run_folder_that_cannot_be_made(small_job: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "expected a folder" in mistake(
        [*small_job, "--output_dir", str(tmp_path / "file" / "run")]
    )


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 2, "overlap_com": True}, "overlap_com"),
        ({"stage": 3, "sub_group_size": "x"}, "sub"),
    ],
)
def test_a_typo_inside_a_section_of_the_deepspeed_json(
    small_job: list[str], tmp_path: Path, zero: dict, expected: str
) -> None:
    """Found before the model is loaded, so the run folder stays free for the corrected command."""
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    run = tmp_path / "run"
    assert expected in mistake(
        [*small_job, "--deepspeed", str(tmp_path / "ds.json"), "--output_dir", str(run)]
    )
    assert not (run / "recipe.yaml").exists()


def test_rows_without_a_model_do_not_train_the_demos() -> None:
    with pytest.raises(UserError, match="model.path is not set"):
        check(load_recipe(["--data.train", "mine.jsonl"]))


def test_a_folder_that_holds_another_run_is_left_alone(
    small_job: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_recipe(replace(Recipe(), seed=1), run / "recipe.yaml")
    (run / "ds_config.json").write_text("{}")
    before = (run / "recipe.yaml").read_text()
    assert "was None when the run began" in mistake([*small_job, "--output_dir", str(run)])
    assert (run / "recipe.yaml").read_text() == before and (
        run / "ds_config.json"
    ).read_text() == "{}"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    assert "no run folder" in mistake([*small_job, "--output_dir", str(tmp_path / "photos")])


def test_a_folder_whose_first_start_was_killed_is_a_new_one(tmp_path: Path) -> None:
    """recipe.yaml comes last: without it nothing has begun."""
    for name in (
        "logs/rank_0.log",
        "ds_config.json",
        "environment.json",
        ".recipe.yaml.unfinished",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    run_folder.claim(tmp_path)
    assert not run_folder.holds_run(tmp_path)


@pytest.mark.job
def test_the_command_itself_prints_one_line_and_exits_with_2(
    small_job: list[str], tmp_path: Path
) -> None:
    typo = tmp_path / "ds.json"
    typo.write_text('{"zero_optimisation": {"stage": 2}}')
    command = [
        sys.executable,
        "launch/train.py",
        *small_job,
        "--deepspeed",
        str(typo),
        "--output_dir",
        str(tmp_path / "r"),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert [line for line in run.stderr.splitlines() if line] == [
        f"error: {typo}: DeepSpeed has no top-level key 'zero_optimisation'; the nearest is "
        "'zero_optimization'"
    ]
