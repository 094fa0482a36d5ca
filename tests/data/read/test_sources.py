"""Sources: paths to conversations, bad rows stopped or skipped, columns mapped, splits found."""

from __future__ import annotations

import ast
import inspect
import json
from collections import Counter
from itertools import cycle
from pathlib import Path
from types import ModuleType

import datasets
import pytest

from qwen_ds.data.read import files, sources
from qwen_ds.data.read.dialogue import Dropped
from qwen_ds.data.read.places import locate
from qwen_ds.data.read.sources import NotRead, ReadOptions, iter_conversations, iter_prompts
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, Turn

AD = {"content": "q", "summary": "a"}


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def talk(*texts: str, system: str | None = None) -> Conversation:
    return Conversation(system, tuple(map(Turn, cycle(("user", "assistant")), texts)))


def messages(texts: str) -> list[dict[str, str]]:
    """Turns of words; - is blank."""
    turns = zip(cycle(("user", "assistant")), texts.split(), strict=False)
    return [{"role": role, "content": "" if text == "-" else text} for role, text in turns]


def results_of(*paths: Path | str, **options: object) -> list[Conversation | Dropped]:
    return [result for result, _ in iter_conversations(paths, ReadOptions(**options))]  # type: ignore[arg-type]


def said_in(*paths: Path | str) -> list[str]:
    """The first answers, in order."""
    results = results_of(*paths)
    return [result.turns[1].text for result in results if isinstance(result, Conversation)]


def test_one_file_may_mix_shapes(tmp_path: Path) -> None:
    alpaca, firefly = {"instruction": "i", "output": "b"}, {"conversation": [{"human": "h"}]}
    path = write(tmp_path / "rows", AD, alpaca, firefly)
    dropped = Dropped("no answer", "turn 2 has no text")
    assert list(iter_conversations([path])) == [
        (talk("q", "a"), f"{path}:1"),
        (talk("i", "b"), f"{path}:2"),
        (dropped, f"{path}:3"),
    ]


def test_turns_that_are_left_out_are_counted(tmp_path: Path) -> None:
    said = {
        "q a": [], "q a q2": ["a last question without an answer"],
        "q a q2 - q3 a3": ["turns from a blank one on"], "q a - a2": ["turns from a blank one on"],
        "q a -": [], "q -": [],
    }  # fmt: skip
    for texts, expected in said.items():
        path = str(write(tmp_path / "rows", {"messages": messages(texts)}))
        not_read: NotRead = {}
        list(iter_conversations([path], not_read=not_read))
        assert not_read == {path: dict.fromkeys(expected, 1)}, texts


def test_an_unanswered_last_question_is_what_a_prompt_asks(tmp_path: Path) -> None:
    talks = [{"messages": messages(texts)} for texts in ("q a q2", "q a", "q a q2 - q3 a3")]
    path = str(write(tmp_path / "rows", *talks))
    not_read: NotRead = {}
    prompts = [prompt for prompt, _, _ in iter_prompts([path], not_read=not_read)]
    asked = [prompt.turns[-1].text for prompt in prompts if isinstance(prompt, Conversation)]
    assert asked == ["q2", "q", "q2"]
    assert not_read == {path: {"turns from a blank one on": 1}}


