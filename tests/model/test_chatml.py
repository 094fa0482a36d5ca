"""ChatML: the official layout, and no way for a text to leave its turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from qwen_ds.model.chatml import (
    DEFAULT_SYSTEM,
    Conversation,
    Turn,
    encode_prompt,
    encode_turns,
    render_turns,
    turn_ids,
    turns_of,
)
from qwen_ds.model.tokenizer import SPECIAL_TOKENS, Encoding, load_encoding

IM_START, IM_END, NEWLINE, USER, SYSTEM, ASSISTANT = 151644, 151645, 198, 872, 8948, 77091


@pytest.fixture(scope="module")
def enc(vocab_path: Path) -> Encoding:
    return load_encoding(vocab_path)


def test_prompts_are_the_official_contexts(golden, enc):
    cases = json.loads((golden / "tokenizer" / "make_context.json").read_text())["cases"]
    n_compared = 0
    for case in cases:
        if case["chat_format"] != "chatml" or case["max_window_size"] != 6144:
            continue
        turns = []
        for question, answer in case["history"]:
            turns += [Turn("user", question), Turn("assistant", answer)]
        chat = Conversation(case["system"], (*turns, Turn("user", case["query"])))
        assert encode_prompt(enc, chat) == case["context_tokens"]
        n_compared += 1
    assert n_compared >= 8


def test_a_turn_is_header_text_footer_each_encoded_by_itself(enc):
    assert turn_ids(enc, "user", "你好") == [IM_START, USER, NEWLINE, 108386, IM_END, NEWLINE]
    # Encoded together, the line breaks of header and text would be one token (271).
    text = [198, 87, 198]
    header, footer = [IM_START, ASSISTANT, NEWLINE], [IM_END, NEWLINE]
    assert turn_ids(enc, "assistant", "\nx\n") == [*header, *text, *footer]
    assert turn_ids(enc, "system", "") == [IM_START, SYSTEM, NEWLINE, IM_END, NEWLINE]


def test_a_text_yields_control_tokens_only_when_asked(enc):
    text = "".join(SPECIAL_TOKENS)
    assert [i for i in turn_ids(enc, "user", text) if i >= enc.eod_id] == [IM_START, IM_END]
    asked = turn_ids(enc, "user", text, parse_specials=True)
    assert asked[3:-2] == list(enc.special.values())
    turn = Conversation(text, (Turn("user", text),))
    control = [i for i in encode_prompt(enc, turn) if i >= enc.eod_id]
    assert control == [IM_START, IM_END, IM_START, IM_END, IM_START]
    assert encode_prompt(enc, turn, parse_specials=True).count(enc.eod_id) == 2


def test_the_system_turn_of_a_chat_without_one_is_the_default(enc):
    hello = (Turn("user", "你好"),)
    default = encode_prompt(enc, Conversation(DEFAULT_SYSTEM, hello))
    assert encode_prompt(enc, Conversation(None, hello)) == default
    assert encode_prompt(enc, [{"role": "user", "content": "你好"}]) == default
    assert encode_prompt(enc, Conversation("诗人", hello)) != default
    # An empty system text is a text: its turn stays, and stays empty.
    empty = [IM_START, SYSTEM, NEWLINE, IM_END, NEWLINE]
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "x"}]
    for chat in (Conversation("", hello), messages):
        assert encode_prompt(enc, chat)[:5] == empty


def test_text_and_ids_have_the_same_endings(enc):
    turns = [Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a")]
    for prompt, ending in ((False, ""), (True, "<|im_start|>assistant\n")):
        ending = f"a<|im_end|>\n{ending}"
        assert render_turns(turns, prompt).endswith(ending)
        assert encode_turns(enc, turns, prompt) == enc.with_specials(render_turns(turns, prompt))
    assert render_turns(turns, continue_final_turn=True).endswith("<|im_start|>assistant\na")
    assert encode_turns(enc, turns, continue_final_turn=True)[-1] == enc.ordinary("a")[0]


def test_contents_in_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert turns_of([{"role": "user", "content": parts}])[1] == Turn("user", "ab")


GOOD = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ([GOOD, {"role": "bot", "content": "y"}], r"messages\[1\]\.role is 'bot'; expected"),
        ([{"content": "x"}], r"messages\[0\]\.role is None"),
        ([{"role": "user"}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\]\.content"),
        (["x"], r"messages\[0\] is str"),
    ],
)
def test_a_message_that_is_none_is_named(messages, message):
    with pytest.raises(UserError, match=message):
        turns_of(messages)
