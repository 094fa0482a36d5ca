"""General rows by command: measured, compared, resumed, and refused before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from qwen_ds.decode.exceptions import DecodingError
from qwen_ds.errors import Failed, UserError
from serve.files import line_writer
from serve.options import EvaluateOptions, parse
from serve.scores import general, kept_rows
from serve.scores.likelihood import EngineScorer, Item, Scores
from serve.scores.report import evaluate
from tests.serve.files.test_prediction import read_lines

TEXTS = [{"text": f"colour {i}: abc de {i * i} and so on"} for i in range(25)]
QUESTIONS = [{"question": f"{i}+1?", "A": str(i + 1), "B": "no", "answer": "A"} for i in range(5)]


def write_rows(folder: Path) -> Path:
    file = folder / "general.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in TEXTS + QUESTIONS))
    return file


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path)


class Compared(NamedTuple):
    report: dict[str, Any]
    shown: str
    output: Path
    rows: Path


@pytest.fixture(scope="module")
def compared(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """The small model against its copy and against one with a head that is worse on purpose."""
    folder = tmp_path_factory.mktemp("compared")
    broken, rows, output = folder / "broken", write_rows(folder), folder / "out"
    shutil.copytree(small_dir, broken)
    tensors = load_file(broken / "model.safetensors")
    noise = torch.randn(tensors["lm_head.weight"].shape, generator=torch.Generator().manual_seed(1))
    tensors["lm_head.weight"] += 3 * tensors["lm_head.weight"].std() * noise
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    words = ["--general", str(rows), "--output_dir", str(output)]
    words += ["--compare", f"base={small_dir}", f"copy={small_dir}", f"broken={broken}"]
    words += ["--require", "general.forgot<1", "general.perplexity_rise<=0", "general.accuracy>=0"]
    words += ["base:general.bits_per_byte>0"]
    with redirect_stdout(StringIO()) as shown:
        report = evaluate(parse(EvaluateOptions, "", words))
    assert report is not None
    return Compared(report, shown.getvalue(), output, rows)


def measured(output: Path, rows: Path, *more: object) -> dict[str, Any]:
    words = ["--general", str(rows), "--output_dir", str(output), *map(str, more)]
    report = evaluate(parse(EvaluateOptions, "", words))
    assert report is not None
    found: dict[str, Any] = report["general"]
    return found


def test_a_model_that_lost_what_it_knew_is_flagged_and_its_copy_is_not(compared: Compared) -> None:
    found, output = compared.report["general"], compared.output
    assert found == json.loads((output / "comparison.json").read_bytes())["general"]
    assert found["changes"]["broken"]["texts"]["verdict"] == "forgot"
    assert found["changes"]["broken"]["verdict"] == "forgot"
    copy = found["changes"]["copy"]
    assert (copy["texts"]["verdict"], copy["texts"]["worsening"]) == ("no sign", 0.0)
    assert found["scores"]["base"] == found["scores"]["copy"]
    assert "broken against base: perplexity of 25 texts" in compared.shown
    assert ": forgot" in compared.shown
    lines = read_lines(output / "base" / "general.jsonl")
    assert [line["source"] for line in lines] == [f"{compared.rows}:{i + 1}" for i in range(30)]
    assert lines[0]["bytes"] == len(TEXTS[0]["text"])
    question = lines[-1]
    assert set(question["logprobs"]) == {"A", "B"} and question["answer"] == "A"
    assert question["chosen"] == max("AB", key=question["logprobs"].get)
    assert not list(output.rglob("*.parts"))


def test_forgetting_and_general_figures_can_be_required(compared: Compared) -> None:
    gate, general = compared.report["gate"], compared.report["general"]
    met = {(one["model"], one["require"].split("general.")[1]): one for one in gate}
    assert {key for key, one in met.items() if not one["met"]} == {
        ("broken", "forgot<1"), ("broken", "perplexity_rise<=0"),
    }  # fmt: skip
    assert len(met) == 7
    rise = general["changes"]["broken"]["texts"]["worsening"]
    assert met["broken", "perplexity_rise<=0"]["value"] == rise > 0
    base = general["scores"]["base"]["bits_per_byte"][0]
    assert met["base", "bits_per_byte>0"]["value"] == base
    assert "required  MISSED  broken: general.forgot<1  (1.0000)" in compared.shown


def test_one_model_alone_gets_its_figures(small_dir: Path, rows: Path, tmp_path: Path) -> None:
    found = measured(tmp_path / "out", rows, "--model", small_dir)
    ((name, scores),) = found["scores"].items()
    assert name == small_dir.name and "changes" not in found
    lines = read_lines(tmp_path / "out" / "general.jsonl")
    texts = [line for line in lines if "nll" in line]
    nll, tokens = (sum(line[key] for line in texts) for key in ("nll", "tokens"))
    value, low, high = scores["perplexity"]
    assert value == pytest.approx(float(torch.tensor(nll / tokens).double().exp()))
    assert low < value < high and set(scores) == {"perplexity", "bits_per_byte", "accuracy"}


def test_a_killed_measurement_goes_on_where_it_was(
    small_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(tmp_path / "whole", rows, "--model", small_dir)
    asked: list[int] = []
    score = EngineScorer.score

    def dying(self: EngineScorer, items: Iterable[Item]) -> Scores:
        items = list(items)
        asked.append(len(items))
        for number, found in enumerate(score(self, items)):
            if len(asked) == 1 and number == 12:
                raise Failed("killed")
            yield found

    monkeypatch.setattr(EngineScorer, "score", dying)
    monkeypatch.setattr(line_writer, "ROWS_AT_ONCE", 5)
    with pytest.raises(Failed, match="killed"):
        measured(tmp_path / "out", rows, "--model", small_dir)
    assert not (tmp_path / "out" / "general.jsonl").exists()
    assert measured(tmp_path / "out", rows, "--model", small_dir) == whole
    assert asked == [30, 18]
    both = [(tmp_path / name / "general.jsonl").read_bytes() for name in ("whole", "out")]
    assert both[0] == both[1]


def test_the_bar_counts_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[tqdm[Any]] = []

    def bar(**options: Any) -> tqdm[Any]:
        bars.append(tqdm(**options))
        return bars[-1]

    def make(left: Sequence[int]) -> Iterator[dict[str, Any]]:
        yield from ({"id": row} for row in left)

    monkeypatch.setattr(kept_rows, "tqdm", bar)
    monkeypatch.setattr(line_writer, "ROWS_AT_ONCE", 8)
    lines = kept_rows.kept_rows(tmp_path / "out.jsonl", {"of": "a test"}, 20, make, False)
    assert [line["id"] for line in lines] == list(range(20))
    assert bars[0].n == 20, "the last four are no whole batch"


def test_a_row_with_an_error_is_left_out_and_counted(
    small_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: EngineScorer, items: Iterable[Item]) -> Scores:
        yield from ((i, DecodingError("too long")) for i, _ in enumerate(items))

    monkeypatch.setattr(EngineScorer, "score", failing)
    found = measured(tmp_path / "out", rows, "--compare", f"a={small_dir}", f"b={small_dir}")
    assert found["changes"]["b"] == {"verdict": "cannot tell", "failed": 30}
    line = read_lines(tmp_path / "out" / "a" / "general.jsonl")[0]
    assert (line["finish_reason"], line["error"]) == ("error", "too long")


def test_a_bad_row_is_told_before_any_model_is_asked(
    small_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rows.open("a") as out:
        out.write('{"text": ""}\n')
    monkeypatch.setattr(general, "find_source", None)
    with pytest.raises(UserError, match="general.jsonl:31: text is empty"):
        measured(tmp_path / "out", rows, "--model", small_dir)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--require", "stop_rate>=0.9"], "stop_rate is measured with --data alone"),
        (["--require", "perplexity<9"], "perplexity is measured with --data alone"),
        (["--require", "general.forgot<1"], "forgot is that of a model against the first"),
        (["--adapter", "a=x"], "--general with adapters by name"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    small_dir: Path, rows: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        measured(tmp_path / "out", rows, "--model", small_dir, *words)


def test_examples_alone_are_refused(small_dir: Path, rows: Path, tmp_path: Path) -> None:
    words = ["--model", str(small_dir), "--general_examples", str(rows)]
    words += ["--data", str(rows), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--general_examples is given without --general"):
        evaluate(parse(EvaluateOptions, "", words))


def test_the_general_rows_themselves_are_never_replaced(small_dir: Path, rows: Path) -> None:
    with pytest.raises(UserError, match="general.jsonl"):
        measured(rows.parent, rows, "--model", small_dir, "--overwrite", "true")
    assert len(rows.read_text().splitlines()) == 30


def test_what_is_there_is_not_replaced_unasked(small_dir: Path, rows: Path, tmp_path: Path) -> None:
    measured(tmp_path / "out", rows, "--model", small_dir)
    with pytest.raises(UserError, match="exists"):
        measured(tmp_path / "out", rows, "--model", small_dir)
    measured(tmp_path / "out", rows, "--model", small_dir, "--overwrite", "true")