def test_rows_without_a_system_text_get_the_given_one(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", AD, {**AD, "system": "own"}, {**AD, "system": " "})
    systems = [getattr(result, "system", None) for result in results_of(path, system="s")]
    assert systems == ["s", "own", "s"]


def test_counts_tell_rows_read_kept_and_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", AD, {**AD, "summary": ""}, {"content": 5, "summary": "a"}, AD)
    counts: Counter[str] = Counter()
    results = list(iter_conversations([path], ReadOptions(bad_rows="skip"), counts))
    assert counts == {"rows": 4}
    dropped = [result for result, _ in results if isinstance(result, Dropped)]
    assert [result.unreadable for result in dropped] == [False, True]


def test_a_row_that_gives_nothing_names_its_keys_and_the_expected_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", {"instruction": "q", "Output": "a"})
    detail = "keys found: instruction, Output; keys expected: instruction"
    assert results_of(path) == [Dropped("no answer", detail)]
    write(path, {**AD, "summary": None})
    detail = "keys found: content, summary; keys expected: content + summary"
    assert results_of(path, format="adgen") == [Dropped("no answer", detail)]


UNREADABLE = [
    ('{"content": "q"', "not valid JSON", "not valid JSON: Expecting ',' delimiter"),
    ('{"content": 5, "summary": "a"}', "wrong type", "content is a number; expected text"),
    ('{"contents": "q"}', "unknown keys", "keys found: contents; keys expected: "),
    ('{"messages": [{"role": "bot"}]}', "unknown role", "role is 'bot'; expected one of system"),
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
    assert isinstance(bad, Dropped) and bad.reason == reason and bad.unreadable
    assert bad.detail.startswith(detail) and source == f"{path}:2"


def test_a_named_format_reads_only_its_own_keys(tmp_path: Path) -> None:
    alpaca = {"instruction": "i", "output": "b"}
    path = write(tmp_path / "rows", {**AD, **alpaca}, alpaca)
    rows = iter_conversations([path], ReadOptions(format="adgen"))
    assert next(rows)[0] == talk("q", "a")
    message = ":2: keys found: instruction, output; keys expected: content [+] summary .format"
    with pytest.raises(UserError, match=message):
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
    rows = {"q": "1", "a": "2", "s": "3", **AD}, {"q": "1", "a": "2", "system": "not mapped"}
    path = write(tmp_path / "rows", *rows)
    assert results_of(path, columns=COLUMNS) == [talk("1", "2", system="3"), talk("1", "2")]
    alpaca = {"instruction": "q", "input": "s", "output": "a"}
    assert results_of(path, columns=alpaca)[0] == talk("1\t3", "2")
    turns = [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]
    path = write(tmp_path / "turns", {"talk": turns})
    assert results_of(path, columns={"messages": "talk"}) == [talk("1", "2")]


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", {"q": "1", "a": "2"})
    message = r"rows:1: no column 's' \(data.columns.system\); keys found: q, a"
    for bad_rows in ("stop", "skip"):
        with pytest.raises(UserError, match=message):
            results_of(path, columns=COLUMNS, bad_rows=bad_rows)
    write(path, {"q": "1", "a": "2", "s": "3"}, {"q": "1"}, {"q": "1", "a": "2"})
    _, bad, last = results_of(path, columns=COLUMNS, bad_rows="skip")
    assert isinstance(bad, Dropped) and bad.reason == "missing key" and bad.unreadable
    # A column that its format can do without may be absent further on.
    assert last == talk("1", "2")


def test_columns_must_name_the_keys_of_a_format(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", AD)
    with pytest.raises(UserError, match="data.columns has the key 'q'; expected keys of a format"):
        iter_conversations([path], ReadOptions(columns={"q": "prompt"}))
    message = "data.columns names prompt; expected all keys of a format: .*prompt [+] response"
    with pytest.raises(UserError, match=message):
        iter_conversations([path], ReadOptions(columns={"prompt": "q"}))
    with pytest.raises(UserError, match="data.columns has the key 'prompt'"):
        iter_conversations([path], ReadOptions(format="alpaca", columns={"prompt": "q"}))


def test_an_object_of_lists_is_its_rows_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = {"x": [AD], "y": [], "z": [AD, {**AD, "summary": 5}]}
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    for columns in (None, {"prompt": "content", "answer": "summary"}):
        results = list(iter_conversations([path], ReadOptions(columns=columns, bad_rows="skip")))
        assert [source for _, source in results] == [
            f"{path}:1 {at}" for at in ("x[0]", "z[0]", "z[1]")
        ]
        assert [isinstance(result, Dropped) for result, _ in results] == [False, False, True]
    path.write_text(json.dumps({"x": [AD], "version": "1"}), encoding="utf-8")
    with pytest.raises(UserError, match="keys found: x, version"):
        list(iter_conversations([path]))


def test_a_folder_gives_its_data_files_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "sub/c.json", ".hidden/d.json", "README.md"):
        write(tmp_path / name, {**AD, "summary": name})
    assert said_in(tmp_path) == ["a.json", "b.jsonl", "sub/c.json"]
    assert said_in(tmp_path / "b.jsonl", tmp_path / "a.json") == ["b.jsonl", "a.json"]


def test_a_folder_with_splits_gives_the_one_for_training_unless_another_is_named(
    tmp_path: Path,
) -> None:
    for name in ("train.json", "dev.json", "extra.json", "test/part-0.json"):
        write(tmp_path / name, {**AD, "summary": name})
    assert said_in(tmp_path) == ["extra.json", "train.json"]
    assert said_in(f"{tmp_path}:validation") == ["dev.json"]
    assert said_in(f"{tmp_path}:test") == ["test/part-0.json"]
    message = "no split 'eval' in it; splits found: test, train, validation"
    with pytest.raises(UserError, match=message):
        locate(f"{tmp_path}:eval")
    # A folder that holds nothing else is what was meant.
    assert said_in(tmp_path / "test") == ["test/part-0.json"]


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder holds no data files"):
        iter_conversations([tmp_path])


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([AD, {"content": "r", "summary": "b"}])
    splits = {"train": data, "test": data.select([1])}
    one, more, only = (str(tmp_path / name) for name in ("one", "more", "only"))
    data.save_to_disk(one)
    datasets.DatasetDict(splits).save_to_disk(more)
    datasets.DatasetDict({"test": splits["test"]}).save_to_disk(only)
    expected = [(talk("q", "a"), f"{one}#0"), (talk("r", "b"), f"{one}#1")]
    assert list(iter_conversations([one])) == expected
    assert said_in(more) == ["a", "b"]
    assert said_in(f"{more}:test") == said_in(only) == ["b"]
    with pytest.raises(UserError, match="no split 'dev'; splits found: train, test"):
        results_of(f"{more}:dev")
    with pytest.raises(UserError, match="one data set without splits"):
        results_of(f"{one}:train")


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
    message = r"org/name: no such file.*\(ConnectionError: no route to host\)"
    with pytest.raises(UserError, match=message) as error:
        results_of("org/name")
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
    body = ast.parse(inspect.getsource(module)).body
    at_import = {name.name for node in body if isinstance(node, ast.Import) for name in node.names}
    assert not at_import & {"datasets", "pyarrow"}


FIREFLY_TURNS = [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}]


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
        ({"conversation": FIREFLY_TURNS}, talk("q", "a", "r"), "b"),
    ],
)
def test_a_row_to_answer_needs_no_answer(
    row: dict[str, object], prompt: Conversation, reference: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows", row)
    assert list(iter_prompts([path])) == [(prompt, reference, f"{path}:1")]


def test_no_row_to_answer_is_lost(tmp_path: Path) -> None:
    rows = AD, {"content": " "}, {"content": 5}, {"messages": [{"role": "tool"}]}
    path = write(tmp_path / "rows", *rows)
    found = list(iter_prompts([path], ReadOptions(bad_rows="skip", system="s")))
    assert [source for _, _, source in found] == [f"{path}:{line}" for line in (1, 2, 3, 4)]
    reasons = [getattr(prompt, "reason", None) for prompt, _, _ in found]
    assert reasons == [None, "no question", "wrong type", "tool turns"]
    assert found[0][0] == talk("q", system="s")
    with pytest.raises(UserError, match=":3: content is a number"):
        list(iter_prompts([path]))


def test_columns_for_rows_to_answer_may_name_an_answer_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", {"q": "1"}, {"q": "2", "a": "3"})
    found = list(iter_prompts([path], ReadOptions(columns={"prompt": "q", "answer": "a"})))
    assert [row[:2] for row in found] == [(talk("1"), None), (talk("2"), "3")]
    with pytest.raises(UserError, match="no column 'x'"):
        list(iter_prompts([path], ReadOptions(columns={"prompt": "x", "answer": "a"})))
