"""Token rows: what the cache holds is what encoding one row after the other gives, made once, and never stale."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen_ds.data.batches import Part
from qwen_ds.data.read.sources import iter_conversations
from qwen_ds.data.rows import blocks, workers, writer
from qwen_ds.data.rows import cache as row_cache
from qwen_ds.data.rows.blocks import Block, encode_block
from qwen_ds.data.rows.data_report import PartReport
from qwen_ds.data.rows.encode import Encoded, EncodeOptions, encode_row
from qwen_ds.data.rows.token_rows import TokenRows, encode_options, prepare
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import IGNORE, Conversation, Turn
from qwen_ds.model.tokenizer import load_encoding
from qwen_ds.recipe.options import DataOptions


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def adgen(n: int, start: int = 0) -> list[dict[str, object]]:
    return [
        {"content": f"类型#裙*{i}", "summary": "好看" * (1 + i % 5) + str(i)}
        for i in range(start, start + n)
    ]


def chats(n: int) -> list[dict[str, object]]:
    return [
        {
            "messages": [
                {"role": ("user", "assistant")[t % 2], "content": f"{i}.{t}"}
                for t in range(2 + 2 * (i % 3))
            ]
        }
        for i in range(n)
    ]


@pytest.fixture
def data(tmp_path: Path) -> DataOptions:
    """Six single-turn rows and six chats, all too short to be cut."""
    train = [write(tmp_path / "a.jsonl", adgen(6)), write(tmp_path / "b.jsonl", chats(6))]
    return DataOptions(train=train, cache_dir=str(tmp_path / "cache"), max_tokens=400)


@pytest.fixture
def times_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry each time that rows are made."""
    made: list[int] = []
    fill = row_cache._fill

    def counting(*args: object) -> None:
        made.append(1)
        fill(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(row_cache, "_fill", counting)
    return made


@pytest.mark.parametrize("learn_on", ["original", "answer", "official"])
def test_rows_are_what_encoding_each_conversation_gives(
    data: DataOptions, small_dir: Path, learn_on: str
) -> None:
    data = replace(data, learn_on=learn_on)  # type: ignore[arg-type]
    rows = prepare(data, small_dir, n_workers=0).train
    encoding, options = load_encoding(small_dir), encode_options(data, small_dir)
    expected = [
        (encode_row(encoding, c, options), source) for c, source in iter_conversations(data.train)
    ]  # type: ignore[arg-type]
    assert len(rows) == len(expected) == 12
    for i, (row, source) in enumerate(expected):
        ids, labels = rows[i]
        assert (ids.tolist(), labels.tolist()) == (row.ids, row.labels)
        assert (ids.dtype, labels.dtype) == (np.int32, np.int32)
        assert rows.lens[i] == len(row.ids)
        assert rows.learnt[i] == sum(label != IGNORE for label in row.labels[1:])
        assert rows.source(i) == source
    assert rows.source(1) == f"{data.train[0]}:2"
    assert rows.parts == (Part(6, 1.0), Part(6, 1.0))
    assert rows.pad_id == encoding.eod_id
    for outside in (12, -1):
        with pytest.raises(IndexError):
            rows[outside]


def test_workers_give_the_same_rows_in_the_same_order(
    tmp_path: Path, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "CHUNK_ROWS", 16)
    monkeypatch.setattr(writer, "INLINE_ROWS", 32)
    path = write(
        tmp_path / "rows.jsonl", [*adgen(150), {"content": "x", "summary": ""}, *adgen(150, 150)]
    )
    data = DataOptions(train=[path], max_answer_tokens=20, max_prompt_tokens=30)
    alone, together = (
        prepare(replace(data, cache_dir=str(tmp_path / f"cache{n}")), small_dir, n_workers=n).train
        for n in (0, 2)
    )
    assert together.sha256 == alone.sha256
    assert [together.source(i) for i in range(300)] == [alone.source(i) for i in range(300)]
    assert {k: v for k, v in together.report.items() if k != "cache"} == {
        k: v for k, v in alone.report.items() if k != "cache"
    }
    assert together.report["answers_cut"] > 0


def test_a_dead_worker_is_an_error_and_not_a_hang(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.sys, "executable", "/bin/false")
    dying = workers.Workers(small_dir / "qwen.tiktoken", EncodeOptions(), 2)
    try:
        with pytest.raises(RuntimeError, match="has died"):
            dying.submit([Conversation(None, (Turn("user", "q"), Turn("assistant", "a")))]).result(
                timeout=60
            )
    finally:
        dying.close()


def test_conversations_survive_the_way_between_processes() -> None:
    talks = [
        Conversation(None, (Turn("user", "a\ud800"), Turn("assistant", "b\x1b\n"))),
        Conversation(
            "",
            (
                Turn("user", "行"),
                Turn("assistant", "\x00"),
                Turn("user", "c"),
                Turn("assistant", ""),
            ),
        ),
        Conversation("s", ()),
    ]
    assert workers._from_wire(workers._to_wire(talks)) == talks


def test_rows_are_made_once(data: DataOptions, small_dir: Path, times_made: list[int]) -> None:
    first = prepare(data, small_dir).train
    again = prepare(replace(data, weights=[2.0, 0.5], eval_fraction=0.25), small_dir)
    assert len(times_made) == 1, "weights and splits are choices among the same rows"
    assert again.train.sha256 != first.sha256 and len(again.train) < len(first)


CHANGES = {
    "learn_on": "answer",
    "max_prompt_tokens": 40,
    "max_answer_tokens": 40,
    "max_tokens": 300,
    "special_tokens_in_text": "parse",
    "system": "Be brief.",
    "bad_rows": "skip",
    "train": [],
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_decides_a_row_makes_new_rows(
    data: DataOptions, small_dir: Path, times_made: list[int], name: str
) -> None:
    prepare(data, small_dir)
    prepare(replace(data, **{name: CHANGES[name] or data.train[::-1]}), small_dir)
    assert len(times_made) == 2


def test_changed_code_makes_new_rows(
    data: DataOptions, small_dir: Path, times_made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(data, small_dir)
    monkeypatch.setattr(row_cache, "_code_sha256", lambda: "a mended reader")
    prepare(data, small_dir)
    assert len(times_made) == 2


def test_a_changed_file_makes_new_rows(
    data: DataOptions, small_dir: Path, times_made: list[int]
) -> None:
    before = prepare(data, small_dir).train
    write(Path(data.train[0]), [*adgen(5), {"content": "类型#裙*5", "summary": "好看五"}])
    after = prepare(data, small_dir).train
    assert len(times_made) == 2
    assert before.sha256 != after.sha256


def test_another_vocabulary_makes_new_rows(
    data: DataOptions, small_dir: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(small_dir, tmp_path / "other"))
    lines = (other / "qwen.tiktoken").read_bytes().splitlines(keepends=True)
    (other / "qwen.tiktoken").write_bytes(b"".join(lines[:-20]))
    assert prepare(data, small_dir).train.pad_id - 20 == prepare(data, other).train.pad_id


def test_damaged_rows_are_made_again(
    data: DataOptions, small_dir: Path, times_made: list[int]
) -> None:
    rows = prepare(data, small_dir).train
    good = rows[3][0].tolist()
    (folder,) = [path for path in Path(str(data.cache_dir)).iterdir() if path.is_dir()]
    with (folder / "ids.bin").open("r+b") as file:
        file.truncate(8)
    assert prepare(data, small_dir).train[3][0].tolist() == good
    assert len(times_made) == 2


def test_a_run_that_broke_off_leaves_nothing_that_counts(
    data: DataOptions, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(str(data.cache_dir))
    with monkeypatch.context() as patch:
        patch.setattr(
            row_cache.RowWriter, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            prepare(data, small_dir)
    (lock,) = cache.iterdir()
    left = cache / f".{lock.stem}.99999"  # what SIGKILL would have left
    left.mkdir()
    (left / "ids.bin").write_bytes(b"half")
    assert len(prepare(data, small_dir).train) == 12
    assert sorted(path.name for path in cache.iterdir()) == sorted([lock.stem, lock.name])


def test_one_of_many_at_once_makes_the_rows(
    data: DataOptions, small_dir: Path, times_made: list[int]
) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(prepare(data, small_dir, n_workers=0).train.sha256)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert len(times_made) == 1


def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "CHUNK_ROWS", 10)
    asked, done, most = 0, 0, 0

    def stream() -> Iterator[tuple[Conversation, str]]:
        nonlocal asked, most
        for i in range(500):
            asked += 1
            most = max(most, asked - done)
            yield Conversation(None, (Turn("user", str(i)), Turn("assistant", str(i)))), f"x:{i}"

    def on_rows(n: int) -> None:
        nonlocal done
        done += n

    rows = writer.RowWriter(tmp_path)
    encoding = load_encoding(small_dir)
    writer.encode_all(
        [(PartReport("x"), stream())], rows, encoding, tmp_path, EncodeOptions(), 0, on_rows
    )
    assert (rows.n_rows, done) == (500, 500)
    assert most <= 20, "rows under way"


SOURCES = ["x.jsonl:1", "x.jsonl:07", "x", "", "a2b.parquet#0", "t.tar:m10/n.json:3", "s.json:1 scene[12]",
           "x:99999999999999999999", "行\n.jsonl:5", "x.jsonl:2"]  # fmt: skip


def test_sources_come_back_as_they_were(tmp_path: Path) -> None:
    n = len(SOURCES)
    ones = np.ones(n, "<i4")
    runs = np.tile(np.array([[0, 1]], "<i4"), (n, 1))
    hashes = np.arange(n, dtype="<u8")
    # The chunk's first conversation gave no row.
    block = Block(
        ones,
        runs,
        np.arange(1, n + 1, dtype="<i4"),
        ones,
        ones,
        ones,
        hashes,
        hashes,
        [(0, "no turns")],
        [],
    )
    out = writer.RowWriter(tmp_path)
    out.add(block, ["x.jsonl:0", *SOURCES], 0, PartReport("x"))
    out.finish({"pad_id": 0, "data_sets": [{}]})
    rows = TokenRows(tmp_path)
    assert [rows.source(i) for i in range(n)] == SOURCES


def test_a_block_survives_the_way_between_processes(small_dir: Path) -> None:
    talks = [
        Conversation(None, (Turn("user", "q" * n), Turn("assistant", "a" * n)))
        for n in (3, 300, 0, 9)
    ]
    options = EncodeOptions("answer", max_tokens=100)
    block = encode_block(load_encoding(small_dir), talks, options)
    back = Block.from_bytes(block.to_bytes())
    assert back.to_bytes() == block.to_bytes()
    assert (back.cuts, back.dropped) == (block.cuts, block.dropped)
    assert back.cuts == [(1, "prompt cut"), (1, "answer cut")]


def test_a_text_that_is_no_whole_unicode_is_a_row_like_any_other(small_dir: Path) -> None:
    talk = Conversation(None, (Turn("user", "a\ud800"), Turn("assistant", "b")))
    assert len(encode_block(load_encoding(small_dir), [talk], EncodeOptions()).length_K) == 1


def test_rows_without_anything_to_learn_are_dropped(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = iter(
        [
            Encoded([5, 6, 7], [IGNORE, 6, IGNORE]),
            Encoded([5, 6], [5, IGNORE]),  # nothing predicts the first token
            Encoded([5, 6], [IGNORE, IGNORE]),
            Encoded([5], [5]),
            Encoded([], [], dropped="no answer"),
            Encoded([8, 9, 9, 9], [8, 9, IGNORE, 9]),
        ]
    )
    monkeypatch.setattr(blocks, "encode_row", lambda *_: next(made))
    talk = Conversation(None, (Turn("user", "q"), Turn("assistant", "a")))
    block = encode_block(load_encoding(small_dir), [talk] * 6, EncodeOptions())
    assert block.dropped == [
        (1, "nothing to learn"),
        (2, "nothing to learn"),
        (3, "fewer than 2 tokens"),
        (4, "no answer"),
    ]
    assert block.place_K.tolist() == [0, 5]
    assert block.ids_N.tolist() == [5, 6, 7, 8, 9, 9, 9]
    assert block.runs_R2.tolist() == [[1, 2], [0, 2], [3, 4]]
    assert block.n_runs_K.tolist() == [1, 2]
    assert block.learnt_K.tolist() == [1, 2]


def test_runs_of_learnt_tokens_end_with_their_row(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = iter([Encoded([1, 2], [IGNORE, 2]), Encoded([3, 4], [3, 4])])
    monkeypatch.setattr(blocks, "encode_row", lambda *_: next(made))
    talk = Conversation(None, (Turn("user", "q"), Turn("assistant", "a")))
    block = encode_block(load_encoding(small_dir), [talk] * 2, EncodeOptions())
    assert block.runs_R2.tolist() == [[1, 2], [0, 2]]
    assert block.learnt_K.tolist() == [1, 1]


def test_evaluation_rows_are_set_aside_by_question(tmp_path: Path, small_dir: Path) -> None:
    questions = [{"content": f"q{i % 100}", "summary": f"answer {i}"} for i in range(200)]
    data = DataOptions(
        [write(tmp_path / "a.jsonl", questions)], cache_dir=str(tmp_path / "c"), eval_fraction=0.2
    )
    both = prepare(data, small_dir, seed=1)
    assert both.eval is not None
    train, aside = ({rows.source(i) for i in range(len(rows))} for rows in (both.train, both.eval))
    assert len(train) + len(aside) == 200 and not train & aside
    assert 38 <= len(aside) <= 42
    lines = {int(source.rpartition(":")[2]) for source in aside}
    assert {(line + 99) % 200 + 1 for line in lines} == lines, "lines i and i + 100 ask the same"
    assert len(both.train.lens) == len(both.train) and both.train.parts == (Part(len(train), 1.0),)
    again = prepare(data, small_dir, seed=1)
    assert again.train.sha256 == both.train.sha256 != prepare(data, small_dir, seed=2).train.sha256
    assert both.eval.sha256 != both.train.sha256


def test_added_rows_leave_the_split_of_the_others(tmp_path: Path, small_dir: Path) -> None:
    def aside(n: int) -> set[str]:
        path = write(tmp_path / "a.jsonl", adgen(n))
        rows = prepare(
            DataOptions([path], cache_dir=str(tmp_path / "c"), eval_fraction=0.2), small_dir
        ).eval
        assert rows is not None
        return {rows.source(i) for i in range(len(rows))}

    before, after = aside(200), aside(220)
    assert len(before - after) <= 10


def test_a_split_that_leaves_nothing_is_refused(tmp_path: Path, small_dir: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"content": "same", "summary": str(i)} for i in range(9)])
    with pytest.raises(UserError, match=r"eval_fraction 0\.1 leaves none of the 9 rows"):
        prepare(DataOptions([path], cache_dir=str(tmp_path / "c"), eval_fraction=0.1), small_dir)


def test_evaluation_files_are_rows_of_their_own(data: DataOptions, small_dir: Path) -> None:
    both = prepare(
        replace(data, train=data.train[:1], eval=data.train[1:], weights=[3.0]), small_dir
    )
    assert both.eval is not None
    assert both.train.parts == (Part(6, 3.0),) and both.eval.parts == (Part(6, 1.0),)
    assert both.eval.source(0) == f"{data.train[1]}:1"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"train": []}, "data.train is empty"),
        ({"weights": [1.0]}, "data.weights has 1 numbers and data.train 2 entries"),
        ({"weights": [1.0, 0.0]}, "data.weights has 0.0"),
        ({"weights": [1.0, float("nan")]}, "data.weights has nan"),
        ({"eval_fraction": 1.0}, "data.eval_fraction is 1.0"),
        ({"eval_fraction": 0.5, "eval": ["x"]}, "both given"),
        ({"max_tokens": 1}, "data.max_tokens is 1"),
    ],
)
def test_impossible_options_are_the_users_mistake(
    data: DataOptions, small_dir: Path, options: dict[str, object], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        prepare(replace(data, **options), small_dir)  # type: ignore[arg-type]


def test_a_cache_that_cannot_be_written_is_named(data: DataOptions, small_dir: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl: .*data\.cache_dir"):
        prepare(replace(data, cache_dir=data.train[0]), small_dir)


def raising(number: int) -> Callable[..., None]:
    return lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number)))


def test_an_unreadable_file_is_named(
    data: DataOptions, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_cache, "_file_sha256", raising(errno.EACCES))
    with pytest.raises(UserError, match=r"a\.jsonl: Permission denied; expected a readable file"):
        prepare(data, small_dir)


@pytest.mark.parametrize("blamed", ["add", "finish"])
def test_the_cache_is_blamed_for_what_it_does_not_take_and_for_nothing_else(
    data: DataOptions, small_dir: Path, monkeypatch: pytest.MonkeyPatch, blamed: str
) -> None:
    full = raising(errno.ENOSPC)
    with monkeypatch.context() as patch:
        patch.setattr(writer.RowWriter, blamed, full)
        with pytest.raises(UserError, match=r"cache: No space left on device; .*data\.cache_dir"):
            prepare(data, small_dir)
    monkeypatch.setattr(
        row_cache, "encode_all", full
    )  # stands for all besides the writer, as starting the workers
    with pytest.raises(OSError, match="No space left"):
        prepare(data, small_dir)


def test_too_long_rows_are_bounded_by_the_models_length(small_dir: Path) -> None:
    assert encode_options(DataOptions(), small_dir).max_tokens == 64
    assert encode_options(DataOptions(max_tokens=99), small_dir).max_tokens == 99
