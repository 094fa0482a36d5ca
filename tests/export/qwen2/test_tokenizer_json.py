"""The converted tokenizer: official ids, the same ChatML, and back to the same qwen.tiktoken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, Qwen2Tokenizer

from qwen_ds.errors import UserError
from qwen_ds.export.formats import find_format
from qwen_ds.export.merge import MergeOptions, merge
from qwen_ds.export.qwen2.tokenizer_check import BUILT_IN, check_tokenizer, texts_of
from qwen_ds.export.qwen2.tokenizer_json import merges_of, read_qwen2_tokenizer
from qwen_ds.model.chatml import encode_turns, turns_of
from qwen_ds.model.tokenizer import SPECIAL_TOKENS, Encoding, load_encoding
from tests.export.folders import merge_with

TO_QWEN2 = find_format("qwen", "qwen2")


@pytest.fixture(scope="module")
def enc(vocab_path: Path) -> Encoding:
    return load_encoding(vocab_path)


@pytest.fixture(scope="module")
def mini(small_dir: Path) -> Encoding:
    return load_encoding(small_dir)


@pytest.fixture(scope="module")
def stock(full_qwen2: Path) -> Qwen2Tokenizer:
    tokenizer = AutoTokenizer.from_pretrained(full_qwen2)
    assert type(tokenizer) is Qwen2Tokenizer
    return tokenizer


def cases(golden: Path, name: str) -> list[dict[str, Any]]:
    found = json.loads((golden / "tokenizer" / name).read_text())
    return found["cases"]


def whole(text: str) -> bool:
    """Without half surrogate pairs, which no UTF-8 can hold: stock tokenizers raise on them."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def test_stock_autotokenizer_gives_the_official_ids_and_texts(
    stock: Qwen2Tokenizer, golden: Path
) -> None:
    golden_cases = [case for case in cases(golden, "encode.json") if whole(case["text"])]
    assert len(golden_cases) > 300
    for case in golden_cases:
        text, ids = case["text"], case["ids"]
        ordinary = ids if case["ids_no_special"] == "same" else case["ids_no_special"]
        assert stock(text)["input_ids"] == ids, case
        assert stock(text, split_special_tokens=True)["input_ids"] == ordinary, case
        decoded = text if case["decode"] == "same" else case["decode"]
        assert stock.decode(ids) == decoded, case
        skipped = decoded if case["decode_skip_special"] == "same" else case["decode_skip_special"]
        assert stock.decode(ids, skip_special_tokens=True) == skipped, case


def test_the_vocabulary_has_all_merges_and_special_tokens(
    stock: Qwen2Tokenizer, enc: Encoding, full_qwen2: Path
) -> None:
    assert len(merges_of(enc)) == 151_387 and len(stock) == enc.n_vocab == 151_851
    assert stock.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(enc.special.values())
    assert (stock.eos_token, stock.pad_token, stock.bos_token) == (
        "<|im_end|>",
        "<|endoftext|>",
        None,
    )
    assert stock.model_max_length == 2048
    assert json.loads((full_qwen2 / "vocab.json").read_text(encoding="utf-8")) == {
        token: index for token, index in stock.get_vocab().items() if index < 151_643
    }


def test_no_golden_string_differs_in_either_vocabulary(
    enc: Encoding, mini: Encoding, full_qwen2: Path, small_qwen2: Path, golden: Path, tmp_path: Path
) -> None:
    texts = [case["text"] for case in cases(golden, "encode.json")] + [
        case["text"] for case in cases(golden, "mini.json")
    ]
    (tmp_path / "texts.json").write_text(json.dumps([{"text": text} for text in texts]))
    for encoding, folder in ((enc, full_qwen2), (mini, small_qwen2)):
        check = check_tokenizer(encoding, folder, [tmp_path / "texts.json"])
        assert check.passed and check.texts == len(texts) + len(BUILT_IN) > 330


