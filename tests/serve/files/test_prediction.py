"""Prediction over files: a line a row, in order; a mistake is named before the first answer."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import pytest

from qwen_ds.decode.engine import DecodingEngine
from qwen_ds.decode.exceptions import DecodingError, LogitsNotFinite, RowOutOfMemory
from qwen_ds.decode.request import Completion, Request
from qwen_ds.disk.lock import Holder
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, Turn, encode_prompt
from qwen_ds.model.tokenizer import load_encoding
from serve.engine.engine import stream
from serve.engine.loading import load_engine
from serve.files.claims import Claims
from serve.files.parts import PredictionParts
from serve.files.prediction import Share, predict, settings_of
from serve.files.prompts import PromptRow
from serve.files.sources import find_source
from serve.options import PredictOptions, parse

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

    engine = load_engine(small_dir)
    history = (Turn("user", "你好"), Turn("assistant", "您好"), Turn("user", "再见"))
    ids = encode_prompt(load_encoding(small_dir), Conversation(None, history))
    options = options_for(small_dir, tmp_path / "mixed.jsonl", output)
    request = Request(ids, options.sampling(), engine.stop)
    ((_, alone),) = stream(engine.start(), [request])
    assert isinstance(alone, Completion)
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
    monkeypatch.setattr("serve.files.ranks.ABSENT_SECONDS", 0.5)  # rank 1 is not there any more
    run(options_for(small_dir, rows, tmp_path / "one.jsonl", *sampling))
    options = options_for(small_dir, rows, tmp_path / "two.jsonl", *sampling)
    settings = settings_of(find_source(str(small_dir), options), options.input, options)
    PredictionParts.prepare(
        Path(options.output), settings, len(ROWS), overwrite=False
    ).close()  # as rank 0 does at its start
    for rank in (1, 0):
        as_rank(monkeypatch, rank, 2)
        run(options)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not (tmp_path / "two.jsonl.parts").exists()


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Let the engine die after so many answers; returns the list that their texts go to."""
    answered = []

    def dying(
        engine: DecodingEngine, requests: Iterable[Request]
    ) -> Iterator[tuple[int, Completion | DecodingError]]:
        for i, completion in stream(engine, requests):
            if len(answered) == after:
                raise KeyboardInterrupt
            assert isinstance(completion, Completion)
            answered.append(completion.text)
            yield i, completion

    monkeypatch.setattr("serve.answering.stream", dying)
    return answered


