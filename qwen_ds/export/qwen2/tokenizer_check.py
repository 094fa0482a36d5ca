"""The check that two tokenizers agree, on built-in texts and on the user's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from qwen_ds.data.read.files_json import BadRow
from qwen_ds.data.read.places import locate, rows_of
from qwen_ds.errors import UserError
from qwen_ds.export.qwen2.tokenizer_json import TOKENIZER
from qwen_ds.model.tokenizer import Encoding

# What tokenizers differ about: blanks, line breaks, digits, contractions, NFC, letters of many
# scripts, broken emoji, signs, control tokens spelled in text. No special token stands before
# U+0338 (see tokenizer_json.py).
BUILT_IN = (
    "",
    "你好，世界！1234567890 ＡＢＣ１２３ ㈱㍿ ① ½ Ⅷ",
    "類型#上衣*版型#寬鬆*顏色#白色\t𠮷野家 𪚥 㐀 々〆〇",
    "I'm sure they'll say it's what we'd've done, don't you? I'M SURE THEY'LL SAY IT'S.",
    "def f(x):\n    return {\"a\": [x**2, 0x1F, 1e-7]}  # 注释\n\n\n"
    "\tif x != y:\r\n        pass\r\n",
    " leading,  double,   triple blanks and trailing ones   ",
    "\n", "\n\n", " \n \n ", "\r\n\r\n", "\t\t\n\t", "a\n b\n  c\n\n   d", "　全角　空格　",
    "\u00a0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u0085\x1c\x1d\x1e\x1f\x0b\x0c",
    "\u200b\u200c\u200d\ufeff\u00ad\u180e\u2060",
    "e\u0301 \u00e9 A\u030a \u212b \u1112\u1161\u11ab \ud55c"
    " o\u0302\u0323 \u0958 \uf900 \U0002f800 \u2126",
    "\u0301\u0302 a\u0338b \u0300 ≠ =\u0338 <\u0338",
    "Ünïcödé ÀÉÎÕÜ ßẞ İıĞğ ŁłŃń Ðð Þþ",
    "Привет, мир! Γειά σου Κόσμε שלום עולם مرحبا بالعالم नमस्ते दुनिया"
    " สวัสดีชาวโลก こんにちは、ｶﾀｶﾅ 안녕하세요 የሰላም ខ្មែរ",
    "👍🏽 👨\u200d👩\u200d👧 🇨🇳 ☃️ ❤️ 😀😀 \U0001f9ff",
    "¿¡«»“”‘’…—–·×÷±∞≈≤≥←→↑↓★☆■□♪ №℃ €£¥₹ §¶†‡",
    "#include <stdio.h> a->b; x <<= 2; /* ** */ // \\n"
    " \\u4e2d $HOME %s {{}} [[ ]] `~!@#$%^&*()_+-=|",
    "https://example.com/a?b=c&d=%E4%BD%A0#e user@example.com 2023-08-03T12:34:56Z"
    " 3.14159 1,000,000 ½",
    "\x00\x01\x7f\x80\x9f\ufffd\ufffe\U0010ffff\ue000",
    "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n好<|im_end|><|endoftext|>",
    "<|endoftext|><|extra_0|> <|extra_204|>x<|im_end|>\u0301"
    " <|extra_205|> <|im_start |> <|IM_START|>",
    "<|im_end|", "|im_end|>", "<|<|im_end|>|>",
    "a" * 256, " " * 200, "=" * 100 + "\n" + "-" * 99 + "\n", "哈" * 100, "ab " * 100,
)  # fmt: skip
_TEXTS_AT_ONCE = 512
DIFFERENCES_KEPT = 1000
Asked = Literal["ids", "ids of plain text", "decoded text"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A text that gets other ids from Qwen2's tokenizer than from Qwen's, or other text back."""

    source: str  # "built-in 3" or "train.json:12"
    text: str  # its beginning
    asked: Asked
    at: int  # index of the first difference
    qwen: list[int] | str  # some ids (characters) from there on
    qwen2: list[int] | str


