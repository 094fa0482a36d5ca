"""Mistakes of the user: one line before training that says what came and what was expected."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
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
from qwen_ds.train.survive.watchdog import Watchdog
from tests.jobs import SCRIPT, Job

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("pytests_log_handlers")


def mistake(job: list[str], run: Path, *options: str) -> str:
    """The line with which a job that writes into `run` is refused."""
    asked = load_recipe([*job, "--output_dir", str(run), *options])
    with pytest.raises(UserError) as error:
        run_in_group(asked, torch.device("cpu"), Watchdog(10, launched=False))
    assert "\n" not in str(error.value)
    return str(error.value)


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
    assert expected in mistake(trained_on(file, small_job), tmp_path / "run")


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
    told = "rank 2 reads other rows than rank 0.*same data files on every machine"
    with pytest.raises(UserError, match=told):
        setup.load_data(run)


def test_a_missing_data_file(small_job: list[str], tmp_path: Path) -> None:
    job = trained_on(tmp_path / "no.jsonl", small_job)
    assert "no.jsonl" in mistake(job, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"vocab_size": 300}, "300"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "bf16"),
    ],
)
def test_a_model_that_is_none_of_ours(
    small_job: list[str], small_dir: Path, tmp_path: Path, change: dict, expected: str
) -> None:
    model = shutil.copytree(small_dir, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    assert expected in mistake(small_job, tmp_path / "run", "--model.path", str(model))


def test_a_folder_without_a_configuration(small_job: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    options = ["--model.path", str(tmp_path / "empty")]
    assert "config.json" in mistake(small_job, tmp_path / "run", *options)


def test_an_adapter_of_another_base_is_named_by_its_shape(
    small_job: list[str], small_dir: Path, tmp_path: Path, golden: Path
) -> None:
    """golden lora is for hidden size 64; a base of 32 has other shapes."""
    config = QWenConfig.from_pretrained(small_dir)
    config.hidden_size, config.num_attention_heads = 32, 2
    shutil.copytree(small_dir, tmp_path / "model")
    QWenLMHeadModel(config).save_pretrained(tmp_path / "model")
    options = ["--model.path", str(tmp_path / "model"), "--lora.r", "4", "--lora.alpha", "8"]
    options += ["--lora.init_from", str(golden / "lora" / "adapter")]
    message = mistake(small_job, tmp_path / "run", *options)
    assert "[4, 64]" in message and "[4, 32]" in message and "another base" in message


def test_an_adapter_with_whole_matrices_names_the_way_out(
    small_job: list[str], tmp_path: Path, golden: Path
) -> None:
    """The official finetune.py on a base model saves wte and lm_head whole."""
    options = ["--lora.init_from", str(golden / "lora_base" / "adapter")]
    message = mistake(small_job, tmp_path / "run", *options)
    assert "launch/merge.py" in message and "lora.modules_to_save" in message


def test_a_target_without_module(small_job: list[str], tmp_path: Path) -> None:
    message = mistake(small_job, tmp_path / "run", "--lora.targets", "q_proj")
    assert "'q_proj' matches no module" in message


def test_a_run_folder_that_cannot_be_made(small_job: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "expected a folder" in mistake(small_job, tmp_path / "file" / "run")


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
    assert expected in mistake(small_job, run, "--deepspeed", str(tmp_path / "ds.json"))
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
    assert "was None when the run began" in mistake(small_job, run)
    assert (run / "recipe.yaml").read_text() == before
    assert (run / "ds_config.json").read_text() == "{}"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    assert "no run folder" in mistake(small_job, tmp_path / "photos")


@pytest.mark.job
def test_the_command_itself_prints_one_line_and_exits_with_2(
    small_job: list[str], tmp_path: Path
) -> None:
    typo = tmp_path / "ds.json"
    typo.write_text('{"zero_optimisation": {"stage": 2}}')
    options = ["--deepspeed", str(typo), "--output_dir", str(tmp_path / "run")]
    command = [sys.executable, "launch/train.py", *small_job, *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert [line for line in run.stderr.splitlines() if line] == [
        f"error: {typo}: DeepSpeed has no top-level key 'zero_optimisation'; the nearest is "
        "'zero_optimization'"
    ]


@pytest.mark.job
def test_a_home_where_nothing_can_be_made_is_one_line(tmp_path: Path) -> None:
    """Before the log file is open, and without a traceback in its place."""
    script = tmp_path / "home.py"
    script.write_text(
        "import os, runpy\n"
        "os.environ['XDG_CACHE_HOME'] = '/dev/null'\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    ended = Job(["--output_dir", str(tmp_path / "run")], 1, script).wait()
    assert ended.codes == [2] and ended.err.count("\n") == 1, ended.err
    assert "/dev/null/qwen_ds/demo" in ended.err and "Not a directory" in ended.err
