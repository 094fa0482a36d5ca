"""Answers that teach the wrong thing: echoes of the question, cut ones, loops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from qwen_ds.data.doctor import characters as of
from qwen_ds.data.doctor.spans import Span, Talk

_NOT_WORD = re.compile(r"[\W_]+")
_COPIES = re.compile(
    r"重复|复述|照抄|跟我(?:读|说)|原样|抄写|朗读|回声|echo|repeat|copy|纠正|改正|修改|校对|润色",
    re.I,
)


def echoes(talk: Talk) -> Iterator[Span]:
    """Answers that equal or repeat their question."""
    for turn, question, answer in talk.pairs:
        if len(question) < 4 and question != answer:
            continue
        asked, is_latin = _NOT_WORD.sub("", question), talk.classes[turn] & of.LATIN
        # Most answers lack one of the first characters: cheaper to see than to clean them.
        if not asked or not (is_latin or all(char in answer for char in asked[:4])):
            continue
        # Only as much of the answer as may hold the question.
        said = _NOT_WORD.sub("", answer[: 3 * len(question) + 60])
        if asked not in said and is_latin:
            asked, said = asked.lower(), said.lower()
        if asked not in said or _COPIES.search(question):
            continue
        if asked == said and len(answer) < 3 * len(question) + 60:
            yield Span("answer-equals-question", turn, 0, len(answer))
        elif place := _echo(question, answer) if len(asked) >= 7 else _short_echo(question, answer):
            yield Span("answer-repeats-question", turn, *place)


_NUMBER = r"\d{3,5}|[一两二三四五六七八九]百[一二三四五六七八九]?十?|[一两二三四五六七八九]千"
_WANTED = re.compile(
    rf"({_NUMBER})(?:个)?(?:汉)?字(?!节|符)|(\d{{3,5}})[- ]words?\b", re.IGNORECASE
)
_DIGITS = {digit: value for value, digit in enumerate("一二三四五六七八九", 1)} | {"两": 2}
_MOST_OF_IT = 0.1


def too_short(talk: Talk) -> Iterator[Span]:
    """Answers with less than a tenth of the length that their question asks for."""
    for turn, question, answer in talk.pairs:
        if len(answer) < 200 and ("字" in question or "word" in question):
            for match in _WANTED.finditer(question):
                wanted = _value(match[1]) if match[1] else int(match[2])
                said = len(answer) if match[1] else len(answer.split())
                if wanted >= 100 and said < _MOST_OF_IT * wanted:
                    detail = f"{wanted} are asked for"
                    yield Span("extreme-length", turn, 0, len(answer), detail)
                    break


def _value(text: str) -> int:
    """A number of characters, as digits or as hundreds or thousands in words."""
    if text.isascii():
        return int(text)
    return _DIGITS[text[0]] * (1000 if text[1] == "千" else 100)


_AFTER_ECHO = re.compile(r"\s*(?:[。.！!？?：:；;\n”\"）)]|\Z)|(?<=[\u4e00-\u9fff])[ \u3000]")
_LEAST_ECHO = 5
_ORDERS = re.compile(r"\A\s*(?:请|帮我|给我|帮忙|麻烦|Please\b)")


def _echo(question: str, answer: str) -> tuple[int, int] | None:
    """The place of the question near the beginning of an answer. A topic that the first sentence
    takes up ("the main sights are ..") is none: a repeated question ends, or is an order."""
    bare = question.strip().rstrip("？?。.！!：:；;")
    start = answer.lower().find(bare.lower())
    if start < 0:  # its punctuation or white space differs
        return (0, min(len(answer), len(question)))
    end = start + len(bare)
    is_early = start <= 12 or "\n" in answer[max(0, start - 2) : start]
    is_whole = _ORDERS.match(question) or _AFTER_ECHO.match(answer, end)
    is_all = start > 0 and end >= len(answer.rstrip("。.！!？? \n"))
    is_sound = is_all or _is_heading(bare, answer, end)
    return (start, end) if is_early and is_whole and not is_sound else None


_HEADS_ON = re.compile(r"[*_》」”】]*\s*(?:[:：]|\n)")
_ASKS = re.compile(
    rf"{_ORDERS.pattern}|什么|怎[么样]|如何|为何|哪|谁|多少|吗\Z|呢\Z|几[个种]|是否"
    r"|\A\s*(?:列[出举]|写|给出|介绍|解释|描述|说明|说出|生成|创[建作]|提供|推荐|告诉|回答|设计|编写|翻译|总结|比较|"
    r"分析|计算|[用把将对]|what|why|how|who|when|where|which|is|are|do|does|can|"
    r"name|list|write|give|describe|explain|tell|make|create|generate|find|suggest)(?![a-z])",
    re.IGNORECASE,
)


def _is_heading(question: str, answer: str, end: int) -> bool:
    """Whether a topic that was given in place of a question stands above the answer, as in
    "these are three tips: 1. .."."""
    return bool(_HEADS_ON.match(answer, end)) and not _ASKS.search(question)


def _short_echo(question: str, answer: str) -> tuple[int, int] | None:
    """The place of a short question at the beginning of an answer, its question mark or full stop
    and all: without these it is as likely a topic."""
    asked, said = question.strip(), answer.lstrip()
    if len(asked) < _LEAST_ECHO or asked[-1] not in "？?。" or not said.startswith(asked):
        return None
    start = len(answer) - len(said)
    return (start, start + len(asked)) if len(said) > len(asked) + 1 else None


# Not a finding yet: endings.py tells from all answers whether this one was cut.
NO_FULL_STOP = "no-full-stop"
_ENDS = tuple('。！？!?.…~～”"』」）)】]》>；;*`|}')
_JOINING = "以及|并且|而且|或者|因为|所以|但是|如果|由于|包括|例如|比如"
_HANGING = re.compile(
    rf"(?:[，,、：:；;（(“「『【\[]|\w\s?[\-—+=]|(?:{_JOINING}|其中|不仅|虽然|为了|通过|"
    r"对于|关于|根据|首先|其次|的是|尤其|特别是|应该|能够|需要|"
    r"\b(?:and|or|the|of|to|a|an|in|with|for|but|because|which|that|is|are|such as)))\s*$"
)
# A number of a list without its item.
_NEXT_ITEM = re.compile(
    r"(?:(?<=[；;。！？\n])|(?<=[；;。！？\n] ))\s*(?:\d{1,2}[.、．)]|[-*•])\Z"
    r"|(?<=[；;，。])(?:其?[一二三四五六七八九]|第[一二三四五六七八九])\Z"
)
# In a text of a dozen characters only these tell.
_HANGING_SHORT = re.compile(rf"(?:[，,、]|{_JOINING})\Z")
_LONGEST_HANGING = 12  # characters: an answer is looked at no further before its end
_ITEM = re.compile(r"\s*(?:\d{1,2}[.、．)）]|[-*•]|[（(]?[一二三四五六七八九十][、.)）])")
_ENDED_ITEM = ("。", ".", "！", "!", "；", ";")
# An address ends as it likes.
_ADDRESS = re.compile(r"(?:://|www\.)[^\s，。]*\Z")
# Words that hardly ever end a sentence; looked for where there are sentences.
_HANGING_CHAR = re.compile(
    r"(?:(?<![存所现实内外自潜健正])在|(?<![温柔平总饱暖谐缓])和|(?<![参给赠])与|(?<![适恰相充担正])当|"
    r"(?<![麻名大上中少老主干门健小猛])将|(?<!自)如|[及或使让且而但若最很每各第这那某于])\Z"
)
_SENTENCE_END = re.compile(r"[。！？!?]|(?<!\d)\.(?=\s)")
_HAN_OR_LATIN = re.compile(r"[\u4e00-\u9fffA-Za-z]")


def cut_midway(talk: Talk) -> Iterator[Span]:
    """Answers that end in the middle of a sentence."""
    for turn, _, answer in talk.pairs:
        text = answer.rstrip()
        if len(text) < 16:
            if len(text) >= 7 and (hanging := _HANGING_SHORT.search(text)):
                yield Span("answer-cut-midway", turn, hanging.start(), len(text))
            continue
        if number := _NEXT_ITEM.search(text, len(text) - _LONGEST_HANGING):
            yield Span("answer-cut-midway", turn, number.start(), len(text))
            continue
        if text.endswith(_ENDS) or (
            ("://" in text or "www." in text) and _ADDRESS.search(text, max(0, len(text) - 300))
        ):
            continue
        line = text[text.rfind("\n") + 1 :]
        hanging = _HANGING.search(line, max(0, len(line) - _LONGEST_HANGING))
        if hanging is None and len(line) >= 10 and ("，" in line or "。" in line):
            hanging = _HANGING_CHAR.match(line, len(line) - 1)
        if hanging:
            if not (line.endswith((":", "：", "-", "—", "=", "+")) and talk.is_of_code):
                yield Span("answer-cut-midway", turn, len(text) - len(hanging[0]), len(text))
            continue
        if _is_unlike_its_list(text):
            kind = "answer-cut-midway" if line[-1].isascii() else NO_FULL_STOP
            yield Span(kind, turn, len(text) - min(12, len(line)), len(text))
            continue
        ends = [match.end() for match in _SENTENCE_END.finditer(line)]
        # One sentence without a full stop is a habit; a last one after others was perhaps cut.
        style = len(ends) >= 2 or (len(line) >= 24 and (ends or line.count("，") >= 2))
        last = len(line) - (ends[-1] if ends else 0)
        if style and _HAN_OR_LATIN.match(line[-1]) and 2 <= last <= 400:
            kind = "answer-cut-midway" if line[-1].isascii() else NO_FULL_STOP
            yield Span(kind, turn, len(text) - min(12, len(line)), len(text))


def _is_unlike_its_list(text: str) -> bool:
    """Whether the last item of a list has no full stop, though two or more before it have."""
    at = text.rfind("\n")
    if at < 0 or not _ITEM.match(text, at + 1) or not _HAN_OR_LATIN.match(text[-1]):
        return False
    items = [line.rstrip() for line in text[:at].splitlines() if _ITEM.match(line)]
    return len(items) >= 2 and all(item.endswith(_ENDED_ITEM) for item in items)


_CLAUSE = re.compile(r"[。！？!?\n；;，,]+|\.(?=\s|\Z)")
_NUMBERED = re.compile(
    r"\A\W*(?:(?:step|第)?\s?(?:\d{1,3}|[一二三四五六七八九十]{1,3})(?:[.、):：．）]|步[，,：:]?)\s*)?",
    re.I,
)
_RUN = re.compile(r"(.{2,60}?)\1{3,}", re.DOTALL)
_CHAR_RUN = re.compile(r"([^\s\-_=*.#+|·─━—–…<>~～/\\^`])\1{11,}")
_LONG_RUN = 25  # of a laugh, or of a digit
_CODE_RUN = 10  # lines of code may well be equal
# Items of a list that say one thing; the numbers before them make each line another text.
_LEAST_ITEMS = 8
_SAME_ITEMS = re.compile(
    r"^[^\S\n]*\d{1,3}[.、):：．）]\s?(?=\w)(?P<it>[^\n]{2,60})"
    rf"(?:\n+[^\S\n]*\d{{1,3}}[.、):：．）]\s?(?P=it)(?=\n|\Z)){{{_LEAST_ITEMS - 1},}}",
    re.MULTILINE,
)
_LAUGHTER = set("哈呵嘻啊嗯呜嘿啦哦噢唔耶嘎咯喵汪0123456789")
_GRAM = 6


def loops(talk: Talk) -> Iterator[Span]:
    """Answers that repeat a phrase or a sentence over and over."""
    for turn, _, answer in talk.pairs:
        n_grams = len(answer) - _GRAM + 1
        if n_grams < 8:
            continue
        if answer.count("\n") >= _LEAST_ITEMS - 1 and (items := _SAME_ITEMS.search(answer)):
            yield Span("loop", turn, *items.span())
            continue
        distinct = len({answer[at : at + _GRAM] for at in range(n_grams)})
        if distinct > 0.94 * n_grams:
            continue
        if found := _looped(answer):
            yield Span("loop", turn, *found)


def _looped(text: str) -> tuple[int, int] | None:
    for match in _RUN.finditer(text):
        unit = match[1]
        is_word = any(char.isalpha() for char in unit) and not set(unit) <= _LAUGHTER
        times = len(match[0]) // len(unit)
        if times < _CODE_RUN and _is_in_code(text, match.start()):
            continue
        if is_word and (len(match[0]) >= 16 or times >= 6):
            return match.span()
    for run in _CHAR_RUN.finditer(text):
        if run[1] not in _LAUGHTER or len(run[0]) >= _LONG_RUN:
            return run.span()
    clauses = [_NUMBERED.sub("", clause).strip() for clause in _CLAUSE.split(text)]
    said = Counter(clause for clause in clauses if len(clause) >= 4)
    if said:
        clause, times = said.most_common(1)[0]
        again = sum(count * len(each) for each, count in said.items() if count >= 3)
        is_all = (
            times >= 3 and len(text) >= 24 and again >= 0.7 * len(text) and clause[-1].isalpha()
        )
        if is_all or (times >= 4 and times * len(clause) >= 0.35 * len(text)):
            at = text.find(clause)
            if times >= _CODE_RUN or not _is_in_code(text, at):
                return at, at + len(clause)
    return None


def _is_in_code(text: str, at: int) -> bool:
    """Whether a place of a text lies between two fences."""
    return text.count("```", 0, at) % 2 == 1
