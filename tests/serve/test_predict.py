"""Prediction over files: one line a row, in order; mistakes named before the first answer; nothing lost; any ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, Turn, encode_prompt
from qwen_ds.model.tokenizer import load_encoding
from serve.engine.engine import Completion, Engine
from serve.files.parts import Parts, Settings, file_state
from serve.options import PredictOptions, parse
from serve.predict import PromptReader, predict, settings_of

ROWS = [
    {"content": f"类型#裙*裙长#{'长' * (i * 7 % 11)}裙*第{i}", "summary": f"裙子{i}很好看。"}
    for i in range(11)
]
FAST = ("--max_new_tokens", "6", "--batch_size", "3")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def chat(*texts: str) -> list[dict[str, str]]:
    """Messages, the user's first."""
    return [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]


def options_for(model: Path, rows: Path, output: Path, *more: str) -> PredictOptions:
    return parse(
        PredictOptions,
        "",
        ["--model", str(model), "--input", str(rows), "--output", str(output), *FAST, *more],
    )


def run(options: PredictOptions) -> None:
    predict(options.model, options.input, Path(options.output), options)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def expected(small_dir: Path, rows: Path, tmp_path: Path) -> bytes:
    """What one rank writes in one go."""
    run(options_for(small_dir, rows, tmp_path / "expected.jsonl"))
    return (tmp_path / "expected.jsonl").read_bytes()


def test_each_row_gives_one_line_in_order(small_dir: Path, tmp_path: Path) -> None:
    mixed = [
        *ROWS[:4],
        {"instruction": "写一句话", "input": "关于裙子"},
        {"messages": chat("你好", "您好", "再见")},
    ]
    output = tmp_path / "new" / "out.jsonl"
    run(options_for(small_dir, write_rows(tmp_path / "mixed.jsonl", mixed), output))
    lines = read_lines(output)
    assert [line["id"] for line in lines] == list(range(6))
    assert [line["source"].rpartition(":")[2] for line in lines] == ["1", "2", "3", "4", "5", "6"]
    assert [line["reference"] for line in lines] == [
        *(row["summary"] for row in ROWS[:4]),
        None,
        None,
    ]
    assert [line["prompt"] for line in lines[3:]] == [
        ROWS[3]["content"],
        "写一句话\t关于裙子",
        "再见",
    ]

    engine = Engine.load(small_dir)
    history = (Turn("user", "你好"), Turn("assistant", "您好"), Turn("user", "再见"))
    ids = encode_prompt(engine.encoding, Conversation(None, history))
    options = options_for(small_dir, tmp_path / "mixed.jsonl", output)
    (alone,) = engine.generate([ids], options.sampling())
    assert lines[5] == {
        "id": 5,
        "source": f"{tmp_path / 'mixed.jsonl'}:6",
        "prompt": "再见",
        "prediction": alone.text,
        "reference": None,
        "finish_reason": alone.finish_reason,
        "prompt_tokens": len(ids),
        "completion_tokens": len(alone.ids),
    }


@pytest.mark.parametrize("sampling", [(), ("--do_sample", "--seed", "7")], ids=["greedy", "drawn"])
def test_two_ranks_write_what_one_writes(
    small_dir: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sampling: tuple[str, ...],
) -> None:
    run(options_for(small_dir, rows, tmp_path / "one.jsonl", *sampling))
    options = options_for(small_dir, rows, tmp_path / "two.jsonl", *sampling)
    settings = settings_of(small_dir, options.input, options)
    Parts.prepare(
        Path(options.output), settings, len(ROWS), overwrite=False
    ).close()  # as rank 0 does at its start
    for rank in (1, 0):
        as_rank(monkeypatch, rank, 2)
        run(options)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not (tmp_path / "two.jsonl.parts").exists()


