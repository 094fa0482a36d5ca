"""Run folders are read on no trust: what is absent is left out, what is broken is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from qwen_ds.report.folder import RunReader, flat, number, read_run, series
from tests.report.runs import make_run, write_object


def test_a_folder_of_an_old_run_gives_what_it_has(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", steps=5, eval_losses=(2.0,)))
    assert [len(run.steps), len(run.evals)] == [5, 1] and run.recipe["seed"] == 42
    assert run.samples == [] and run.token_losses == [] and run.outcome == {}
    assert run.troubles == [] and run.is_finished


@pytest.mark.parametrize(
    "made, expected", [(False, "no such folder"), (True, "neither recipe.yaml")]
)
def test_another_folder_is_an_error_of_one_line(tmp_path: Path, made: bool, expected: str) -> None:
    folder = tmp_path / "x"
    if made:
        folder.mkdir()
    with pytest.raises(UserError, match=expected):
        read_run(folder)


def test_lines_that_are_no_objects_are_left_out_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n[2]\n\n{"b": \nNaN\n"x"\n{"c": 3}\n')
    reader = RunReader(tmp_path)
    assert reader.lines("a.jsonl") == [{"a": 1}, {"c": 3}]
    assert reader.troubles == ["a.jsonl: no JSON object in line 2, 4, 5 and 1 more; left out"]


def test_a_file_that_cannot_be_read_is_a_trouble_without_the_folders_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff{")
    (tmp_path / "b.jsonl").mkdir()
    reader = RunReader(tmp_path)
    assert reader.json("a.json") == {} and reader.lines("b.jsonl") == []
    assert [line.split(":")[0] for line in reader.troubles] == ["a.json", "b.jsonl"]
    assert reader.json("absent.json") == {} and len(reader.troubles) == 2


@pytest.mark.parametrize(
    "text, why", [("a: [1", "not readable as YAML"), ("a: &x [1]\nb: *x\n", "it has aliases")]
)
def test_a_broken_recipe_is_a_trouble(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    run = read_run(tmp_path)
    assert run.recipe == {} and len(run.troubles) == 1 and why in run.troubles[0]


def test_values_that_are_not_as_expected_cost_their_part_alone(tmp_path: Path) -> None:
    reader = RunReader(tmp_path)
    assert reader.guarded("x.json", lambda: {}["total"], 7) == 7
    assert reader.listed("y.json", lambda: [1 + 1]) == [2]
    assert reader.troubles == [
        "x.json: its values are not as expected (KeyError: 'total'); left out"
    ]


def test_totals_come_from_the_newest_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "latest").write_text("step_000030\n")
    outcome = {"progress": {"outcome": {"seconds": 99.0}}}
    write_object(run / "checkpoints" / "step_000030" / "state.json", outcome)
    assert read_run(run).outcome == {"seconds": 99.0}
    (run / "latest").write_text("../../elsewhere")
    assert read_run(run).outcome == {}


def test_only_finite_numbers_are_numbers() -> None:
    row = {"a": 1, "b": True, "c": "2", "d": float("inf"), "e": None, "f": 0.5}
    assert [number(row, key) for key in "abcdefg"] == [1, None, None, None, None, 0.5, None]
    assert series([{"step": 1, "x": 2.0}, {"step": 2, "x": None}], "x") == ([1], [2.0])


def test_nested_keys_become_dotted() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
