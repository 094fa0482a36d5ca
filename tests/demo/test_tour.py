"""The tour: which commands it runs, where their output goes, and what it shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from qwen_ds.demo import __main__ as run
from qwen_ds.demo import corpus


def write_lines(file: Path, rows: Sequence[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class FakeShell(run.Shell):
    """Writes what the real commands would leave behind."""

    def __init__(self, log: Path, data: Path) -> None:
        super().__init__(log, shows_progress_in_place=False)
        self.data = data
        self.commands: list[tuple[str, int]] = []

    def run(
        self,
        words: Sequence[str],
        progress: Callable[[], str] | None = None,
        exit_code: int = 0,
    ) -> None:
        self.commands.append((" ".join(words), exit_code))
        folder = run.REPOSITORY / (
            words[words.index("--output_dir") + 1] if "--output_dir" in words else "runs/demo"
        )
        if "launch/train.py" in words:
            write_lines(
                folder / "metrics.jsonl",
                [{"step": s, "loss": 3.0 - s, "tokens_per_second": 9} for s in (1, 2)],
            )
            data = {"train": ["/train.jsonl"], "eval": [str(self.data)]}
            recipe = {"model": {"path": "/base"}, "data": data}
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        if "--compare" in words:
            scores = {"base": [0.25, 0.2, 0.3], "fine-tuned": [0.75, 0.7, 0.8]}
            test = {"fine-tuned": {"difference": 0.5, "low": 0.4, "high": 0.6, "p": 0.001}}
            report = {
                "scores": dict.fromkeys(run.SHOWN, scores),
                "paired": dict.fromkeys(run.SHOWN, test),
            }
            for side, answer in (("base", "平淡"), ("fine-tuned", "精彩")):
                rows = [{"reference": f"参考{i}", "prediction": f"{answer}{i}"} for i in range(5)]
                write_lines(folder / side / "predictions.jsonl", rows)
            (folder / "comparison.json").write_text(json.dumps(report))


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeShell:
    repository = tmp_path / "repository"
    (repository / "launch" / "recipes").mkdir(parents=True)
    (repository / run.RECIPE).write_text(
        (run.REPOSITORY / run.RECIPE).read_text(encoding="utf-8"), encoding="utf-8"
    )
    monkeypatch.setattr(run, "REPOSITORY", repository)
    write_lines(tmp_path / "eval.jsonl", [{"content": f"类型#裙*号#{i}"} for i in range(5)])
    return FakeShell(repository / "runs" / "demo.log", tmp_path / "eval.jsonl")


def test_the_tour_types_what_a_user_would(
    shell: FakeShell, capsys: pytest.CaptureFixture[str]
) -> None:
    run.tour(shell, Path("runs/demo"), 2, None)
    evaluate, gate = "python -m serve.evaluate", "--require stop_rate>=0.99 seed.rouge-l>=0.4"
    compared = "--compare base=/base fine-tuned=runs/demo/adapter --model /base"
    given = "--predictions runs/demo/eval/base/predictions.jsonl"
    given += " --output_dir runs/demo-base --overwrite true"
    data = f"--data {shell.data} --training /train.jsonl --output_dir runs/demo/eval"
    merge = "--base /base --adapter runs/demo/adapter --output runs/demo/merged"
    assert shell.commands == [
        ("deepspeed --num_gpus 2 launch/train.py", 0),
        (f"{evaluate} {compared} {data} {gate}", 0),
        (f"{evaluate} {given} {gate}", 1),  # the base misses what the result reaches
        (f"python launch/merge.py {merge}", 0),
        ("python -m qwen_ds.report runs/demo", 0),
    ]
    shown = capsys.readouterr().out
    assert "2 steps, loss 2.000 -> 1.000" in shown
    told = "0.250  0.200 to 0.300 0.750  0.700 to 0.800 0.001".split()
    for name in run.SHOWN:
        (line,) = [line for line in shown.splitlines() if line.startswith(f"  {name} ")]
        assert line.split() == [name, *told]
    for i in (0, 2, 4):
        assert (
            f"号#{i}\n    reference  参考{i}\n    before     平淡{i}\n    after      精彩{i}\n"
            in shown
        )
    for path in (
        "runs/demo/merged/README.md",
        "runs/demo/report.html",
        "tensorboard --logdir runs",
        "runs/demo.log",
    ):
        assert path in shown
    assert len(shown.splitlines()) < 48


def test_another_folder_or_json_is_named_in_the_command(shell: FakeShell) -> None:
    run.tour(shell, Path("runs/demo-2"), 8, "ds_configs/zero3.json")
    assert shell.commands[0][0] == (
        "deepspeed --num_gpus 8 launch/train.py --config launch/recipes/demo.yaml "
        "--output_dir runs/demo-2 --deepspeed ds_configs/zero3.json"
    )


def test_the_recipe_of_the_demo_fits_its_corpus_and_eight_ranks() -> None:
    recipe = yaml.safe_load((run.REPOSITORY / run.RECIPE).read_text(encoding="utf-8"))
    assert recipe["output_dir"] == run.DEFAULT_OUTPUT and recipe["model"]["path"] == "demo"
    assert recipe["batch"]["rows_per_step"] % 8 == 0
    assert corpus.TRAIN_ITEMS % recipe["batch"]["rows_per_step"] == 0
    assert recipe["lora"]["r"] == 8 and recipe["lora"]["alpha"] == 16


def test_an_existing_run_is_left_alone(tmp_path: Path) -> None:
    assert run.free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert run.free_folder(tmp_path / "demo") == tmp_path / "demo-3"


def test_progress_counts_only_whole_lines_of_training_steps(tmp_path: Path) -> None:
    assert run.progress_line(tmp_path, 75) == ""
    line = json.dumps({"step": 4, "loss": 0.5, "tokens_per_second": 1234.4})
    (tmp_path / "metrics.jsonl").write_text(
        f'{line}\n{{"step": 4, "eval_loss": 1.0}}\n{{"step": 5, "lo'
    )
    assert run.progress_line(tmp_path, 75) == "step 4/75  loss 0.500  1234 tokens/s"


def test_output_of_a_command_goes_to_the_log_and_a_failure_names_its_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shell = run.Shell(tmp_path / "demo.log", shows_progress_in_place=True)
    speak = "import sys; print('chat' + 'ter'); print('warn' + 'ing', file=sys.stderr)"
    shell.run(["python", "-c", speak], lambda: "step 1/2")
    shown = capfd.readouterr()
    assert "chatter" not in shown.out and "warning" not in shown.out and not shown.err
    log = shell.log.read_text()
    assert "chatter" in log and "warning" in log and "$ python -c" in log
    with pytest.raises(run.StepFailed, match="exit code 3"):
        shell.run(["python", "-c", "raise SystemExit(3)"])
    shell.run(["python", "-c", "raise SystemExit(3)"], exit_code=3)
    with pytest.raises(run.StepFailed, match="exit code 0"):
        shell.run(["python", "-c", "pass"], exit_code=3)


def test_a_failed_demo_shows_the_end_of_its_log_and_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(shell: run.Shell, *_: object) -> None:
        shell.log.write_text("".join(f"line {i}\n" for i in range(100)))
        raise run.StepFailed("python launch/merge.py ended with exit code 2")

    monkeypatch.setattr(run, "tour", fail)
    monkeypatch.setattr("sys.argv", ["demo", "--output_dir", str(tmp_path / "demo")])
    assert run.main() == 1
    error = capsys.readouterr().err
    assert "line 99" in error and "line 80" not in error
    assert error.endswith(f"exit code 2; the whole log is {tmp_path / 'demo.log'}\n")