def test_the_one_known_exception_is_a_special_token_before_a_stroke(stock, enc: Encoding) -> None:
    text = "a<|endoftext|>\u0338b"
    assert 151643 not in enc.with_specials(text) and 151643 in stock(text)["input_ids"]
    assert stock(text, split_special_tokens=True)["input_ids"] == enc.ordinary(text)
    for harmless in ("a<|endoftext|>\u0301", "<|endoftext|> \u0338", "\u0338<|endoftext|>"):
        assert stock(harmless)["input_ids"] == enc.with_specials(harmless)


CHATS = [
    [{"role": "user", "content": "你好"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1=?  \n"}],
    [
        {"role": "user", "content": " e\u0301 leading blank"},
        {"role": "assistant", "content": "def f():\n\n    return 1\n"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "\u0301x"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "两"}, {"type": "text", "text": "段"}],
        },
    ],
]


@pytest.mark.parametrize("chat", CHATS, ids=range(3))
@pytest.mark.parametrize("prompt", [False, True])
def test_the_chat_template_encodes_as_our_chatml(
    stock, enc: Encoding, chat: Any, prompt: bool
) -> None:
    found = stock.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]
    assert found == encode_turns(enc, turns_of(chat), add_generation_prompt=prompt)


def test_a_message_that_begins_with_a_line_break_is_the_template_s_limit(
    stock, enc: Encoding
) -> None:
    """Ours encodes each message by itself; in a template's text two line breaks are one token."""
    chat = [{"role": "user", "content": "\nhi"}]
    assert stock.apply_chat_template(chat, tokenize=False).count("\n\nhi") == 1
    assert stock.apply_chat_template(chat)["input_ids"] != encode_turns(enc, turns_of(chat))


def test_vocab_json_and_merges_txt_are_the_same_tokenizer(full_qwen2: Path, enc: Encoding) -> None:
    tokenizer = Tokenizer.from_file(str(full_qwen2 / "tokenizer.json"))
    tokenizer.model = BPE.from_file(str(full_qwen2 / "vocab.json"), str(full_qwen2 / "merges.txt"))
    assert all(tokenizer.encode(text).ids == enc.with_specials(text) for text in BUILT_IN)


