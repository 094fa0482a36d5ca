"""Sources: paths to conversations, bad rows stopped or skipped, columns mapped, splits found."""

from __future__ import annotations

import ast
import inspect
import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import datasets
import pytest

from qwen_ds.data.read import files, sources
from qwen_ds.data.read.dialogue import Dropped
from qwen_ds.data.read.sources import ReadOptions, iter_conversations, iter_prompts, locate
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, Turn

AD = {"content": "q", "summary": "a"}


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def talk(*texts: str, system: str | None = None) -> Conversation:
    roles = ["user", "assistant"] * len(texts)
    return Conversation(
        system, tuple(Turn(role, text) for role, text in zip(roles, texts, strict=False))
    )


def said_in(paths: list[Path | str], **options: object) -> list[str]:
    """The first answers, in order."""
    results = [result for result, _ in iter_conversations(paths, ReadOptions(**options))]  # type: ignore[arg-type]
    return [result.turns[1].text for result in results if isinstance(result, Conversation)]


def test_one_file_may_mix_shapes(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows",
        AD,
        {"instruction": "i", "output": "b"},
        {"conversation": [{"human": "h"}]},
    )
    assert list(iter_conversations([path])) == [
        (talk("q", "a"), f"{path}:1"),
        (talk("i", "b"), f"{path}:2"),
        (
            Dropped("no answer", "keys found: conversation; keys expected: conversation"),
            f"{path}:3",
        ),
    ]


def test_rows_without_a_system_text_get_the_given_one(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", AD, {**AD, "system": "own"}, {**AD, "system": " "})
    systems = [
        result.system
        for result, _ in iter_conversations([path], ReadOptions(system="s"))
        if isinstance(result, Conversation)
    ]
    assert systems == ["s", "own", "s"]


def test_counts_tell_rows_read_kept_and_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", AD, {**AD, "summary": ""}, {"content": 5, "summary": "a"}, AD)
    counts: Counter[str] = Counter()
    results = [
        result for result, _ in iter_conversations([path], ReadOptions(bad_rows="skip"), counts)
    ]
    assert counts == {"rows": 4}
    assert [result.unreadable for result in results if isinstance(result, Dropped)] == [False, True]


def test_a_row_that_gives_nothing_names_its_keys_and_the_expected_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", {"instruction": "q", "Output": "a"})
    ((result, _),) = iter_conversations([path])
    assert result == Dropped(
        "no answer", "keys found: instruction, Output; keys expected: instruction"
    )
    ((result, _),) = iter_conversations(
        [write(path, {**AD, "summary": None})], ReadOptions(format="adgen")
    )
    assert result == Dropped(
        "no answer", "keys found: content, summary; keys expected: content + summary"
    )


UNREADABLE = [
    ('{"content": "q"', "not valid JSON", "not valid JSON: Expecting ',' delimiter"),
    (
        json.dumps({"content": 5, "summary": "a"}),
        "wrong type",
        "content is a number; expected text",
    ),
    (json.dumps({"contents": "q"}), "unknown keys", "keys found: contents; keys expected: "),
    (
        json.dumps({"messages": [{"role": "bot", "content": "x"}]}),
        "unknown role",
        "role is 'bot'; expected one of system, user, assistant",
    ),
]


@pytest.mark.parametrize(("line", "reason", "detail"), UNREADABLE)
def test_an_unreadable_row_stops_the_run_with_its_line(
    line: str, reason: str, detail: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "train.jsonl", AD, {**AD, "summary": " "})
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n{json.dumps(AD)}\n")
    rows = iter_conversations([path])
    assert next(rows)[0] == talk("q", "a")
    assert isinstance(next(rows)[0], Dropped), "a row without an answer reads well"
    with pytest.raises(UserError) as error:
        next(rows)
    assert str(error.value).startswith(f"{path}:4: {detail}") and "\n" not in str(error.value)


@pytest.mark.parametrize(("line", "reason", "detail"), UNREADABLE)
def test_an_unreadable_row_is_skipped_and_counted_when_asked(
    line: str, reason: str, detail: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "train.jsonl", AD)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n{json.dumps(AD)}\n")
    first, (bad, source), last = iter_conversations([path], ReadOptions(bad_rows="skip"))
    assert first[0] == last[0] == talk("q", "a")
    assert (
        isinstance(bad, Dropped)
        and bad.reason == reason
        and bad.unreadable
        and bad.detail.startswith(detail)
    )
    assert source == f"{path}:2"


def test_a_named_format_reads_only_its_own_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows",
        {**AD, "instruction": "i", "output": "b"},
        {"instruction": "i", "output": "b"},
    )
    rows = iter_conversations([path], ReadOptions(format="adgen"))
    assert next(rows)[0] == talk("q", "a")
    with pytest.raises(
        UserError,
        match=r":2: keys found: instruction, output; keys expected: content [+] summary .format",
    ):
        next(rows)


