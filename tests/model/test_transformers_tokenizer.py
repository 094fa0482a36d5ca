"""Both tokenizers against the official one's numbers (golden/tokenizer), and in the hands of
transformers."""

from __future__ import annotations

import base64
import builtins
import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizer

import qwen_ds  # noqa: F401  # registers the classes
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import CHAT_TEMPLATE
from qwen_ds.model.tokenizer import SPECIAL_TOKENS, Encoding, load_encoding
from qwen_ds.model.transformers_tokenizer import QWenTokenizer

SETS = {"set()": (), "all": "all", "im": {"<|im_start|>", "<|im_end|>"}, "eot": {"<|endoftext|>"}}


def message(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


HELLO, TWICE = [message("user", "你好")], [message("user", "你好 你好")]


@pytest.fixture(scope="module")
def tok(vocab_path: Path) -> QWenTokenizer:
    return QWenTokenizer(str(vocab_path))


@pytest.fixture(scope="module")
def enc(vocab_path: Path) -> Encoding:
    return load_encoding(vocab_path)


def load(golden: Path, name: str) -> Any:
    return json.loads((golden / "tokenizer" / name).read_text())


def test_ids_of_every_golden_string_are_the_official_ones(golden, tok, enc):
    cases = load(golden, "encode.json")["cases"]
    assert len(cases) == 319
    for case in cases:
        text, ids = case["text"], case["ids"]
        ordinary = ids if case["ids_no_special"] == "same" else case["ids_no_special"]
        assert tok(text)["input_ids"] == ids, case
        assert tok.encode(text) == enc.with_specials(text) == ids, case
        assert tok(text, split_special_tokens=True)["input_ids"] == ordinary, case
        assert tok(text, allowed_special=set())["input_ids"] == enc.ordinary(text) == ordinary, case
        if "ids_im_only" in case:
            assert tok(text, allowed_special=SETS["im"])["input_ids"] == case["ids_im_only"], case


def test_disallowed_special_tokens_raise_as_in_the_official_tokenizer(golden, tok):
    n_refused = 0
    for case in load(golden, "encode.json")["cases"]:
        for sets, outcome in case["disallowed"].items():
            allowed, disallowed = (SETS[name] for name in sets.split("/"))
            if outcome == "ok":
                tok(case["text"], allowed_special=allowed, disallowed_special=disallowed)
            else:
                n_refused += 1
                with pytest.raises(ValueError):
                    tok(case["text"], allowed_special=allowed, disallowed_special=disallowed)
    assert n_refused > 50


def test_tokens_and_decoded_texts_of_every_golden_string(golden, tok, enc):
    for case in load(golden, "encode.json")["cases"]:
        decoded = case["text"] if case["decode"] == "same" else case["decode"]
        skipped = decoded if case["decode_skip_special"] == "same" else case["decode_skip_special"]
        assert tok.decode(case["ids"]) == enc.decode(case["ids"]) == decoded, case
        assert tok.decode(case["ids"], skip_special_tokens=True) == skipped, case
        for stored in [case["tokens_b64"]] if "tokens_b64" in case else []:
            tokens = [t["special"] if isinstance(t, dict) else base64.b64decode(t) for t in stored]
            assert tok.tokenize(case["text"]) == tokens, case
            assert tok.convert_ids_to_tokens(case["ids"]) == tokens, case
            assert tok.convert_tokens_to_ids(tokens) == case["ids"], case


@pytest.mark.parametrize(
    ("key", "kwargs"),
    [
        ("decode", {}),
        ("decode_skip_special", {"skip_special_tokens": True}),
        ("decode_ignore", {"errors": "ignore"}),
        ("decode_strict", {"errors": "strict"}),
    ],
)
def test_decoding_of_cut_characters_specials_and_unknown_ids_is_the_official_one(
    golden, tok, key, kwargs
):
    cases = load(golden, "decode.json")
    assert len(cases) == 92
    for case in cases:
        if isinstance(case[key], dict):
            with pytest.raises(getattr(builtins, case[key]["error"])):
                tok.decode(case["ids"], **kwargs)
        else:
            assert tok.decode(case["ids"], **kwargs) == case[key], case


def test_decoding_by_way_of_tokens_is_the_official_one(golden, tok):
    for case in load(golden, "decode.json"):
        if isinstance(case["via_tokens"], dict):
            with pytest.raises(ValueError):
                tok.convert_ids_to_tokens(case["ids"])
        else:
            tokens = tok.convert_ids_to_tokens(case["ids"])
            assert tok.convert_tokens_to_string(tokens) == case["via_tokens"], case


def test_special_ids_follow_the_ranks_of_whatever_vocabulary(golden, tok):
    facts = load(golden, "facts.json")
    assert [[i, token] for token, i in tok.special_tokens.items()] == facts["special_tokens"]
    assert len(tok) == tok.vocab_size == tok.encoding.n_vocab == facts["n_vocab"]
    assert len(tok.mergeable_ranks) == facts["n_mergeable_ranks"]
    assert len(tok.get_vocab()) == facts["n_vocab"]
    ids = (tok.eod_id, tok.im_start_id, tok.im_end_id)
    assert ids == (facts["eod_id"], facts["im_start_id"], facts["im_end_id"])

    mini = load(golden, "mini.json")
    small = QWenTokenizer(str(golden / "small" / "mini.tiktoken"))
    assert (small.eod_id, small.vocab_size) == (mini["special_start"], mini["n_vocab"])
    assert small.encoding.special[SPECIAL_TOKENS[-1]] == mini["n_vocab"] - 1
    for case in mini["cases"]:
        assert small(case["text"])["input_ids"] == case["ids"], case
        assert small.encoding.ordinary(case["text"]) == case["ids_no_special"], case
        assert small.decode(case["ids"]) == case["decode"], case
        skipped = small.decode(case["ids"], skip_special_tokens=True)
        assert skipped == case["decode_skip_special"], case


def test_token_lookup_is_the_official_one(golden, tok):
    for token, index in load(golden, "facts.json")["convert_tokens_to_ids"]:
        token = base64.b64decode(token["b64"]) if isinstance(token, dict) else token
        assert tok.convert_tokens_to_ids(token) == index


def test_padding_and_truncation_give_the_official_batches(golden, vocab_path):
    facts = load(golden, "facts.json")
    n_compared = 0
    for call in facts["calls"]:
        if "error" in call:
            continue
        tok = QWenTokenizer(str(vocab_path))
        if "extra_0" in call["name"]:
            tok = QWenTokenizer(str(vocab_path), pad_token="<|extra_0|>", padding_side="left")
        texts = call["texts"] if call["name"] == "text pair" else [call["texts"]]
        batch = tok(*texts, **call["kwargs"])
        assert dict(batch) == {key: call[key] for key in facts["model_input_names"]}, call["name"]
        n_compared += 1
    assert n_compared == 6


def test_defaults_are_the_official_ones_but_for_padding_and_eos(golden, tok, vocab_path):
    facts = load(golden, "facts.json")
    assert tok.model_input_names == facts["model_input_names"]
    assert (tok.padding_side, tok.truncation_side) == ("right", "right")
    assert tok.bos_token is None and tok.unk_token is None
    # A batch pads without further ado, with what training pads with.
    assert tok.pad_token_id == tok.eos_token_id == tok.eod_id == 151643
    batch = tok(["a", "a b"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[64, 151643], [64, 293]]
    names = {"pad_token": "<|extra_0|>", "eos_token": "<|endoftext|>"}
    as_in_readme = QWenTokenizer(str(vocab_path), **names)
    assert [as_in_readme.pad_token_id, as_in_readme.eos_token_id] == [151646, 151643]
    as_in_readme.pad_token_id = as_in_readme.eod_id
    assert (as_in_readme.pad_token, as_in_readme.pad_token_id) == ("<|endoftext|>", 151643)


def test_the_vocabulary_cannot_grow(tok, vocab_path):
    n_tokens = len(tok)
    for refused in (
        lambda: tok.add_tokens(["new"]),
        lambda: tok.add_special_tokens({"extra_special_tokens": ["<|new|>"]}),
        lambda: QWenTokenizer(str(vocab_path), pad_token="<|PAD|>"),
    ):
        with pytest.raises(ValueError, match="fixed"):
            refused()
    assert tok.add_special_tokens({"pad_token": "<|endoftext|>"}) == 0
    assert len(tok) == n_tokens


def test_pickles_and_copies_give_the_same_ids_without_the_file(vocab_path, tmp_path):
    path = tmp_path / "qwen.tiktoken"
    shutil.copy(vocab_path, path)
    tok = QWenTokenizer(str(path), padding_side="left")
    path.unlink()
    for other in (pickle.loads(pickle.dumps(tok)), copy.deepcopy(tok)):
        assert other.padding_side == "left"
        assert other("你好<|im_end|>")["input_ids"] == tok("你好<|im_end|>")["input_ids"]
        # Built once a process, however often it arrives: a worker that gets it with every task
        # stays fast.
        assert other.encoding is tok.encoding
    assert len(tok.encoding.sha256) == 64


def test_a_folder_with_nothing_but_the_vocabulary_is_enough(vocab_path, tmp_path):
    shutil.copy(vocab_path, tmp_path / "qwen.tiktoken")
    tok = QWenTokenizer.from_pretrained(tmp_path)
    assert tok("<|im_end|>x")["input_ids"] == [151645, 87]
    (tmp_path / "qwen.tiktoken").unlink()
    with pytest.raises(UserError, match=r"has no qwen\.tiktoken"):
        QWenTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
@pytest.mark.parametrize("has_tokenizer_config", [True, False])
def test_auto_tokenizer_takes_ours_and_runs_no_code_of_the_folder(
    full_dir, tmp_path, trust_remote_code, has_tokenizer_config
):
    shutil.copy(full_dir / "config.json", tmp_path)
    shutil.copy(full_dir / "qwen.tiktoken", tmp_path)
    if has_tokenizer_config:
        shutil.copy(full_dir / "tokenizer_config.json", tmp_path)
        assert "auto_map" in (tmp_path / "tokenizer_config.json").read_text()
    for name in ("tokenization_qwen.py", "configuration_qwen.py", "modeling_qwen.py"):
        code = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        (tmp_path / name).write_text(code)
    tok = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trust_remote_code)
    assert type(tok) is QWenTokenizer
    assert not (tmp_path / "ran").exists()
    assert tok("你好")["input_ids"] == [108386]
    if has_tokenizer_config:
        assert tok.model_max_length == 32768


def test_a_saved_folder_loads_again_and_names_no_code(full_dir, vocab_path, tmp_path):
    options = {"errors": "ignore", "padding_side": "left", "pad_token": "<|extra_0|>"}
    tok = AutoTokenizer.from_pretrained(full_dir, **options)
    saved = tok.save_pretrained(tmp_path)
    assert (tmp_path / "qwen.tiktoken").read_bytes() == vocab_path.read_bytes()
    assert str(tmp_path / "qwen.tiktoken") in saved
    assert "auto_map" not in (tmp_path / "tokenizer_config.json").read_text()
    shutil.copy(full_dir / "config.json", tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is QWenTokenizer
    assert (again.errors, again.padding_side, again.pad_token_id) == ("ignore", "left", 151646)
    assert again.model_max_length == 32768
    assert again.decode([255]) == ""


def test_chats_become_the_official_context(golden, tok):
    n_compared = 0
    for case in load(golden, "make_context.json")["cases"]:
        if case["chat_format"] != "chatml" or case["max_window_size"] != 6144:
            continue
        messages = [message("system", case["system"])]
        for question, answer in case["history"]:
            messages += [message("user", question), message("assistant", answer)]
        messages.append(message("user", case["query"]))
        text = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert (text, ids) == (case["raw_text"], case["context_tokens"])
        n_compared += 1
    assert n_compared >= 8


def test_no_content_of_a_chat_yields_a_control_token(tok):
    everything = "".join(SPECIAL_TOKENS)
    for role in ("system", "user", "assistant"):
        ids = tok.apply_chat_template([message(role, everything)], return_dict=False)
        plain = tok.apply_chat_template([message(role, "x")], return_dict=False)
        assert [i for i in ids if i >= tok.eod_id] == [i for i in plain if i >= tok.eod_id]
        assert tok.decode(ids).count("<|endoftext|>") == 1


def test_chat_template_batches_pads_and_cuts_as_transformers_does(tok):
    chats = [HELLO, TWICE]
    short, long = (tok.apply_chat_template(chat, return_dict=False) for chat in chats)
    n_pad = len(long) - len(short)
    assert n_pad > 0
    batch = tok.apply_chat_template(chats, padding=True, return_tensors="pt")
    assert isinstance(batch["input_ids"], torch.Tensor)
    assert batch["input_ids"].tolist() == [short + [151643] * n_pad, long]
    assert batch["attention_mask"].tolist() == [[1] * len(short) + [0] * n_pad, [1] * len(long)]
    left = tok.apply_chat_template(chats, padding=True, tokenizer_kwargs={"padding_side": "left"})
    assert left["input_ids"] == [[151643] * n_pad + short, long]
    assert tok.apply_chat_template(chats, return_dict=False) == [short, long]
    assert tok.apply_chat_template(HELLO, return_tensors="pt")["input_ids"].tolist() == [short]
    assert tok.apply_chat_template(HELLO, truncation=True, max_length=4)["input_ids"] == short[:4]
    assert tok.apply_chat_template(HELLO, max_length=4)["input_ids"] == short
    texts = tok.apply_chat_template(chats, tokenize=False)
    assert [tok(text)["input_ids"] for text in texts] == [short, long]


def test_a_chat_may_go_on_with_its_last_message(tok):
    chat = [*HELLO, message("assistant", "我是")]
    text = tok.apply_chat_template(chat, continue_final_message=True, tokenize=False)
    assert text.endswith("<|im_start|>assistant\n我是")
    ids = tok.apply_chat_template(chat, continue_final_message=True, return_dict=False)
    assert ids == tok(text)["input_ids"]
    with pytest.raises(ValueError):
        tok.apply_chat_template(chat, continue_final_message=True, add_generation_prompt=True)


def test_what_chatml_does_not_have_is_refused(tok):
    for kwargs in ({"tools": [{}]}, {"documents": [{}]}, {"chat_template": "{{x}}"}):
        with pytest.raises(ValueError, match="ChatML"):
            tok.apply_chat_template(HELLO, **kwargs)


def test_the_saved_jinja_template_writes_the_same_text(tok):
    several = [message("system", ""), *HELLO, message("assistant", " \n{{x}}\n"), *HELLO]
    in_parts = [message("user", [{"type": "text", "text": text} for text in "ab"])]
    assert tok.chat_template == CHAT_TEMPLATE
    for chat in (HELLO, several, in_parts):
        for prompt in (False, True):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            jinja = PreTrainedTokenizer.apply_chat_template(tok, chat, **options)
            assert jinja == tok.apply_chat_template(chat, **options)
