"""From asked to decided: what is refused and when, what is chosen and why, one Run for all."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from qwen_ds.data.buckets import bucketed
from qwen_ds.data.windows import level_budget
from qwen_ds.errors import UserError
from qwen_ds.model.family import QWEN
from qwen_ds.plan.candidates import candidates
from qwen_ds.plan.recomputation import decide_recomputation, fit_of, from_recipe
from qwen_ds.plan.resolve import resolve
from qwen_ds.plan.run import Base, Machine, Run
from qwen_ds.plan.seconds import Work, step_seconds
from qwen_ds.plan.sources import find_sources
from qwen_ds.plan.step import largest_micro_batch, split
from qwen_ds.plan.table import PlanOptions, machine_of, plan
from qwen_ds.recipe.loading import load_recipe, to_dict

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
CPU = Machine(1, 1, False, 8e9, "of free memory for each rank")
GPU = replace(CPU, on_gpu=True, memory=80e9, memory_source="that are free on the GPU")
OLD_GPU = replace(GPU, fast_bf16=False)


class Watched(NamedTuple):
    """What a command said, imported and opened."""

    code: int
    out: str
    errors: str
    packages: list[str]
    opened: list[str]


def decided(small_dir: Path, *options: str, machine: Machine = CPU) -> Run:
    asked = load_recipe(["--model.path", str(small_dir), *options])
    return resolve(asked, machine, Base.read(small_dir), rows=False)


MISTAKES = {
    "a model": (["--model.path", "/no/model"], "/no/model: no such folder; expected a checkpoint"),
    "a target": (["--lora.targets", "c_atn"], "lora.targets: 'c_atn' matches no module"),
    "no target": (["--lora.targets=[]"], "lora.targets: nothing matches no module"),
    "a module": (["--lora.modules_to_save", "wpe"], "lora.modules_to_save: 'wpe' came"),
    "recomputation": (["--model.activation_checkpointing", "-3"], "expected auto, none or all"),
    "an adapter": (["--lora.init_from", "/nonexistent"], "/nonexistent: no such folder"),
    "a reader": (["--data.format", "alpaka"], "data.format is 'alpaka'"),
    "a column": (["--data.columns", '{"instructio": "q"}'], "data.columns has the key"),
    "a file": (["--data.eval", "absent.jsonl"], "absent.jsonl: no such file or folder"),
    "weights": (["--data.weights", "1", "2"], "data.weights has 2 numbers and data.train 1"),
    "a JSON": (["--deepspeed", "absent.json"], "deepspeed: no such file: absent.json"),
    "a bound": (["--data.max_tokens", "3"], "data.max_tokens is 3; expected at least 16"),
    "an allowed change": (["--resume.allow_changes", "optm"], "'optm' is no key or section"),
    "a tracker": (
        ["--log.trackers", "wandb", "wand"],
        "expected a list, each of it swanlab, wandb",
    ),
    "a project": (
        ["--log.trackers", "swanlab", "--log.project", "my project"],
        "log.project is 'my project'; swanlab expected up to 100 letters, digits and _-+.",
    ),
    "an option": (["--lora.rnk", "4"], "unknown option lora.rnk"),
}

# Runs a command again and again in one process: torch alone takes seconds to import.
WATCHED = """
import contextlib, io, json, runpy, sys
script, found, opened = sys.argv[1], {}, []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
for name, options in json.load(sys.stdin).items():
    opened.clear()
    sys.argv = [script, *options]
    code, out, errors = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
    packages = sorted({module.split(".")[0] for module in sys.modules})
    found[name] = [code, out.getvalue(), errors.getvalue(), packages, list(opened)]