def test_options_and_paths_are_checked_before_the_first_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", AD)
    with pytest.raises(UserError, match="data.format is 'adgenn'.*did you mean adgen"):
        iter_conversations([path], ReadOptions(format="adgenn"))
    with pytest.raises(UserError, match="nothing.json: no such file or folder"):
        iter_conversations([path, tmp_path / "nothing.json"])
    with pytest.raises(UserError, match="nothing.json: no such file or folder"):
        iter_prompts([tmp_path / "nothing.json"])


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text in ("[]", "q,a\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="rows.json: the file holds no rows"):
            list(iter_conversations([path]))


COLUMNS = {"prompt": "q", "answer": "a", "system": "s"}


def test_columns_map_the_keys_that_a_format_expects_to_the_files_own(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows",
        {"q": "1", "a": "2", "s": "3", **AD},
        {"q": "1", "a": "2", "system": "not mapped"},
    )
    assert [result for result, _ in iter_conversations([path], ReadOptions(columns=COLUMNS))] == [
        talk("1", "2", system="3"),
        talk("1", "2"),
    ]
    alpaca = {"instruction": "q", "input": "s", "output": "a"}
    assert next(iter_conversations([path], ReadOptions(columns=alpaca)))[0] == talk("1\t3", "2")
    turns = write(
        tmp_path / "turns",
        {"talk": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]},
    )
    assert next(iter_conversations([turns], ReadOptions(columns={"messages": "talk"})))[0] == talk(
        "1", "2"
    )


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", {"q": "1", "a": "2"})
    message = r"rows:1: no column 's' \(data.columns.system\); keys found: q, a"
    for bad_rows in ("stop", "skip"):
        with pytest.raises(UserError, match=message):
            list(iter_conversations([path], ReadOptions(columns=COLUMNS, bad_rows=bad_rows)))
    write(path, {"q": "1", "a": "2", "s": "3"}, {"q": "1"}, {"q": "1", "a": "2"})
    results = [
        result
        for result, _ in iter_conversations([path], ReadOptions(columns=COLUMNS, bad_rows="skip"))
    ]
    assert (
        isinstance(results[1], Dropped)
        and results[1].reason == "missing key"
        and results[1].unreadable
    )
    assert results[2] == talk("1", "2"), (
        "a column that its format can do without may be absent further on"
    )


def test_columns_must_name_the_keys_of_a_format(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", AD)
    with pytest.raises(UserError, match="data.columns has the key 'q'; expected keys of a format"):
        iter_conversations([path], ReadOptions(columns={"q": "prompt"}))
    with pytest.raises(
        UserError,
        match="data.columns names prompt; expected all keys of a format: .*prompt [+] response",
    ):
        iter_conversations([path], ReadOptions(columns={"prompt": "q"}))
    with pytest.raises(UserError, match="data.columns has the key 'prompt'"):
        iter_conversations([path], ReadOptions(format="alpaca", columns={"prompt": "q"}))


def test_an_object_of_lists_is_its_rows_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps({"x": [AD], "y": [], "z": [AD, {**AD, "summary": 5}]}, indent=1),
        encoding="utf-8",
    )
    results = list(iter_conversations([path], ReadOptions(bad_rows="skip")))
    assert [source for _, source in results] == [
        f"{path}:1 x[0]",
        f"{path}:1 z[0]",
        f"{path}:1 z[1]",
    ]
    assert [isinstance(result, Dropped) for result, _ in results] == [False, False, True]
    mapped = {"prompt": "content", "answer": "summary"}
    sources = [
        source
        for _, source in iter_conversations([path], ReadOptions(columns=mapped, bad_rows="skip"))
    ]
    assert sources == [source for _, source in results]
    path.write_text(json.dumps({"x": [AD], "version": "1"}), encoding="utf-8")
    with pytest.raises(UserError, match="keys found: x, version"):
        list(iter_conversations([path]))


def test_a_folder_gives_its_data_files_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "sub/c.json", ".hidden/d.json", "README.md"):
        write(tmp_path / name, {**AD, "summary": name})
    assert said_in([tmp_path]) == ["a.json", "b.jsonl", "sub/c.json"]
    assert said_in([tmp_path / "b.jsonl", tmp_path / "a.json"]) == ["b.jsonl", "a.json"]


