"""A model that answers a chat: cheap later turns, and what is left out when room runs out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qwen_ds.decode.exceptions import PromptTooLong
from qwen_ds.decode.paged_attention import PAGE_TOKENS
from qwen_ds.decode.request import Completion, Request
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.stop import StopRule
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, Turn, encode_prompt
from qwen_ds.model.tokenizer import Encoding, load_encoding
from serve.engine.engine import ServingEngine, stream
from serve.engine.loading import load_engine
from serve.talk.talkers import EngineTalker, Piece
from tests.serve.engine.test_adapters import make_adapter

SAMPLING = SamplingParams(max_new_tokens=40)


@pytest.fixture(scope="module")
def engine(small_dir: Path) -> ServingEngine:
    return load_engine(small_dir)


@pytest.fixture(scope="module")
def encoding(small_dir: Path) -> Encoding:
    return load_encoding(small_dir)


def chat(*texts: str) -> Conversation:
    return Conversation(
        None, tuple(Turn("assistant" if i % 2 else "user", t) for i, t in enumerate(texts))
    )


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_an_answer_is_what_the_engine_gives_to_the_same_prompt(
    engine: ServingEngine, encoding: Encoding
) -> None:
    request = Request(encode_prompt(encoding, chat("abc")), SAMPLING.of_row(0), StopRule())
    ((_, expected),) = stream(engine.start(), [request])
    assert isinstance(expected, Completion)
    for stop in (StopRule(), StopRule((expected.ids[5],))):
        talker = EngineTalker(replace(engine, stop=stop), encoding, SAMPLING)
        pieces = list(talker.reply(chat("abc")))
        kept, reason = stop.cut(expected.ids)
        assert text_of(pieces) == engine.vocabulary.decode(kept)
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [reason]
    assert len(kept) <= 5 and reason == "stop"


def test_a_second_turn_prefills_only_what_is_new(engine: ServingEngine, encoding: Encoding) -> None:
    talker = EngineTalker(engine, encoding, replace(SAMPLING, max_new_tokens=4))
    question = "abc de " * 20
    answer = text_of(list(talker.reply(chat(question))))
    figures = talker.decoding.figures
    first = figures.prefilled_tokens
    assert figures.cached_tokens == 0
    before = encode_prompt(encoding, chat(question))
    after = encode_prompt(encoding, chat(question, answer, "ok"))
    assert engine.alpha_of(len(before)) == engine.alpha_of(len(after)), "or nothing is shared"
    list(talker.reply(chat(question, answer, "ok")))
    same = len(before) // PAGE_TOKENS * PAGE_TOKENS
    assert figures.cached_tokens >= same > 90
    assert figures.prefilled_tokens - first <= len(after) - figures.cached_tokens


def test_an_answer_is_part_of_what_the_next_turn_finds(
    engine: ServingEngine, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages are there once it has ended: a text whose tokens are the generated ones."""
    engine = replace(engine, stop=StopRule())
    talker = EngineTalker(engine, encoding, SAMPLING)
    question = "abc de " * 20
    list(talker.reply(chat(question)))
    first = encode_prompt(encoding, chat(question))
    request = Request(first, SAMPLING.of_row(0), engine.stop)
    ((_, found),) = stream(engine.start(), [request])
    assert isinstance(found, Completion)
    whole = [*first, *found.ids, *encode_prompt(encoding, chat("ok"))]
    monkeypatch.setattr("serve.talk.talkers.encode_prompt", lambda *_: whole)
    list(talker.reply(chat("whatever")))
    known = len(first) + len(found.ids) - 1  # the last token was never run
    assert talker.decoding.figures.cached_tokens == known // PAGE_TOKENS * PAGE_TOKENS
    assert known // PAGE_TOKENS > len(first) // PAGE_TOKENS


def test_the_oldest_exchanges_are_left_out_and_counted(
    engine: ServingEngine, encoding: Encoding
) -> None:
    talker = EngineTalker(engine, encoding, SAMPLING)
    turns = ("a" * 150, "b" * 150, "c" * 150, "d" * 20, "e")
    pieces = list(talker.reply(chat(*turns)))
    assert pieces[0].left_out == 1 and all(piece.left_out == 0 for piece in pieces[1:])
    alone = EngineTalker(engine, encoding, SAMPLING)
    assert text_of(pieces) == text_of(list(alone.reply(chat(*turns[2:]))))
    with pytest.raises(PromptTooLong, match="expected at most 472"):
        next(talker.reply(chat("x", "y", "z" * 600)))


