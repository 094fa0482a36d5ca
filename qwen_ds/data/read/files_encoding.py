"""The encoding of a file's text, by its first megabytes.

Byte order marks and the zero bytes of UTF-16 and UTF-32 are certain. UTF-8 is as good as certain:
no other encoding passes for it. Of the rest many pass for each other (Korean and Traditional
Chinese text is valid GB18030 and makes Chinese nonsense), so the frequencies of characters decide,
and only if they speak clearly.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

from qwen_ds.errors import UserError

_MARKS = {  # UTF-32 begins like UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_EAST_ASIAN = ("gb18030", "big5hkscs", "cp949", "cp932", "euc_jp")
# Codecs that give the same text and know more of it.
_WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs", "euc_kr": "cp949",
          "shift_jis": "cp932", "iso8859-1": "cp1252", "tis-620": "cp874"}  # fmt: skip
_SAMPLE_BYTES = 200_000
# Nobody writes training data in these; they take any bytes, and so would put every text in doubt.
_IMPLAUSIBLE = ("hp-roman8", "cp437", "mac-roman", "mac-turkish", "iso8859-16")
# Nearly the same letters: frequencies cannot tell these apart where the text is not the same.
_TWINS = {"cp1250": "iso8859-2", "cp1252": "iso8859-15", "cp1253": "iso8859-7",
          "cp1257": "iso8859-13"}  # fmt: skip
_TWINS |= {twin: encoding for encoding, twin in _TWINS.items()}
_CONTROLS = re.compile(rb"[\x80-\x9f]")  # no text has these; in Windows' encodings they are letters
# chardet's confidence in one line of text is 0.028 and up if right, 0.02 if wrong. A rival that
# gives another text must be clearly weaker.
_SURE, _RIVAL = 0.025, 0.9
_FEW = 0.25  # of the lines


@dataclass(frozen=True, slots=True)
class _Guess:
    encoding: str
    confidence: float


def encoding_of(head: bytes, name: str, is_whole: bool) -> str:
    """The codec of a text that begins with `head`, which may end inside a character.

    A few damaged bytes do not turn a UTF-8 file into wrong characters: their lines are reported
    when they are read. UserError, which names data.encoding, where several encodings are as likely.
    """
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    if wide := _wide(head):
        return wide
    if b"\x1b$" in head:  # JSON and CSV have no escape bytes of their own
        return "iso2022_kr" if b"\x1b$)C" in head else "iso2022_jp"
    if _decodes(head, "utf-8", is_whole):
        return "utf-8"
    as_utf8 = head.decode("utf-8", "replace")
    wrong = as_utf8.count("\ufffd")
    right = sum(char > "\x7f" for char in as_utf8) - wrong
    if wrong <= right:
        return "utf-8"
    lines = [line for line in head.split(b"\n") if not line.isspace()]
    telling = [line for line in lines if not line.isascii()]
    guesses = _guesses(telling)
    if guesses and _is_clear(guesses, telling):
        return guesses[0].encoding
    # A line may be damaged: what do the others say?
    for encoding in _EAST_ASIAN:
        sound = [line for line in telling if _decodes(line, encoding, True)]
        if len(sound) < len(telling):
            found = _guesses(sound)
            if found and found[0].encoding == encoding and _is_clear(found, sound):
                return encoding
    if len(telling) < len(lines) * _FEW:
        return "utf-8"
    likely = list(dict.fromkeys(guess.encoding for guess in guesses))[:3]
    raise UserError(
        f"{name}: the text is not UTF-8, and its encoding is in doubt"
        f"{' (' + ' or '.join(likely) + ')' if likely else ''}; expected UTF-8, or data.encoding "
        "with the name of the encoding"
    )


def _wide(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark: every ASCII sign in it has zero bytes in the same places."""
    if 0 not in head[:_SAMPLE_BYTES]:
        return None
    sample = head[: min(len(head), _SAMPLE_BYTES) // 4 * 4] or head
    for encoding, width, place in (
        ("utf-32-le", 4, 0), ("utf-32-be", 4, 3), ("utf-16-le", 2, 0), ("utf-16-be", 2, 1),
    ):  # fmt: skip
        units = len(sample) // width
        zeros = [sample[at::width].count(0) for at in range(width)]
        # The byte that tells ASCII signs apart is seldom zero in text; the others often are.
        others = [count for at, count in enumerate(zeros) if at != place]
        if units and min(others) * 20 >= units and zeros[place] * 5 <= min(others):
            text = codecs.getincrementaldecoder(encoding)()
            try:
                found = text.decode(sample)
            except UnicodeDecodeError:
                continue
            if any(sign in found for sign in "\n{["):  # else a few zero bytes in other text
                return encoding
    return None


def _decodes(data: bytes, encoding: str, is_whole: bool) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(data, final=is_whole)
    except UnicodeDecodeError:
        return False
    return True


def _guesses(lines: list[bytes]) -> list[_Guess]:
    import chardet

    sample = b"\n".join(dict.fromkeys(lines))[:_SAMPLE_BYTES]
    if len(sample) == _SAMPLE_BYTES:  # end with a line, or at least not inside a character
        sample = sample[: sample.rfind(b"\n") + 1] or sample
    era = chardet.EncodingEra
    found = chardet.detect_all(sample, ignore_threshold=True, encoding_era=era.ALL & ~era.MAINFRAME)
    guesses = []
    has_controls = _CONTROLS.search(sample) is not None
    for each in found:
        if each["encoding"] is not None:
            encoding = codecs.lookup(each["encoding"]).name
            encoding = _WIDER.get(encoding, encoding)
            if encoding in _IMPLAUSIBLE or (has_controls and encoding.startswith("iso8859-")):
                continue
            guesses.append(_Guess(encoding, each["confidence"]))
    return guesses


def _is_clear(guesses: list[_Guess], lines: list[bytes]) -> bool:
    best = guesses[0]
    if best.confidence < _SURE or not all(_decodes(x, best.encoding, True) for x in lines[:-1]):
        return False
    text = b"\n".join(lines)[:_SAMPLE_BYTES]
    least = best.confidence * _RIVAL
    rivals = {guess.encoding for guess in guesses[1:] if guess.confidence > least}
    twin = _TWINS.get(best.encoding)
    if twin and not (twin.startswith("iso8859-") and _CONTROLS.search(text)):
        rivals.add(twin)
    found = text.decode(best.encoding, "replace")
    return all(text.decode(rival, "replace") == found for rival in rivals)