print(json.dumps(found))
"""


def watched(script: str, options: dict[str, list[str]]) -> dict[str, Watched]:
    """What a command did with each of these options."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, script], input=json.dumps(options), cwd=ROOT,
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return {name: Watched(*found) for name, found in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def refused(
    small_dir: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Watched]:
    """launch/train.py with each of MISTAKES."""
    run = tmp_path_factory.mktemp("refused") / "run"
    command = ["--model.path", str(small_dir), "--data.train", str(rows_file)]
    command += ["--output_dir", str(run)]
    found = watched("launch/train.py", {name: command + MISTAKES[name][0] for name in MISTAKES})
    assert not run.exists()
    return found


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_typo_is_refused_before_deepspeed_is_imported_or_a_row_is_read(
    mistake: str, refused: dict[str, Watched], rows_file: Path
) -> None:
    """So it costs seconds, however many rows there are and however large the base is."""
    found = refused[mistake]
    assert found.code == 2 and MISTAKES[mistake][1] in found.errors, found.errors
    assert found.errors.count("\n") == 1
    assert not {"deepspeed", "wandb", "swanlab"} & {*found.packages}
    assert str(rows_file) not in found.opened
    assert not [name for name in found.opened if name.endswith((".safetensors", ".bin"))]


def test_a_tracker_without_its_package_is_refused_with_the_way_to_get_it(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    missing = ("mlflow", "trackio")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else real(name)
    )
    decided(small_dir, "--log.trackers", "wandb", "swanlab")
    for name, package in (("mlflow", "mlflow-skinny"), ("trackio", "trackio")):
        with pytest.raises(UserError) as found:
            decided(small_dir, "--log.trackers", "wandb", name)
        assert str(found.value) == (
            f"log.trackers: {name} came, whose package is not installed; expected "
            f"`pip install {package}`, or no {name}"
        )


def test_the_planner_imports_neither_deepspeed_nor_peft() -> None:
    found = watched("launch/plan.py", {"plan": ["--gpu", "a100"]})["plan"]
    assert not {"deepspeed", "peft"} & set(found.packages)
    assert found.out.startswith("7.72 billion parameters") and not found.errors


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_planner_plans_the_run_that_training_makes(
    recipe: Path, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same recipe, JSON, notes and figures, at the stage and micro-batch that the recipe asks
    for."""
    monkeypatch.chdir(ROOT)
    asked = load_recipe(["--config", str(recipe)])
    base = Base.read(small_dir)
    if "model.path" in asked.set_keys:  # the demo's own
        asked, model = find_sources(asked, weights=False)
        base = Base.of(model)
    options = PlanOptions(gpus=8, gpu="a100")
    planned = plan(asked, options, base)
    run = resolve(asked, machine_of(options, planned.cluster.gpu), base, rows=False)
    (same,) = [each for each in planned.runs if each.deepspeed.stage == run.deepspeed.stage]
    # The same JSON was resolved in both; the planner names it where the recipe does not.
    assert to_dict(same.recipe) == to_dict(run.recipe)
    assert same.deepspeed.engine_json == run.deepspeed.engine_json and same.notes == run.notes
    longest, rows = planned.workload.longest, len(planned.workload.lens)
    lens, budget = bucketed(planned.workload.lens), run.recipe.batch.tokens_per_micro_batch
    if run.levels_micro_batches:
        budget = level_budget([lens], 8, budget)
    trained = decide_recomputation(run, longest, rows, budget)
    every = from_recipe(trained.recipe.model.activation_checkpointing)
    options = replace(run.recipe.batch, tokens_per_micro_batch=budget)
    expected = fit_of(run, largest_micro_batch(longest, rows, budget, 8), every)
    listed = candidates([same], planned.cluster, planned.workload)
    # A budget that cuts the rows as a smaller one does has no row of its own.
    row = max((c for c in listed if c.budget <= budget), key=lambda c: c.budget)
    assert row.fit == expected
    parts = split(planned.workload, 8, options)
    compiled = trained.recipe.model.compile is True
    work = Work(trained.shape, trained.saving, trained.zero, compiled)
    share = planned.workload.target_share
    assert row.seconds == step_seconds(work, planned.cluster, parts, share, every)


def test_no_auto_is_left_but_what_depends_on_the_rows(small_dir: Path) -> None:
    def autos(value: object, name: str = "") -> list[str]:
        if not isinstance(value, dict):
            return [name] if value == "auto" else []
        return [found for key, inner in value.items() for found in autos(inner, f"{name}.{key}")]

    run = decided(small_dir, machine=GPU)
    left = {".data.format", ".data.encoding", ".model.activation_checkpointing"}
    assert set(autos(to_dict(run.recipe))) == left
    assert run.recipe.device == "cuda" and decided(small_dir).recipe.device == "cpu"
    assert not autos(run.deepspeed.engine_json)


@pytest.mark.parametrize(
    ("machine", "options", "dtype", "attention"),
    [
        (GPU, [], "bfloat16", "sdpa"),
        (CPU, [], "bfloat16", "eager"),
        (replace(CPU, fast_bf16=False), [], "float32", "sdpa"),
        (replace(CPU, fast_bf16=False), ["--method", "full"], "bfloat16", "eager"),
        (OLD_GPU, [], "bfloat16", "sdpa"),
        (replace(CPU, eager_dtypes=frozenset()), [], "bfloat16", "sdpa"),
        (replace(CPU, eager_dtypes=frozenset({"float32"})), [], "bfloat16", "sdpa"),
        (CPU, ["--model.dtype", "float32"], "float32", "sdpa"),
        (CPU, ["--model.attention", "sdpa"], "bfloat16", "sdpa"),
    ],
)
def test_dtype_and_attention_are_the_faster_ones(
    small_dir: Path, machine: Machine, options: list[str], dtype: str, attention: str
) -> None:
    run = decided(small_dir, *options, machine=machine)
    assert (run.recipe.model.dtype, run.recipe.model.attention) == (dtype, attention)
    assert run.dtype.itemsize == (4 if dtype == "float32" else 2)


def test_each_choice_that_a_user_might_wonder_at_has_a_note(small_dir: Path) -> None:
    run = decided(small_dir, machine=replace(CPU, fast_bf16=False))
    chosen = [str(note).split(":")[0] for note in run.notes]
    assert chosen == ["model.dtype is float32", "model.compile is false"]
    assert not decided(small_dir, machine=GPU).notes
    first, _ = decided(small_dir, machine=OLD_GPU).notes
    assert "emulate it; float16 is faster from" in str(first)


@pytest.mark.parametrize(
    ("machine", "key", "dtype", "noted"),
    [
        (OLD_GPU, "fp16", "float16", []),
        (OLD_GPU, "bf16", "bfloat16", ["bfloat16"]),
        (replace(CPU, fast_bf16=False), "fp16", "float16", []),
        (replace(CPU, fast_bf16=False), "bf16", "bfloat16", []),
    ],
)
def test_a_note_about_the_dtype_names_the_one_that_runs(
    machine: Machine, key: str, dtype: str, noted: list[str], small_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({key: {"enabled": True}}))
    run = decided(small_dir, "--deepspeed", str(tmp_path / "ds.json"), machine=machine)
    assert run.recipe.model.dtype == dtype
    assert [note.choice for note in run.notes if note.option == "model.dtype"] == noted


def test_few_checkpoints_of_full_training_stay_unless_the_recipe_says_more(small_dir: Path) -> None:
    """One of a 7B takes 93 GB."""
    assert decided(small_dir).recipe.save.keep == 32, "the original project's number"
    assert decided(small_dir, "--method", "full").recipe.save.keep == 2
    assert decided(small_dir, "--method", "full", "--save.keep", "9").recipe.save.keep == 9


@pytest.mark.parametrize(
    ("machine", "options", "expected", "words"),
    [
        (GPU, "", True, []),
        (CPU, "", False, ["on a CPU only long runs"]),
        (CPU, "--model.compile true", True, []),
        (GPU, "--model.compile false", False, []),
        (
            replace(GPU, can_compile=False),
            "",
            False,
            ["it needs a C compiler, "],
        ),
        (OLD_GPU, "", False, ["it needs model.dtype float16 or float32"]),
        (OLD_GPU, "--model.dtype float16", True, []),
        (GPU, "--lora.variant dora", False, ["DoRA breaks the graph"]),
        (GPU, "--lora.variant dora --model.compile true", True, []),
        (GPU, "--deepspeed ds_configs/zero3.json", "pieces", ["not run on a GPU under ZeRO-3"]),
        (
            replace(GPU, liger="0.8.5"),
            "--deepspeed ds_configs/zero3.json",
            False,
            ["not run on a GPU under ZeRO-3"],
        ),
        (CPU, "--model.compile pieces", "pieces", []),
        (GPU, "--deepspeed ds_configs/zero3.json --model.compile true", True, []),
    ],
)
def test_blocks_are_compiled_on_gpus(
    small_dir: Path, machine: Machine, options: str, expected: bool | str, words: list[str]
) -> None:
    run = decided(small_dir, *options.split(), machine=machine)
    assert run.recipe.model.compile == expected
    notes = [str(note) for note in run.notes if note.option == "model.compile"]
    assert len(notes) == len(words) and all(w in n for w, n in zip(words, notes, strict=True))


def test_compiling_without_a_compiler_is_refused(small_dir: Path) -> None:
    machine = replace(GPU, can_compile=False)
    for wanted in ("true", "pieces"):
        with pytest.raises(UserError, match=f"model.compile is {wanted}; expected a C compiler, "):
            decided(small_dir, "--model.compile", wanted, machine=machine)
        with pytest.raises(UserError, match=f"model.compile is {wanted}; expected model.dtype f"):
            decided(small_dir, "--model.compile", wanted, machine=OLD_GPU)


def test_special_rows_are_on_where_the_folder_does_not_say_chatml(
    small_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_dir, tmp_path / "raw")
    settings = tmp_path / "raw" / "generation_config.json"
    settings.write_text(json.dumps({"chat_format": "raw"}))
    run = decided(tmp_path / "raw", machine=GPU)
    assert run.recipe.lora.special_rows == "on" and "says chat_format 'raw'" in str(run.notes[0])
    assert run.special_ids == list(QWEN.stop_ids(run.encoding))
    settings.unlink()
    assert "has no chat_format" in str(decided(tmp_path / "raw", machine=GPU).notes[0])
    for options in (["--lora.modules_to_save", "wte"], ["--method", "full"]):
        other = decided(tmp_path / "raw", *options, machine=GPU)
        assert other.recipe.lora.special_rows == "off" and other.special_ids == []
    for given, expected in (("true", "on"), ("on", "on"), ("false", "off"), ("off", "off")):
        chosen = decided(tmp_path / "raw", "--lora.special_rows", given, machine=GPU)
        assert (chosen.recipe.lora.special_rows, chosen.notes) == (expected, ())
    with pytest.raises(UserError, match="expected one of them"):
        decided(small_dir, "--lora.special_rows", "on", "--lora.modules_to_save", "wte")


def test_a_value_that_the_json_fills_in_has_the_recipes_range(
    small_dir: Path, tmp_path: Path
) -> None:
    optimizer = {"type": "AdamW", "params": {"betas": [0.9, 1.5]}}
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": optimizer}))
    with pytest.raises(UserError, match="optim.betas is 1.5; expected 2 values, each a number"):
        decided(small_dir, "--deepspeed", str(tmp_path / "ds.json"))


def test_a_large_model_on_a_cpu_must_be_asked_for(small_dir: Path) -> None:
    """7.7 billion parameters, counted without making one."""
    model = Base.read(small_dir).model
    base = replace(Base.qwen_7b(), model=model)
    asked = load_recipe(["--model.path", "Qwen/Qwen-7B"])
    with pytest.raises(UserError, match=r"7.7 billion parameters.*--device cpu"):
        resolve(asked, CPU, base, rows=False)
    resolve(asked, GPU, base, rows=False)
    chosen = load_recipe(["--model.path", "Qwen/Qwen-7B", "--device", "cpu"])
    resolve(chosen, CPU, base, rows=False)