def test_a_long_answer_takes_what_the_context_leaves(
    engine: ServingEngine, encoding: Encoding
) -> None:
    many = SamplingParams(max_new_tokens=100_000)
    talker = EngineTalker(replace(engine, stop=StopRule()), encoding, many)
    pieces = list(talker.reply(chat("a" * 150)))
    prompt = len(encode_prompt(encoding, chat("a" * 150)))
    assert talker.decoding.figures.generated_tokens == 512 - prompt
    assert pieces[-1].finish_reason == "length"


def test_a_small_memory_is_a_small_room(engine: ServingEngine, encoding: Encoding) -> None:
    memory_gb = 130 * engine.shape.bytes_per_token / 1e9
    talker = EngineTalker(engine, encoding, SAMPLING, memory_gb)
    assert talker.room == 128
    pieces = list(talker.reply(chat("a" * 60, "b" * 30, "c")))
    assert pieces[0].left_out == 1


def test_an_answer_that_is_left_is_cancelled_and_the_next_one_is_right(
    engine: ServingEngine, encoding: Encoding
) -> None:
    talker = EngineTalker(engine, encoding, SAMPLING)
    expected = text_of(list(talker.reply(chat("abc"))))
    pieces = talker.reply(chat("other"))
    for _ in range(5):
        next(pieces)
    pieces.close()
    assert not talker.decoding.is_busy
    assert text_of(list(talker.reply(chat("abc")))) == expected


def test_another_try_draws_another_answer(engine: ServingEngine, encoding: Encoding) -> None:
    def answers() -> list[str]:
        talker = EngineTalker(engine, encoding, replace(SAMPLING, do_sample=True, temperature=2.0))
        return [text_of(list(talker.reply(chat("abc")))) for _ in range(3)]

    assert len(set(answers())) == 3 and answers() == answers()


def test_each_reply_comes_from_the_adapter_in_use(
    small_dir: Path, encoding: Encoding, tmp_path: Path
) -> None:
    """The first named one at the start; the same conversation goes on with another, or the base."""
    folders = {
        name: make_adapter(small_dir, tmp_path / name, {"target_modules": [module]}, 1)
        for name, module in (("zh", "c_attn"), ("law", "c_proj"))
    }

    def talker(adapters: dict[str, Path]) -> EngineTalker:
        return EngineTalker(load_engine(small_dir, adapters=adapters), encoding, SAMPLING)

    def reply(one: EngineTalker) -> str:
        return text_of(list(one.reply(chat("abc"))))

    alone = {name: reply(talker({"default": folder})) for name, folder in folders.items()}
    alone["base"] = reply(talker({}))
    assert len(set(alone.values())) == 3
    one = talker(folders)
    assert one.use_adapter("") == "adapter: zh (of zh, law, base)"
    assert reply(one) == alone["zh"]
    for name in ("law", "base", "zh"):
        assert one.use_adapter(name).startswith(f"adapter: {name} ")
        assert reply(one) == alone[name]
    with pytest.raises(UserError, match="/adapter no: no such adapter; expected one of: zh, law"):
        one.use_adapter("no")
    assert reply(one) == alone["zh"]
    both = talker({"zh": folders["zh"], "default": folders["law"]})
    assert both.use_adapter("") == "adapter: default (of zh, default)"
    assert reply(both) == alone["law"]
    for adapters in ({}, {"default": folders["zh"]}):
        with pytest.raises(UserError, match="no adapter has a name; expected --adapter NAME=DIR"):
            talker(adapters).use_adapter("zh")


def test_a_reply_that_must_be_long_is_as_long_as_the_room(
    engine: ServingEngine, encoding: Encoding
) -> None:
    many = SamplingParams(max_new_tokens=600, min_tokens=600)
    pieces = list(EngineTalker(engine, encoding, many).reply(chat("abc")))
    assert pieces[-1].finish_reason == "length"