def test_a_folder_with_splits_gives_the_one_for_training_unless_another_is_named(
    tmp_path: Path,
) -> None:
    for name in ("train.json", "dev.json", "extra.json", "test/part-0.json"):
        write(tmp_path / name, {**AD, "summary": name})
    assert said_in([tmp_path]) == ["extra.json", "train.json"]
    assert said_in([f"{tmp_path}:validation"]) == ["dev.json"]
    assert said_in([f"{tmp_path}:test"]) == ["test/part-0.json"]
    with pytest.raises(
        UserError,
        match="no file is named for the split 'eval'; splits found: test, train, validation",
    ):
        locate(f"{tmp_path}:eval")
    assert said_in([tmp_path / "test"]) == ["test/part-0.json"], (
        "a folder that holds nothing else is what was meant"
    )


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder holds no data files"):
        iter_conversations([tmp_path])


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([AD, {"content": "r", "summary": "b"}])
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(
        str(tmp_path / "more")
    )
    datasets.DatasetDict({"test": data.select([1])}).save_to_disk(str(tmp_path / "only"))
    one = tmp_path / "one"
    assert list(iter_conversations([one])) == [
        (talk("q", "a"), f"{one}#0"),
        (talk("r", "b"), f"{one}#1"),
    ]
    assert said_in([tmp_path / "more"]) == ["a", "b"]
    assert said_in([f"{tmp_path / 'more'}:test"]) == said_in([tmp_path / "only"]) == ["b"]
    with pytest.raises(UserError, match="no split 'dev'; splits found: train, test"):
        list(iter_conversations([f"{tmp_path / 'more'}:dev"]))
    with pytest.raises(UserError, match="one data set without splits"):
        list(iter_conversations([f"{one}:train"]))


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:test", ("org/name", None, "test")),
        ("org/name:zh:test", ("org/name", "zh", "test")),
    ],
)
def test_an_id_is_loaded_from_the_hub(
    path: str, arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def load(hub_id: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((hub_id, config, split))
        return datasets.Dataset.from_list([AD])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(iter_conversations([path])) == [(talk("q", "a"), f"{path}#0")]
    assert asked == [arguments]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("\nno route to host\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        UserError, match=r"org/name: no such file.*\(ConnectionError: no route to host\)"
    ) as error:
        list(iter_conversations(["org/name"]))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path in ("data/train", "other/train.jsonl", "train", "a/b/c", "org/name:a:b:c"):
        with pytest.raises(UserError, match="no such file or folder"):
            locate(path)


@pytest.mark.parametrize("module", [files, sources])
def test_datasets_and_pyarrow_are_imported_only_when_needed(module: ModuleType) -> None:
    at_import = {
        node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.Import)
    }
    assert not {name.name for node in at_import for name in node.names} & {"datasets", "pyarrow"}


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"content": " q "}, talk("q"), None),
        (AD, talk("q"), "a"),
        ({"instruction": "q", "input": "x"}, talk("q\tx"), None),
        ({"instruction": "q", "output": " "}, talk("q"), None),
        ({"instruction": "q", "output": "a", "history": [["h", "i"]]}, talk("h", "i", "q"), "a"),
        ({"prompt": "q", "id": 7}, talk("q"), None),
        ({"prompt": "q", "completion": "a"}, talk("q"), "a"),
        ({"question": "q"}, talk("q"), None),
        ({"question": "q", "chatgpt_answers": ["a"]}, talk("q"), "a"),
        ({"query": "q", "system": "own"}, talk("q", system="own"), None),
        ({"input": "q"}, talk("q"), None),
        ({"text": "q"}, talk("q"), None),
        ({"messages": [{"role": "user", "content": "q"}]}, talk("q"), None),
        (
            {"conversation": [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}]},
            talk("q", "a", "r"),
            "b",
        ),
    ],
)
def test_a_row_to_answer_needs_no_answer(
    row: dict[str, object], prompt: Conversation, reference: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows", row)
    assert list(iter_prompts([path])) == [(prompt, reference, f"{path}:1")]


def test_no_row_to_answer_is_lost(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows", AD, {"content": " "}, {"content": 5}, {"messages": [{"role": "tool"}]}
    )
    found = list(iter_prompts([path], ReadOptions(bad_rows="skip", system="s")))
    assert [source for _, _, source in found] == [f"{path}:{line}" for line in (1, 2, 3, 4)]
    assert [getattr(prompt, "reason", None) for prompt, _, _ in found] == [
        None,
        "no question",
        "wrong type",
        "tool turns",
    ]
    assert found[0][0] == talk("q", system="s")
    with pytest.raises(UserError, match=":3: content is a number"):
        list(iter_prompts([path]))


def test_columns_for_rows_to_answer_may_name_an_answer_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", {"q": "1"}, {"q": "2", "a": "3"})
    found = [
        found[:2]
        for found in iter_prompts([path], ReadOptions(columns={"prompt": "q", "answer": "a"}))
    ]
    assert found == [(talk("1"), None), (talk("2"), "3")]
    with pytest.raises(UserError, match="no column 'x'"):
        list(iter_prompts([path], ReadOptions(columns={"prompt": "x", "answer": "a"})))