@pytest.mark.parametrize("killed_rank", [0, 5])  # with 5 the run goes on with fewer ranks
def test_a_killed_run_is_resumed_where_it_stopped(
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
    finished = read_lines(part)
    assert [line["prediction"] for line in finished] == before  # none is lost
    part = part.rename(part.with_name(f"rank_{killed_rank:05d}.jsonl"))
    with part.open("a") as stream:
        stream.write('{"id": 3, "predic')  # what a kill in the middle of a write leaves
    after = interrupted(monkeypatch, after=99)
    run(options_for(small_dir, rows, output))
    assert output.read_bytes() == expected
    assert len(finished) + len(after) == len(ROWS)  # none of them is answered twice


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


def test_a_rank_that_never_comes_is_waited_for_once(
    small_dir: Path, rows: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.files.ranks.ABSENT_SECONDS", 0.5)
    as_rank(monkeypatch, 0, 2)
    output = tmp_path / "out.jsonl"
    run(options_for(small_dir, rows, output, "--timeout_minutes", "0.005"))
    assert output.read_bytes() == expected  # its rows are the others'
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
    assert sorted(tmp_path.iterdir()) == [rows]
    run(options_for(small_dir, rows, output))
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
        monkeypatch.setattr(
            "serve.files.prediction.find_source", lambda _: pytest.fail("work began")
        )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        run(options_for(small_dir, rows, tmp_path / output, *more))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_rank_beats_before_it_looks_for_the_model(
    small_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the model takes, rank 0 knows within a minute who has come; and it looks out
    for them from its own start."""
    output, seen = tmp_path / "new" / "out.jsonl", []

    def loading(_: str) -> NoReturn:
        seen.append(sorted(path.name for path in output.parent.iterdir()))
        seen.append(
            sorted(t.name for t in threading.enumerate() if t.name in ("beat", "rank watch"))
        )
        raise KeyboardInterrupt

    monkeypatch.setattr("serve.files.sources.find_model", loading)
    for rank in (1, 0):
        as_rank(monkeypatch, rank, 2)
        with pytest.raises(KeyboardInterrupt):
            run(options_for(small_dir, rows, output))
        assert not output.parent.exists(), "neither of them leaves anything"
    threads = ["beat", "rank watch"]
    zero, one = (f".out.jsonl.rank_0000{rank}.alive" for rank in range(2))
    assert seen == [[one], threads, [".out.jsonl.lock", zero], threads]


def test_the_link_of_an_output_stays_the_users(
    small_dir: Path, rows: Path, expected: bytes, tmp_path: Path
) -> None:
    """It is followed: to a file that is absent, and with --overwrite to one that is there."""
    link, target = tmp_path / "link", tmp_path / "far" / "out.jsonl"
    target.parent.mkdir()
    link.symlink_to(target)
    run(options_for(small_dir, rows, link))
    assert link.is_symlink() and target.read_bytes() == expected
    target.write_text("mine")
    with pytest.raises(UserError, match=r"out\.jsonl: exists"):
        run(options_for(small_dir, rows, link))
    run(options_for(small_dir, rows, link, "--overwrite"))
    assert link.is_symlink() and target.read_bytes() == expected
    assert [path.name for path in target.parent.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a link to a device"])
def test_what_is_no_file_is_never_replaced(
    small_dir: Path, rows: Path, tmp_path: Path, kind: str
) -> None:
    output = tmp_path / "out"
    if kind == "a FIFO":
        os.mkfifo(output)
    elif kind == "a device":
        os.mknod(output, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    else:
        output.symlink_to("/dev/null")
    with pytest.raises(UserError, match="out: not a regular file; expected the name of a file"):
        run(options_for(small_dir, rows, output, "--overwrite"))
    assert not output.is_file() and output.exists()


def test_a_command_killed_behind_its_last_row_is_done_again_by_itself(
    small_dir: Path, rows: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output has its name, and its parts were not removed; nothing is answered twice."""
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("serve.files.parts.remove_parts", raising_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(options_for(small_dir, rows, output))
    assert output.read_bytes() == expected and (tmp_path / "out.jsonl.parts").is_dir()
    with pytest.raises(UserError, match="interrupted run with seed"):
        run(options_for(small_dir, rows, output, "--seed", "5"))
    with monkeypatch.context() as patch:
        patch.setattr("serve.files.sources.load_engine", raising_interrupt)
        run(options_for(small_dir, rows, output))
    assert output.read_bytes() == expected and not (tmp_path / "out.jsonl.parts").exists()


def test_an_output_that_was_changed_since_is_kept(
    small_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("serve.files.parts.remove_parts", raising_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(options_for(small_dir, rows, output))
    output.write_text("mine")
    with pytest.raises(UserError, match=r"out\.jsonl: exists"):
        run(options_for(small_dir, rows, output))
    assert output.read_text() == "mine"


def raising_interrupt(*_: object, **__: object) -> NoReturn:
    raise KeyboardInterrupt


def test_a_rank_waits_for_rank_0_where_the_output_is_to_be_replaced(
    small_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("of an earlier run")
    as_rank(monkeypatch, 1, 2)
    with pytest.raises(RuntimeError, match="rank 0 did not make it"):
        run(options_for(small_dir, rows, output, "--overwrite", "--timeout_minutes", "0.005"))


def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Request], list[int]]:
    """The requests that the engine takes, in order, and how many of them are without an answer
    whenever one ends."""
    taken: list[Request] = []
    ahead: list[int] = []

    def watching(
        engine: DecodingEngine, requests: Iterable[Request]
    ) -> Iterator[tuple[int, Completion | DecodingError]]:
        def coming() -> Iterator[Request]:
            for request in requests:
                taken.append(request)
                yield request

        for done, one in enumerate(stream(engine, coming())):
            ahead.append(len(taken) - done)
            yield one

    monkeypatch.setattr("serve.answering.stream", watching)
    return taken, ahead


def test_memory_holds_a_block_or_two_of_rows(
    small_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.files.parts.block_rows", lambda rows, world: 2)
    _, ahead = watched(monkeypatch)
    run(options_for(small_dir, rows, tmp_path / "out.jsonl"))
    assert max(ahead) <= 3 + 2, "slots, and those that wait for one"
    assert [line["id"] for line in read_lines(tmp_path / "out.jsonl")] == list(range(11))


def test_the_longest_prompts_of_a_block_begin_first(
    small_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.files.parts.block_rows", lambda rows, world: 4)
    taken, _ = watched(monkeypatch)
    run(options_for(small_dir, rows, tmp_path / "out.jsonl"))
    lens = [len(request.prompt) for request in taken]
    assert len(lens) == 11 and len(set(lens)) > 3
    for start in (0, 4, 8):
        assert lens[start : start + 4] == sorted(lens[start : start + 4], reverse=True)


def test_limit_takes_rows_from_the_front(
    small_dir: Path, rows: Path, expected: bytes, tmp_path: Path
) -> None:
    run(options_for(small_dir, rows, tmp_path / "out.jsonl", "--limit", "4"))
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(expected.splitlines(keepends=True)[:4])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            LogitsNotFinite(),
            "the model's logits are not finite; expected numbers: float16 overflows, try --dtype "
            "bfloat16",
        ),
        (
            RowOutOfMemory(),
            "one row does not fit the GPU's memory; expected a shorter prompt or fewer "
            "--max_new_tokens",
        ),
    ],
)
def test_a_row_that_fails_is_written_with_its_error_and_stops_no_other(
    small_dir: Path,
    rows: Path,
    expected: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: DecodingError,
    message: str,
) -> None:
    def failing(
        engine: DecodingEngine, requests: Iterable[Request]
    ) -> Iterator[tuple[int, Completion | DecodingError]]:
        for i, completion in stream(engine, requests):
            yield i, error if i == 2 else completion

    monkeypatch.setattr("serve.answering.stream", failing)
    options = options_for(small_dir, rows, tmp_path / "out.jsonl")
    figures = predict(options.model, options.input, Path(options.output), options)
    assert figures is not None and figures.failed == 1
    lines = read_lines(tmp_path / "out.jsonl")
    (bad,) = [line for line in lines if line["finish_reason"] == "error"]
    assert bad["error"] == message and bad["prediction"] == "" and bad["reference"]
    good = [json.loads(line) for line in expected.splitlines()]
    assert [line for line in lines if line is not bad] == [
        line for line in good if line["id"] != bad["id"]
    ]


def test_a_rows_own_id_and_named_columns_are_carried(small_dir: Path, tmp_path: Path) -> None:
    """Beside our own id, the row's place; not those of another row, and mapped columns too."""
    mixed: list[dict[str, Any]] = [
        {"content": "a", "id": "q-7", "topic": {"x": 1}, "prompt": "no question"},
        {"content": "b", "topic": None},
        {"content": "c", "id": 0},
    ]
    mixed[0].pop("prompt")
    rows, out = write_rows(tmp_path / "rows.jsonl", mixed), tmp_path / "out.jsonl"
    run(
        options_for(
            small_dir, rows, out, "--keep", "id", "topic", "--columns", '{"content": "content"}'
        )
    )
    lines = read_lines(out)
    assert [line["id"] for line in lines] == [0, 1, 2]
    assert [line.get("row_id", ...) for line in lines] == ["q-7", ..., 0]
    assert lines[0]["kept"] == {"id": "q-7", "topic": {"x": 1}}
    assert [line["kept"]["topic"] for line in lines[1:]] == [None, None]


def test_a_column_that_no_row_has_is_named(small_dir: Path, rows: Path, tmp_path: Path) -> None:
    options = options_for(small_dir, rows, tmp_path / "out.jsonl", "--keep", "content", "topik")
    with pytest.raises(UserError, match="--keep topik: no row has it"):
        run(options)


def test_rows_with_other_columns_are_not_mixed_in(small_dir: Path, rows: Path) -> None:
    plain = options_for(small_dir, rows, rows.with_name("out"))
    kept = options_for(small_dir, rows, rows.with_name("out"), "--keep", "content")
    source = find_source(str(small_dir), plain)
    without = settings_of(source, plain.input, plain)
    assert without != settings_of(source, kept.input, kept)
    assert without["keep"] is None, "as in the parts that a release without --keep left"


def test_a_slow_rank_takes_fewer_rows(tmp_path: Path) -> None:
    """One rank asks for a row four times as often as the other."""
    world, count = 2, 400

    class Reader:
        references = "kept"

        def rows(self, is_wanted: Callable[[int], bool]) -> Iterator[PromptRow]:
            talk = Conversation(None, (Turn("user", "x"),))
            for i in range(count):
                if is_wanted(i):
                    yield PromptRow(i, f"rows:{i}", "x", None, talk, (1,) * (i % 9 + 1), 0, {})

    parts = PredictionParts.prepare(tmp_path / "out", {}, count, overwrite=False, world=world)
    holders = [Holder("here", rank, "now") for rank in range(world)]
    shares = [
        Share(
            Reader(),  # type: ignore[arg-type]
            parts,
            Claims(parts.folder, rank, holders[rank], count, parts.block_rows, holders.__getitem__),
            0,
        ).rows()
        for rank in range(world)
    ]
    taken: list[list[int]] = [[], []]
    while len(taken[0]) + len(taken[1]) < count:
        for rank, turns in ((0, 4), (1, 1)):
            taken[rank] += [row.id for row in islice(shares[rank], turns)]
    assert sorted(taken[0] + taken[1]) == list(range(count))
    assert len(taken[0]) > 2.5 * len(taken[1]) > 0
    parts.close()