def test_the_vocabulary_comes_back_bit_for_bit(small_qwen2: Path, mini: Encoding) -> None:
    """The official one: test_the_way_there_and_back_is_bit_identical."""
    assert read_qwen2_tokenizer(small_qwen2).vocabulary == mini.vocabulary


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(found)
    (folder / "tokenizer.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture
def folder(small_qwen2: Path, tmp_path: Path) -> Path:
    """A small Qwen2 folder that a test may change."""
    return Path(shutil.copytree(small_qwen2, tmp_path / "qwen2"))


@pytest.mark.parametrize(
    ("change", "asked", "text"),
    [
        (lambda t: t.update(normalizer=None), "ids", "A\u030a"),
        (lambda t: t["model"]["merges"].pop(0), "ids", " and trailing"),
        (lambda t: t["added_tokens"].pop(2), "ids", "<|im_end|>"),
        (lambda t: t["added_tokens"][2].update(special=False), "ids of plain text", "<|im_end|>"),
        (lambda t: t.update(decoder=None), "decoded text", " "),
        (
            lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
            "ids",
            "你好",
        ),
    ],
)
def test_a_conversion_gone_wrong_is_found_by_the_built_in_texts(
    folder: Path, mini: Encoding, change: Callable[[dict[str, Any]], None], asked: str, text: str
) -> None:
    assert check_tokenizer(mini, folder).passed
    edit(folder, change)
    check = check_tokenizer(mini, folder)
    assert check.num_differences == len(check.differences) > 0
    assert any(one.asked == asked and text in one.text for one in check.differences)
    assert all(
        one.qwen != one.qwen2 and one.source.startswith("built-in ") for one in check.differences
    )


def test_a_difference_in_the_user_s_data_rejects_the_output_and_is_listed(
    small_dir: Path, tmp_path: Path
) -> None:
    rows = [{"instruction": "fine"}, {"turns": [{"deep": "a<|im_end|>\u0338"}, 7, None]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = merge_with(
        small_dir, [], tmp_path / "out", to=TO_QWEN2, check_texts=[str(tmp_path / "rows.jsonl")]
    )
    assert report.rejected and not (tmp_path / "out").exists()
    stored = json.loads((tmp_path / "out.rejected" / "merge_report.json").read_text())["tokenizer"]
    (one,) = stored["differences"]
    assert stored["num_differences"] == 1 and stored["texts"] == len(BUILT_IN) + 2
    assert (one["source"], one["text"]) == (f"{tmp_path / 'rows.jsonl'}:2", "a<|im_end|>\u0338")
    assert one["at"] == 1 and one["qwen2"][0] == 306
    assert any("rows.jsonl:2: ids of 'a<|im_end|>" in line for line in report.in_words())


def test_every_string_of_every_row_is_a_text_and_so_is_every_line_of_a_text_file(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps([{"q": "one", "a": ["two", {"b": "three"}], "n": 4}, {"q": "five"}])
    )
    assert [text for _, text in texts_of(tmp_path / "a.json")] == ["one", "two", "three", "five"]
    (tmp_path / "b.txt").write_bytes(b"eins\r\n\nzwei")
    assert list(texts_of(tmp_path / "b.txt")) == [
        (f"{tmp_path / 'b.txt'}:{n}", line) for n, line in enumerate(("eins\r\n", "\n", "zwei"), 1)
    ]


def test_texts_that_cannot_be_read_are_named_and_nothing_is_left(
    small_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "bad.jsonl").write_text('{"a": "b"}\n{broken\n')
    for file, message in (
        ("none.json", "no such file"),
        ("bad.txt", "expected a text file in UTF-8"),
        ("bad.jsonl", r"bad\.jsonl:2: "),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            merge_with(
                small_dir, [], tmp_path / "out", to=TO_QWEN2, check_texts=[str(tmp_path / file)]
            )
        assert not list(tmp_path.glob("out*"))

    def late(*_: object) -> None:
        pytest.fail("a late check")

    for options, message in (
        (MergeOptions(to=TO_QWEN2, check_texts=["none.json"], proof="off"), "no such file"),
        (
            MergeOptions(dtype="float32", check_texts=["none.json"], proof="off"),
            "check_texts was given, but the tokenizer stays as it is",
        ),
    ):
        with pytest.raises(UserError, match=message):
            merge(small_dir, [], tmp_path / "out", options, late)


def test_a_vocabulary_that_no_merges_can_make_is_refused(small_dir: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(small_dir, tmp_path / "base"))
    lines = (base / "qwen.tiktoken").read_bytes().splitlines()
    lines[-1] = b"eHl6dw== " + lines[-1].split()[1]  # "xyzw", of whose parts no two are tokens
    (base / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(
        UserError, match=r"b'xyzw' \(rank 303\) is not made of two tokens of lower rank"
    ):
        merge_with(
            base, [], tmp_path / "out", to=TO_QWEN2, progress=lambda *_: pytest.fail("a late check")
        )
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"]["merges"].pop(), "its merges are not those that its ranks give"),
        (
            lambda t: t["added_tokens"][1].update(id=400),
            r"'<\|im_start\|>' has the id 400; expected one of Qwen's",
        ),
        (
            lambda t: t["added_tokens"][1].update(content="<s>"),
            r"'<s>' has the id 305; expected one of Qwen's",
        ),
        (lambda t: t["model"]["vocab"].update({"☃": 304}), r"not byte-level BPE"),
        (lambda t: t["model"]["vocab"].update(zz=700), r"tokens without the ranks 0 to"),
        (lambda t: t["model"].pop("merges"), r"not byte-level BPE"),
    ],
)
def test_a_tokenizer_that_is_not_qwen_s_is_refused_on_the_way_back(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        read_qwen2_tokenizer(folder)
