"""Options of decoding, from a command's parser to the answer: here, in a chat, at a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, Turn
from qwen_ds.model.tokenizer import load_encoding
from serve.chat import open_talker
from serve.files.parts import SETTINGS_FILE, PredictionParts, parts_folder
from serve.files.prediction import predict, settings_of
from serve.files.sources import find_source
from serve.options import PredictOptions, parse
from serve.talk.interrupts import Interrupts
from serve.talk.options import ChatOptions
from tests.serve.files.test_prediction import interrupted, read_lines, write_rows
from tests.serve.scripted_server import Body, Handler, answer_to, scripted

Line = dict[str, Any]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
LEAST = {**SCHEMA, "additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", [{"content": f"abc {i}"} for i in range(3)])


def words_for(model: Path, rows: Path, output: Path, *more: str) -> list[str]:
    words = ["--model", str(model), "--input", str(rows), "--output", str(output)]
    return [*words, "--max_new_tokens", "12", *more]


@pytest.fixture
def lines_of(small_dir: Path, rows: Path, tmp_path: Path) -> Callable[..., list[Line]]:
    def run(*more: str) -> list[Line]:
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        options = parse(PredictOptions, "", words_for(small_dir, rows, output, *more))
        predict(options.model, options.input, output, options)
        return read_lines(output)

    return run


def texts(lines: list[Line]) -> list[str]:
    return [line["prediction"] for line in lines]


def test_biases_penalties_and_ends_act(
    lines_of: Callable[..., list[Line]], small_dir: Path
) -> None:
    plain = lines_of("--ignore_eos")
    assert [line["completion_tokens"] for line in plain] == [12] * 3
    assert {line["finish_reason"] for line in plain} == {"length"}
    encoding = load_encoding(small_dir)
    star = encoding.ordinary("*")[0]
    bias = ("--ignore_eos", "--logit_bias", json.dumps({star: 100}))
    assert texts(lines_of(*bias)) == ["*" * 12] * 3
    for option, strong in (("presence", "2"), ("frequency", "2"), ("repetition", "50")):
        changed = texts(lines_of("--ignore_eos", f"--{option}_penalty", strong))
        assert changed != texts(plain), option
    end = encoding.special["<|im_end|>"]
    always = ("--logit_bias", json.dumps({end: 100}))
    assert texts(lines_of(*always)) == [""] * 3
    least = lines_of(*always, "--min_tokens", "5")
    assert [line["completion_tokens"] for line in least] == [5] * 3


def test_min_p_leaves_the_most_probable_token(lines_of: Callable[..., list[Line]]) -> None:
    hot = ("--do_sample", "--temperature", "5", "--top_p", "1", "--top_k", "0")
    greedy = texts(lines_of())
    assert texts(lines_of(*hot)) != greedy
    assert texts(lines_of(*hot, "--min_p", "1")) == greedy


def test_stop_texts_end_an_answer_and_are_no_part_of_it(
    lines_of: Callable[..., list[Line]], small_dir: Path
) -> None:
    encoding = load_encoding(small_dir)
    bias = {encoding.ordinary(letter)[0]: 90 for letter in "[]"}
    words = ("--ignore_eos", "--logit_bias", json.dumps(bias), "--frequency_penalty", "2")
    (whole, *_) = texts(lines_of(*words))
    stop = whole[3:5]
    for given in ([stop], ["never", stop], [json.dumps([stop])]):
        (line, *_) = lines_of(*words, "--stop", *given)
        assert line["prediction"] == whole[: whole.index(stop)]
        assert line["finish_reason"] == "stop"


def test_structures_hold_every_answer(lines_of: Callable[..., list[Line]], tmp_path: Path) -> None:
    assert set(texts(lines_of("--choice", "好", "不好"))) <= {"好", "不好"}
    assert all(text in ("[A]", "[B]") for text in texts(lines_of("--regex", r"\[[AB]\]")))
    assert texts(lines_of("--choice", "[A]")) == ["[A]"] * 3
    (tmp_path / "schema.json").write_text(json.dumps(LEAST))
    for given in (json.dumps(LEAST), str(tmp_path / "schema.json")):
        found = texts(lines_of("--json_schema", given))
        assert all(json.loads(text)["a"] in (1, 2) for text in found)
    objects = texts(lines_of("--json_object"))
    assert all(text.lstrip().startswith("{") for text in objects)


def test_a_token_that_ends_an_answer_has_no_logprobs_in_it(
    lines_of: Callable[..., list[Line]], small_dir: Path
) -> None:
    end = load_encoding(small_dir).special["<|im_end|>"]
    words = ("--logit_bias", json.dumps({end: 100}), "--min_tokens", "3", "--logprobs", "0")
    for line in lines_of(*words):
        assert (line["finish_reason"], line["completion_tokens"]) == ("stop", 3)
        assert len(line["logprobs"]) == 3


def test_logprobs_are_those_of_the_answers_tokens(lines_of: Callable[..., list[Line]]) -> None:
    plain, lines = lines_of(), lines_of("--logprobs", "2")
    for line, without in zip(lines, plain, strict=True):
        told = line.pop("logprobs")
        assert line == without and len(told) == line["completion_tokens"]
        raw = b"".join(bytes(one["bytes"]) for one in told)
        assert raw.decode(errors="replace") == line["prediction"]
        for one in told:
            best, other = one["top_logprobs"]
            assert 0 > best["logprob"] >= other["logprob"]
            assert one["logprob"] == best["logprob"] and one["token"] == best["token"], "greedy"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--json_schema", '{"type": "integer", "minimum": 5, "maximum": 2}'), "greater than max"),
        (("--json_schema", '{"type": '), "--json_schema: not JSON"),
        (("--json_schema", "none.json"), "none.json: No such file"),
        (("--json_schema", '{"type": "object", "type": "array"}'), "the key 'type' comes twice"),
        (("--json_schema", ""), "--json_schema is empty"),
        (("--regex=",), "--regex is empty; expected a text"),
        (("--regex", "("), "--regex is refused"),
        (("--regex", "a", "--choice", "b"), "--regex and --choice are given; expected one"),
        (("--choice", "a", ""), "--choice has an empty text"),
        (("--stop", ""), "--stop has an empty text"),
        (("--min_p", "2"), "min_p is 2.0; expected 0 to 1"),
        (("--presence_penalty", "3"), "presence_penalty is 3.0; expected -2 to 2"),
        (("--min_tokens", "99"), "min_tokens is 99; expected 0 to max_new_tokens"),
        (("--logprobs", "21"), "logprobs is 21; expected 0 to 20"),
        (
            ("--logit_bias", '{"512": 1}'),
            "--logit_bias has the token 512; expected token ids below",
        ),
        (("--logit_bias", '{"3": 101}'), "logit_bias is"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(
    lines_of: Callable[..., list[Line]],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("serve.files.sources.load_engine", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=message) as error:
        lines_of(*words)
    assert "\n" not in str(error.value)


LATER = [
    ("min_p", ("--min_p", "0.5")), ("repetition_penalty", ("--repetition_penalty", "2")),
    ("presence_penalty", ("--presence_penalty", "1")),
    ("frequency_penalty", ("--frequency_penalty", "1")),
    ("logit_bias", ("--logit_bias", '{"3": 1}')), ("min_tokens", ("--min_tokens", "3")),
    ("ignore_eos", ("--ignore_eos",)), ("stop", ("--stop", "x")), ("logprobs", ("--logprobs", "0")),
    ("num_beams", ("--num_beams", "2")), ("regex", ("--regex", "a+")),
    ("choice", ("--choice", "a", "b")), ("json_object", ("--json_object",)),
    ("json_schema", ("--json_schema", json.dumps(SCHEMA))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "words"), LATER, ids=[name for name, _ in LATER])
def test_a_resumed_run_has_the_same_options(
    small_dir: Path, rows: Path, tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    """They are written as JSON reads them, and not at all where they have their defaults: folders
    of earlier releases are resumed."""
    output = tmp_path / "out"

    def settings(*more: str) -> dict[str, Any]:
        options = parse(PredictOptions, "", words_for(small_dir, rows, output, *more))
        return settings_of(find_source(str(small_dir), options), options.input, options)

    assert name not in settings()
    PredictionParts.prepare(output, settings(*words), 3, overwrite=False).close()
    card = json.loads((parts_folder(output) / SETTINGS_FILE).read_text())["settings"]
    assert card == settings(*words) and card != settings()
    assert card[name] not in (None, [], {})


def test_a_schema_that_was_changed_is_another_schema(
    small_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema, output = tmp_path / "schema.json", tmp_path / "out"
    schema.write_text(json.dumps(SCHEMA))
    words = words_for(small_dir, rows, output, "--json_schema", str(schema))

    def run() -> None:
        options = parse(PredictOptions, "", words)
        predict(options.model, options.input, output, options)

    with monkeypatch.context() as patch:
        interrupted(patch, after=1)
        with pytest.raises(KeyboardInterrupt):
            run()
    schema.write_text(json.dumps(LEAST))
    with pytest.raises(UserError, match="interrupted run with json_schema"):
        run()


def test_a_chat_takes_them_too(small_dir: Path) -> None:
    def reply(*more: str) -> str:
        words = ["--model", str(small_dir), "--max_new_tokens", "9", *more]
        talker = open_talker(parse(ChatOptions, "", words), Interrupts())
        asked = Conversation(None, (Turn("user", "abc"),))
        return "".join(piece.text for piece in talker.reply(asked))

    assert reply("--choice", "[A]") == "[A]"
    whole = reply("--ignore_eos", "--logit_bias", '{"9": 100}')
    assert len(whole) == 9 and len(set(whole)) == 1
    assert reply("--ignore_eos", "--logit_bias", '{"9": 100}', "--stop", whole[:3]) == ""
    with pytest.raises(UserError, match="--regex is refused"):
        reply("--regex", "(")
    with pytest.raises(UserError, match="unknown option logprobs"):
        reply("--logprobs", "1")


def test_a_server_gets_what_differs_from_the_defaults(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sent(*more: str) -> Body:
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        words = ["--endpoint", server.url, "--input", str(rows), "--output", str(output)]
        options = parse(PredictOptions, "", [*words, "--limit", "1", *more])
        predict(None, options.input, output, options)
        body = server.bodies[-1]
        return {name: body[name] for name in body.keys() - plain.keys()}

    plain: Body = {}
    with scripted() as server:
        plain = sent()
        assert set(plain) == {"model", "max_tokens", "temperature", "stream", "messages"}
        assert sent("--stop", "a", "b", "--min_tokens", "3", "--ignore_eos") == {
            "stop": ["a", "b"], "min_tokens": 3, "ignore_eos": True,
        }  # fmt: skip
        penalties = ("--presence_penalty", "1", "--frequency_penalty", "-1")
        assert sent(*penalties, "--repetition_penalty", "1.5", "--logit_bias", '{"7": -3}') == {
            "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.5,
            "logit_bias": {"7": -3.0},
        }  # fmt: skip
        assert sent("--do_sample", "--min_p", "0.1")["min_p"] == 0.1
        assert sent("--logprobs", "4") == {"logprobs": True, "top_logprobs": 4}
        assert sent("--json_object") == {"response_format": {"type": "json_object"}}
        held = {"name": "answer", "schema": SCHEMA, "strict": True}
        assert sent("--json_schema", json.dumps(SCHEMA)) == {
            "response_format": {"type": "json_schema", "json_schema": held}
        }
        capsys.readouterr()
        assert sent("--regex", "a+") == {"structured_outputs": {"regex": "a+"}}
        assert "--regex is sent as structured_outputs" in capsys.readouterr().out
        assert sent("--choice", "a", "b") == {"structured_outputs": {"choice": ["a", "b"]}}
        for words in (("--num_beams", "2"), ("--adapter", "a=b"), ("--adapter_column", "c")):
            with pytest.raises(UserError, match=f"{words[0]} is for a model here"):
                sent(*words)


def test_a_servers_logprobs_are_carried_as_they_are(rows: Path, tmp_path: Path) -> None:
    told = [{"token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": []}]

    def telling(handler: Handler, body: Body, _: int) -> bool:
        if body:
            message = {"content": answer_to(body)}
            handler.reply(200, {"choices": [{"message": message, "logprobs": {"content": told}}]})
        return bool(body)

    with scripted(telling) as server:
        words = ["--endpoint", server.url, "--input", str(rows), "--output", str(tmp_path / "o")]
        options = parse(PredictOptions, "", [*words, "--logprobs", "1"])
        predict(None, options.input, tmp_path / "o", options)
    assert [line["logprobs"] for line in read_lines(tmp_path / "o")] == [told] * 3
