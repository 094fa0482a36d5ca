"""Answers in another language than their question."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwen_ds.data.doctor import characters as of
from qwen_ds.data.doctor.spans import Span, Talk, is_bare_code, outside_code

_NAMES = "Japanese|Korean|Russian|French|German|Spanish|Italian|Latin|Portuguese|Ukrainian"
_ASKS_LANGUAGE = re.compile(
    r"英|译|代码|编程|程序|函数|单词|外国|[外法德日韩俄泰][语文]|西班牙|拉丁|意大利|葡萄牙|荷兰|阿拉伯|希腊|印地|越南|印尼|马来|土耳其|波兰|瑞典|世界语|用.{1,6}语|怎么说|公式|缩写|网址|链接|"
    r"正则|拼写|拼音|音标|语法|字母|邮箱|歌词|名言|(?<![A-Za-z])(?:English|Chinese|Mandarin|translat|Python|SQL|HTML|Java|code|regex|C\+\+|"
    r"JSON|LaTeX|pinyin|hanzi|kanji|kana\b|hiragana|katakana|hangul|characters"
    rf"|(?:in|into|to) (?:{_NAMES})\b|(?:{_NAMES}) (?:for|words?|phrases?|sentences?|letters?)\b)",
    re.IGNORECASE,
)
_HAN = re.compile(r"[\u4e00-\u9fff]")
_WORD = re.compile(r"[A-Za-z]{2,}")
_LATIN = "English"
_SCRIPTS = {
    "Japanese": (of.KANA, re.compile(f"[{of.points_of(of.KANA)}]")),
    "Korean": (of.HANGUL, re.compile(r"[\uac00-\ud7a3]")),
    "Russian": (of.CYRILLIC, re.compile(r"[\u0400-\u052f]")),
}
_OF_OTHERS = of.LATIN | of.KANA | of.HANGUL | of.CYRILLIC
_OF_CODE = re.compile(
    r"```|[;{}]\s*$|\(\);|\b[A-Z]{4,} [A-Z]{4,}\b|</\w+>|^[^\S\n]*(?:def|import|class) ", re.M
)
# Words of sentences: names and formulas have none.
_SMALL_WORD = re.compile(
    r"\b(?:the|an?|of|to|and|is|are|in|you|your|it|for|with|or|on|we|she|he|this|that|be|not|as|at|by|have|"
    r"can|le|la|les|et|est|une?|des|du|el|los|las|y|que|der|die|das|und|ist|ein|eine|mit)\b"
)

# The small words of English, one of which is in nearly every sentence, and those of its neighbours.
_ENGLISH = (" the ", " of ", " and ", " is ", " to ", " are ", " for ", " with ", " you ")
_NEIGHBOUR = re.compile(
    r"\b(?:l[ea]s?|et|de|est|sont|une|des|du|dans|pour|qui|avec|sur|ou|el|los|una|por|con|es|del|"
    r"der|die|das|und|ist|nicht|eine|mit|sich|auf|il|che|di|della|sono|uma|não|os|em)\b"
)
_LEAST_NEIGHBOURS = 4
_OF_NEIGHBOURS = re.compile(rf"{_NAMES}|Spain|Mexic|France|Paris|German|Austria|Ital|Brazil")


def _is_neighbour(question: str, answer: str) -> bool:
    """Whether an answer is in a language that is written as English is, and its question is not."""
    if any(word in answer for word in _ENGLISH) or not question.isascii():
        return False
    if len(set(_NEIGHBOUR.findall(answer))) < _LEAST_NEIGHBOURS:
        return False
    return not (_NEIGHBOUR.search(question.lower()) or _OF_NEIGHBOURS.search(question))


def _is_prose(text: str) -> bool:
    small = len(_SMALL_WORD.findall(text))
    words = _WORD.findall(text)
    return small >= 2 or (small > 0 and 2 * sum(map(str.islower, words)) >= len(words))


def languages(talk: Talk) -> Iterator[Span]:
    """Answers in another language than their question, which does not ask for it."""
    for turn, question, answer in talk.pairs:
        asked, said = talk.classes[turn - 1], talk.classes[turn]
        suspicious = bool(asked & of.HAN) != bool(said & of.HAN) or said & _OF_OTHERS
        if not suspicious or len(answer) < 8:
            continue
        if (language := _language(outside_code(answer), said)) is None:
            continue
        wanted = _language(question, asked, least=3)
        if language == _LATIN and wanted != "Chinese" and _is_neighbour(question, answer):
            wanted, language = _LATIN, "another"
        if wanted is None or wanted == language or _OF_CODE.search(answer) or is_bare_code(answer):
            continue
        if wanted == "Chinese" and language in _SCRIPTS and asked & _SCRIPTS[language][0]:
            continue  # a question with kana is Japanese, however few they are
        if language == _LATIN and wanted == "Chinese" and not _is_prose(answer):
            continue
        if _ASKS_LANGUAGE.search(question) or _ASKS_LANGUAGE.search(talk.system):
            continue
        yield Span("language-mismatch", turn, 0, min(len(answer), 40), f"{wanted} / {language}")


def _language(text: str, classes: int, least: int = 4) -> str | None:
    """The language of a text by its script, None where that is not clear."""
    text = text[:2000]
    han, words = len(_HAN.findall(text)), len(_WORD.findall(text))
    for name, (bit, script) in _SCRIPTS.items():
        count = len(script.findall(text)) if classes & bit else 0
        if count >= 6 and count > 0.25 * (han + count) and count > words:
            return name
    if han >= least and han > 2 * words:
        return "Chinese"
    if words >= least and han * 8 < words and " " in text.strip():
        return _LATIN
    return None