@dataclass(frozen=True, slots=True)
class TokenizerCheck:
    """The extent of a comparison, and its differences."""

    texts: int  # number of texts compared
    characters: int
    num_differences: int  # number of texts with one
    differences: list[Difference]  # the first thousand

    @property
    def passed(self) -> bool:
        return self.num_differences == 0

    def in_words(self) -> list[str]:
        """A line for the screen, and one for each of the first differences."""
        compared = (
            f"the tokenizers agree on {self.texts - self.num_differences:,} of {self.texts:,} texts"
        )
        shown = [
            f"{one.source}: {one.asked} of {one.text[:40]!r} differ at {one.at}: {one.qwen!r} for"
            f" Qwen, {one.qwen2!r} for Qwen2"
            for one in self.differences[:10]
        ]
        return [f"{compared} ({self.characters:,} characters)", *shown]


def check_tokenizer(
    encoding: Encoding, folder: Path, texts_files: Sequence[Path | str] = ()
) -> TokenizerCheck:
    """Compare `encoding` with the folder's tokenizer.json: encode and decode texts with both.

    The texts are the built-in ones and all of the files. Control tokens spelled in a text are
    compared both as such and as plain text. Of a file of rows every string counts, whatever its
    key; a file named *.txt gives its lines. UserError if one is missing or cannot be read.
    """
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    num_texts = num_characters = num_differences = 0
    kept: list[Difference] = []
    built_in = ((f"built-in {number}", text) for number, text in enumerate(BUILT_IN))
    sources = chain(built_in, *(texts_of(file) for file in texts_files))
    while batch := [(source, _sound(text)) for source, text in islice(sources, _TEXTS_AT_ONCE)]:
        differences = list(_compare(encoding, tokenizer, batch))
        num_differences += len(differences)
        kept += differences[: DIFFERENCES_KEPT - len(kept)]
        num_texts += len(batch)
        num_characters += sum(len(text) for _, text in batch)
    return TokenizerCheck(num_texts, num_characters, num_differences, kept)


def _compare(
    encoding: Encoding, tokenizer: Tokenizer, batch: list[tuple[str, str]]
) -> Iterator[Difference]:
    """The first difference of each (source, text) that has one."""
    tokenizer.encode_special_tokens = False
    parsed = tokenizer.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
    tokenizer.encode_special_tokens = True
    for (source, text), found in zip(batch, parsed, strict=True):
        expected = encoding.with_specials(text)
        decoded = tokenizer.decode(found.ids, skip_special_tokens=False)
        answers: list[tuple[Asked, Any, Any]] = [
            ("ids", expected, found.ids),
            ("decoded text", encoding.decode(expected), decoded),
        ]
        if "<|" in text:  # without it, text with specials and plain text are the same
            plain = tokenizer.encode(text, add_special_tokens=False).ids
            answers.append(("ids of plain text", encoding.ordinary(text), plain))
        for asked, qwen, qwen2 in answers:
            if qwen != qwen2:
                pairs = enumerate(zip_longest(qwen, qwen2))
                at = next(i for i, (left, right) in pairs if left != right)
                shown = slice(at, at + 12)
                yield Difference(source, text[:200], asked, at, qwen[shown], qwen2[shown])
                break


def _sound(text: str) -> str:
    """The text with U+FFFD for half a surrogate pair, as tiktoken takes it; JSON can spell one."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def texts_of(file: Path | str) -> Iterator[tuple[str, str]]:
    """Source and text of every string in a data file's rows, or of every line of a *.txt file."""
    path = Path(file)
    if path.suffix.lower() == ".txt":
        try:
            with path.open(encoding="utf-8", newline="") as lines:
                yield from ((f"{path}:{number}", line) for number, line in enumerate(lines, 1))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: {error}; expected a text file in UTF-8") from None
        return
    for row in rows_of(locate(file)):
        if isinstance(row, BadRow):
            raise UserError(f"{row.source}: {row.detail}")
        yield from ((row.source, text) for text in _strings(row.row))


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