@pytest.mark.job
def test_two_processes_share_the_rows(
    small_dir: Path, rows: Path, expected: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "shared.jsonl"
    command = [
        sys.executable,
        "-m",
        "serve.predict",
        "--model",
        str(small_dir),
        "--input",
        str(rows),
        *FAST,
    ]
    processes = [
        subprocess.Popen(
            [*command, f"--output={output}", f"--local_rank={rank}"],
            cwd=Path(__file__).parents[2],
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (1, 0)
    ]
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert output.read_bytes() == expected
    assert "11 rows" in texts[1]
    assert texts[0] == ""


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Let the engine die after so many answers; returns the list that their row ids go to."""
    stream, answered = Engine.stream, []

    def dying(
        self: Engine, prompts: Any, sampling: Any, **kwargs: Any
    ) -> Iterator[tuple[int, Completion]]:
        for i, completion in stream(self, prompts, sampling, **kwargs):
            if len(answered) == after:
                raise KeyboardInterrupt
            answered.append(kwargs["row_ids"][i])
            yield i, completion

    monkeypatch.setattr(Engine, "stream", dying)
    return answered


@pytest.mark.parametrize("killed_rank", [0, 5])  # with 5 the run goes on with fewer ranks
def test_a_killed_run_goes_on_where_it_stopped(
    small_dir: Path,
    rows: Path,
    expected: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_rank: int,
) -> None:
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        before = interrupted(patch, after=7)
        with pytest.raises(KeyboardInterrupt):
            run(options_for(small_dir, rows, output))
    assert not output.exists()
    (part,) = (tmp_path / "out.jsonl.parts").glob("rank_*.jsonl")
    finished = [line["id"] for line in read_lines(part)]
    assert finished == before[:6]  # whole batches of 3
    part = part.rename(part.with_name(f"rank_{killed_rank:05d}.jsonl"))
    with part.open("a") as stream:
        stream.write('{"id": 3, "predic')  # what a kill in the middle of a write leaves
    after = interrupted(monkeypatch, after=99)
    run(options_for(small_dir, rows, output))
    assert output.read_bytes() == expected
    assert sorted([*finished, *after]) == list(range(len(ROWS)))


def test_rows_of_another_run_are_not_mixed_in(
    small_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        interrupted(patch, after=4)
        with pytest.raises(KeyboardInterrupt):
            run(options_for(small_dir, rows, output))
    with pytest.raises(
        UserError, match=r"interrupted run with top_k 50 instead of 9; .*--overwrite"
    ):
        run(options_for(small_dir, rows, output, "--top_k", "9"))
    write_rows(rows, ROWS[::-1])
    with pytest.raises(UserError, match="interrupted run with input"):
        run(options_for(small_dir, rows, output))
    run(options_for(small_dir, rows, output, "--overwrite"))
    assert [line["prompt"] for line in read_lines(output)] == [row["content"] for row in ROWS[::-1]]


def test_a_folder_that_is_not_ours_is_left_alone(
    small_dir: Path, rows: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "out.jsonl.parts" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        run(options_for(small_dir, rows, tmp_path / "out.jsonl", "--overwrite"))
    assert precious.read_text() == "years"


def test_an_output_that_exists_is_kept_unless_told(
    small_dir: Path, rows: Path, expected: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(UserError, match=r"out\.jsonl: exists"):
        run(options_for(small_dir, rows, output))
    assert output.read_text() == "mine"
    run(options_for(small_dir, rows, output, "--overwrite"))
    assert output.read_bytes() == expected


def test_a_rank_that_never_comes_ends_the_wait(
    small_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(monkeypatch, 0, 2)
    output = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="5 of 11 rows are missing"):
        run(options_for(small_dir, rows, output, "--timeout_minutes", "0.005"))
    assert not output.exists()
    as_rank(monkeypatch, 1, 2)
    with pytest.raises(RuntimeError, match="rank 0 did not make it"):
        run(options_for(small_dir, rows, tmp_path / "other.jsonl", "--timeout_minutes", "0.005"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"content": "a", "summary": "b"}\n{"content": "a", "summ\n', r"rows\.jsonl:2: "),
        (
            '{"content": "a", "summary": "b"}\n{"content": " ", "summary": "b"}\n',
            r"rows\.jsonl:2: .*question",
        ),
        ('{"content": "a"}\n{"colour": "red"}\n', r"rows\.jsonl:2: .*colour"),
        ("", "no rows|empty"),
    ],
    ids=["broken", "no question", "unknown keys", "empty"],
)
def test_a_mistake_in_the_input_is_named_before_anything_is_answered(
    small_dir: Path, tmp_path: Path, text: str, message: str
) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        run(options_for(small_dir, rows, output))
    assert "\n" not in str(error.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.jsonl"]


def test_what_is_not_there_is_named(small_dir: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        run(options_for(small_dir, tmp_path / "none.jsonl", output))
    with pytest.raises(UserError, match="expected a checkpoint folder"):
        run(options_for(tmp_path, rows, output))
    with pytest.raises(UserError, match=r"adapter_config\.json|adapter"):
        run(options_for(small_dir, rows, output, "--adapter", str(tmp_path)))
    run(
        options_for(small_dir, rows, output)
    )  # what that left answers no row, and is in nobody's way
    assert len(read_lines(output)) == len(ROWS)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("rows.jsonl/out.jsonl", r"rows\.jsonl: a file; expected a folder to write in"),
        ("folder", r"folder: a folder; expected the name of a file"),
        ("taken.jsonl", r"taken\.jsonl\.parts: a file; expected a folder"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["new", "overwrite"])
def test_an_output_that_cannot_be_written_is_named_before_anything_is_read(
    small_dir: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    message: str,
    more: tuple[str, ...],
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken.jsonl.parts").touch()
    if output != "taken.jsonl":
        monkeypatch.setattr("serve.predict.find_model", lambda _: pytest.fail("work began"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        run(options_for(small_dir, rows, tmp_path / output, *more))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_rank_that_comes_first_does_not_take_the_old_output_for_the_new_one(
    tmp_path: Path,
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("of an earlier run")
    settings, old = Settings({"seed": 1}), file_state(output)
    with pytest.raises(RuntimeError, match="rank 0 did not make it"):
        Parts.join_in(output, settings, 1, 0.01, old)
    with ThreadPoolExecutor() as pool:
        rank1 = pool.submit(Parts.join_in, output, settings, 1, 60.0, old)
        zero = Parts.prepare(output, settings, 2, overwrite=True)
        one = rank1.result()
    assert one is not None
    one.append([{"id": 1}])
    zero.append([{"id": 0}])
    one.close()
    zero.wait(60.0, lambda _: None)
    zero.join()
    assert [line["id"] for line in read_lines(output)] == [0, 1]
    assert Parts.join_in(output, settings, 1, 0.01, old) is None  # too late: all is done


def test_a_rank_waits_for_rank_0_where_the_output_is_to_be_replaced(
    small_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("of an earlier run")
    as_rank(monkeypatch, 1, 2)
    with pytest.raises(RuntimeError, match="rank 0 did not make it"):
        run(options_for(small_dir, rows, output, "--overwrite", "--timeout_minutes", "0.005"))


def test_a_prompt_that_is_too_long_stops_or_is_cut(small_dir: Path, tmp_path: Path) -> None:
    encoding = load_encoding(small_dir)
    long = {"messages": chat("x" * 90, "好" * 9, "y" * 60)}
    rows = write_rows(tmp_path / "rows.jsonl", [long, {"content": "z" * 300}, {"content": "短"}])
    options = options_for(small_dir, rows, tmp_path / "out.jsonl")
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: the prompt has \d+ tokens; expected at most 194"
    ):
        PromptReader(options.input, options, encoding, context=200).survey()
    options = options_for(small_dir, rows, tmp_path / "out.jsonl", "--long_prompts", "cut")
    reader = PromptReader(options.input, options, encoding, context=200)
    turns, question, short = reader
    assert reader.survey().cut == 2
    assert list(turns.ids) == encode_prompt(encoding, Conversation(None, (Turn("user", "y" * 60),)))
    whole = encode_prompt(encoding, Conversation(None, (Turn("user", "z" * 300),)))
    tail = [
        encoding.im_end_id,
        *encoding.ordinary("\n"),
        encoding.im_start_id,
        *encoding.ordinary("assistant\n"),
    ]
    assert list(question.ids) == whole[: 194 - len(tail)] + tail
    assert question.tokens_cut == len(whole) - 194
    assert short.tokens_cut == 0


def test_control_tokens_spelled_in_a_question_stay_text(small_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"content": "a<|im_end|>b"}])
    encoding = load_encoding(small_dir)
    for how, count in ((), 2), (("--data.special_tokens_in_text", "parse"), 3):
        options = options_for(small_dir, rows, tmp_path / "out.jsonl", *how)
        (row,) = PromptReader(options.input, options, encoding, context=200)
        assert row.ids.count(encoding.im_end_id) == count


def test_memory_holds_a_window_of_rows(
    small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr("serve.predict.WINDOW", 2)
    sizes, stream = [], Engine.stream

    def counting(
        self: Engine, prompts: Any, sampling: Any, **kwargs: Any
    ) -> Iterator[tuple[int, Completion]]:
        sizes.append(len(prompts))
        return stream(self, prompts, sampling, **kwargs)

    monkeypatch.setattr(Engine, "stream", counting)
    run(options_for(small_dir, rows, tmp_path / "out.jsonl"))
    assert sizes == [6, 5]
    assert [line["id"] for line in read_lines(tmp_path / "out.jsonl")] == list(range(11))


def test_limit_takes_rows_from_the_front(
    small_dir: Path, rows: Path, expected: bytes, tmp_path: Path
) -> None:
    run(options_for(small_dir, rows, tmp_path / "out.jsonl", "--limit", "4"))
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(expected.splitlines(keepends=True)[:4])


def test_options_are_checked_and_the_launchers_rank_is_accepted(tmp_path: Path) -> None:
    given = ["--local_rank=3", "--model", "m", "--input", "a", "b", "--output", "o"]
    options = parse(
        PredictOptions, "", [*given, "--data.format", "adgen", "--overwrite", "--do_sample=true"]
    )
    assert (options.input, options.format, options.overwrite, options.do_sample) == (
        ["a", "b"],
        "adgen",
        True,
        True,
    )
    for wrong, message in (
        (["--bach_size", "3"], "unknown option bach_size; the nearest is batch_size"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--temperature", "warm"], "temperature"),
        (["--top_p", "2"], "top_p is 2.0"),
    ):
        with pytest.raises(UserError, match=message):
            parse(PredictOptions, "", [*given, *wrong])
    with pytest.raises(UserError, match="output"):
        parse(PredictOptions, "", ["--model", "m", "--input", "a"])
    recipe = tmp_path / "predict.yaml"
    recipe.write_text("model: m\ninput: [a]\noutput: o\ntop_k: 7\n")
    assert parse(PredictOptions, "", ["--config", str(recipe)]).top_k == 7


def test_settings_that_differ_are_named() -> None:
    ours = Settings({"seed": 1, "model": ["m", 5]})
    assert ours.difference({"seed": 1, "model": ["m", 5]}) is None
    assert ours.difference({"seed": 2, "model": ["m", 5]}) == "seed 2 instead of 1"
    assert ours.difference({"seed": 1}) == 'model null instead of ["m", 5]'
