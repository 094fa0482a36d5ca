"""Characters that do not belong: damage, invisible ones, and scripts that intrude."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ftfy.badness import is_bad

from qwen_ds.data.doctor import characters as of
from qwen_ds.data.doctor.spans import Finder, Span, Talk, has_any, pattern

_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_LATIN_RUN = re.compile(f"[{of.points_of(of.LATIN_HIGH)}]+")
_PINYIN = "āáǎàēéěèīíǐìōóǒòūúǔùüǖǘǚǜêńňǹ"
_LATIN_LETTERS = re.compile(f"(?:(?![\x80-\x9f])[{of.points_of(of.LATIN_HIGH)}])+")
_ABOUT_TRADITIONAL = re.compile(
    r"繁体|繁體|正體|简体|写法|“.{1,2}”字|港台|台湾|香港|粤语|古文|异体|读音|汉字|部首|笔画|偏旁|字形"
)
_ABOUT_LANGUAGES = re.compile(
    r"日[语文本]|韩[语文国]|朝鲜|俄[语文罗]|西里尔|假名|片假|平假|谚文|翻译|译[成为]|外[语文]|发音|语言|"
    r"动漫|\b(?:Japan|Korea|Russia|Ukrain|Bulgar|Serb|Cyrillic|translat|language)",
    re.IGNORECASE,
)


def _simple(bit: int) -> Finder:
    return pattern(f"[{of.points_of(bit)}]+")


_TRADITIONAL = _simple(of.TRADITIONAL)
# A joiner stands inside an emoji, or between letters of Indic and Arabic scripts.
_JOINED = r"[\u0600-\u0dff\u2600-\u27bf\ufe0f\U0001f000-\U0001faff]"
SIMPLE: dict[str, tuple[int, Finder]] = {
    "control-character": (of.CONTROL, _simple(of.CONTROL)),
    "zero-width-character": (
        of.ZERO_WIDTH,
        pattern(rf"[\u200b\u2060-\u2064\xad\u180e\u034f]+|(?<!{_JOINED})[\u200c\u200d]+"),
    ),
    "bidi-character": (of.BIDI, _simple(of.BIDI)),
    "bom": (of.BOM, _simple(of.BOM)),
    "replacement-character": (of.REPLACEMENT, _simple(of.REPLACEMENT)),
    "full-width-ascii": (of.FULL_WIDTH, _simple(of.FULL_WIDTH)),
}
# What a debugger fills memory with, and U+FFFD and a BOM in UTF-8 read as GBK.
_KUN_KAO = pattern(r"(?:锟斤拷?)+|锟[叫剿介姐阶]|烫烫烫烫+|屯屯屯屯+|\A锘(?![是为元（(])\w")
_OF_KUN_KAO = ("锟", "烫烫烫烫", "屯屯屯屯", "锘")
# A text that speaks of them.
_SUBJECTS = {
    "kun-kao": re.compile(
        r"乱码|mojibake|[“\"「‘'`](?:锟斤拷|烫烫烫+|屯屯屯+)[”\"」’'`]"
        r"|(?:锟斤拷|[烫屯])(?:是(?:什么|啥|怎么|如何)|的?(?:由来|来历|来源|意思|含义)|从何|怎么[来产])",
        re.IGNORECASE,
    ),
    "full-width-ascii": re.compile(r"全角|半角|full-?width", re.IGNORECASE),
}
FOREIGN = {
    "kana": (
        of.KANA,
        pattern(f"[{of.points_of(of.KANA)}ー]{{2,}}|の|(?<=[\u4e00-\u9fff])[はがをにねよ]"),
    ),
    "hangul": (of.HANGUL, _simple(of.HANGUL)),
    "cyrillic": (
        of.CYRILLIC,
        pattern(
            r"[\u0400-\u052f]{2,}|(?<=[A-Za-z])[\u0400-\u052f]|[\u0400-\u052f](?=[A-Za-z])"
            r"|(?<=[\u4e00-\u9fff])[\u0400-\u052f](?=[\u4e00-\u9fff])"
        ),
    ),
}


def damage(talk: Talk) -> Iterator[Span]:
    """Damaged and invisible characters of every turn, the system text included."""
    for turn, text, classes in talk.texts:
        finders = [(kind, find) for kind, (bit, find) in SIMPLE.items() if classes & bit]
        if classes & of.HAN and has_any(text, _OF_KUN_KAO):
            finders.append(("kun-kao", _KUN_KAO))
        for kind, find in finders:
            spans = [Span(kind, turn, start, end) for start, end in find(text)]
            if spans and not (kind in _SUBJECTS and _SUBJECTS[kind].search(text)):
                yield from spans
        if classes & of.LATIN_HIGH and (found := _latin1(text)):
            yield Span("mojibake-latin1", turn, *found)
        if classes & of.GBK_LIKE and (found := _gbk(text)):
            yield Span("mojibake-gbk", turn, *found)


def _latin1(text: str) -> tuple[int, int] | None:
    """UTF-8 that was read as Latin-1 or Windows-1252: its bytes make UTF-8 again."""
    for run in _LATIN_RUN.finditer(text):
        for encoding in ("cp1252", "latin-1"):
            try:
                read = run[0].encode(encoding).decode()
            except UnicodeError:
                continue
            if not read.isascii():
                return run.span()
    found = _LATIN_LETTERS.search(text)
    # A letter of pinyin between “ and ” looks bad to ftfy.
    if found is not None and found[0] not in _PINYIN and is_bad(text):
        return found.span()
    return None


def _gbk(text: str) -> tuple[int, int] | None:
    """UTF-8 that was read as GBK, which is made of valid, rare characters: their bytes make UTF-8
    again, and common characters."""
    for run in _NOT_ASCII.finditer(text):
        like = [at for at, char in enumerate(run[0]) if of.TABLE[ord(char)] & of.GBK_LIKE]
        if not like:
            continue
        lost = sum(run[0][at + 1 : at + 2] == "\ufffd" for at in like)
        if lost >= 2 or (len(like) >= 3 and 3 * len(like) >= len(run[0])):
            return run.span()
        for at in like:
            part = run[0][at : at + 24]
            raw = part.encode("gb18030", "ignore")
            try:
                read = raw.decode()
            except UnicodeDecodeError as error:
                read = raw[: error.start].decode()
            is_short = len(run[0]) <= 4 and len(read) == 2
            if (len(read) >= 3 or is_short) and all(map(_is_common, read)):
                return run.start() + at, run.start() + min(len(run[0]), at + len(read) * 3 // 2)
    return None


def _is_common(char: str) -> bool:
    try:
        return char.encode("gb2312")[0] < 0xD8 and ord(char) > 0x7F
    except UnicodeEncodeError:
        return False


def intruders(talk: Talk) -> Iterator[Span]:
    """Scripts other than Chinese and Latin in a row that does not speak of other languages."""
    if not any(classes & (of.KANA | of.HANGUL | of.CYRILLIC) for classes in talk.classes):
        return
    if any(_ABOUT_LANGUAGES.search(text) for _, text, _ in talk.texts):
        return
    turns = zip(talk.turns, talk.classes, strict=True)
    for turn, ((role, text), classes) in enumerate(turns):
        # A question in another language may well be answered in it.
        asked = 0 if role == "user" else talk.classes[turn - 1]
        for kind, (bit, find) in FOREIGN.items():
            if classes & bit and (not asked & bit) and _is_other(talk, turn, find):
                for start, end in find(text):
                    yield Span(kind, turn, start, end)


def _is_other(talk: Talk, turn: int, find: Finder) -> bool:
    """Whether a script is foreign in its turn: a whole question in it is a question, and so is one
    that is answered in it."""
    role, text = talk.turns[turn]
    if role != "user":
        return True
    answer = talk.turns[turn + 1][1] if turn + 1 < len(talk.turns) else ""
    return _share(text, find) < 0.5 and _share(answer, find) < 0.2


def _share(text: str, find: Finder) -> float:
    foreign = sum(end - start for start, end in find(text))
    return foreign / max(1, sum(1 for char in text if char.isalpha()))


def traditional(talk: Talk) -> Iterator[Span]:
    """Traditional characters in a row that is written in simplified ones. A row all in traditional
    ones is sound: data sets have both."""
    both = 0
    for classes in talk.classes:
        both |= classes
    if not (both & of.TRADITIONAL and both & of.SIMPLIFIED) or both & of.KANA:
        return
    asked = [talk.system, *(text for role, text in talk.turns if role == "user")]
    if any(_ABOUT_TRADITIONAL.search(text) for text in asked):
        return
    for turn, ((_, text), classes) in enumerate(zip(talk.turns, talk.classes, strict=True)):
        if classes & of.TRADITIONAL:
            for start, end in _TRADITIONAL(text):
                yield Span("traditional-among-simplified", turn, start, end)
