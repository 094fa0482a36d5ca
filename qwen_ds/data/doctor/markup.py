"""HTML and escapes that nobody decoded, and blanks that nobody filled in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.entities import name2codepoint

from qwen_ds.data.doctor import characters as of
from qwen_ds.data.doctor.spans import Span, Talk, any_of, has_any, outside_code, pattern

_TAGS = any_of(
    "br p div span a b i u em strong font li ul ol td tr th table tbody thead img h[1-6] hr script "
    "style center section article iframe input button body html head meta link sup sub blockquote "
    "pre code small label form option select video svg nobr strike del ins figure header footer nav"
)
_HTML = pattern(
    rf"[<＜]/?{_TAGS}(?:\s[^<>]{{0,300}})?/?\s?[>＞]|<!--|-->|<!DOCTYPE",
    re.IGNORECASE,
)
_ENTITY = pattern(
    rf"&(?:{'|'.join([*name2codepoint, 'apos'])}|#\d{{2,6}}|#[xX][0-9a-fA-F]{{2,5}});"
)
_BB_CODE = pattern(r"\[/(?:b|i|u|url|img|quote|color|size|font|center)\]")
# Of LaTeX, which begin as a line break does.
_COMMANDS = any_of("abla eq u ot e i otin ewline ewcommand exists mid olimits onumber ormalsize")
_ESCAPE = pattern(
    "|".join(
        [
            r"\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\U000[0-9a-fA-F]{5}|(?<=\w)\\/(?=\w)",
            rf"(?<!\\)(?:\\r)?\\n(?!{_COMMANDS}(?![a-z]))|\\n(?=\\n)|\\\\n",
            r"(?<!\\)\\t(?![a-z])",
            r"(?<!\\)\\[\"'](?![a-z]\b)",
            r"(?:%[0-9A-F]{2}){6,}",
        ]
    )
)
_LONGEST_ADDRESS = 203
_IN_ADDRESS = re.compile(r"://[^\s，。]*\Z")
_FORMULA = re.compile(r"\\[(\[]|\\(?:frac|sqrt|times|cdot|begin|end|left|right|sum|int|text|pi)\b")
_DRIVE = re.compile(r"(?<![A-Za-z])[A-Za-z]:\\|\\\\\w+\\")
# Words that stand in place of a text. Some are also the subject of one, such as what a program
# prints for a value that is missing.
_VALUES = "NaN|nan|None|NULL|undefined"
_TO_DO = "TODO|TBD"
_TO_COME = "待补充 待完善 待填写"
_LEFT_OUT = "待定 待写 待更新 待添加 省略 略 占位符?"
_WHOLE_BLANK = re.compile(
    r"[\s\[【（(<「]*(?:"
    + any_of(
        rf"{_VALUES} nil n/?a \#n/a {_TO_DO} tba fixme xxx+ {_TO_COME} {_LEFT_OUT} 待补 待填 "
        r"待?续写 暂无(?:答案|内容|数据|信息)? 答案略 暂缺 暂略 "
        r"[暂还]?未(?:填写?|提供) 同上 \.{2,} …+ _+ /+ \?+ ？+ "
        r"-{1,3} n\.a to_be_(?:added|filled|completed|determined|announced).* coming_soon "
        r"no_answer <answer> (?:asdf|qwer)\w* "
        r"(?:这里|此处)(?:[是为]|是为)?(?:答案|回答|内容|示例)\w{0,4} "
        r"placeholder lorem_ipsum.* your_(?:answer|text)_here answer_here 此处填写.* 在此输入.*"
    )
    + r")[\s\]】）)>」。.!！]*",
    re.IGNORECASE,
)
_TO_FILL = any_of(f"{_LEFT_OUT} 此处省略 内容省略 填写 请填写")
_CHINESE = r"[\u4e00-\u9fff：，。、“”《》（）【】]"
# Each part begins with a character, and looks at what is before it afterwards: the engine soon
# passes where that character is another one.
_PART_BLANK = pattern(
    "|".join(
        [
            rf"{any_of(_TO_COME)}(?![\u4e00-\u9fff])",
            rf"[（(【\[]{_TO_FILL}[^）)】\]\n]{{0,12}}[）)】\]]",
            rf"\b(?:{_TO_DO}|FIXME)\b(?! ?(?:list|app|lists|列表|清单|应用|事项|注释))",
            r"此处(?:填写|插入|输入|补充|省略)|(?:请)?在(?:此|这里)(?:填写|输入|插入|补充)",
            r"[Ll]orem ipsum|<placeholder>|\[object Object\]",
            r"\{\{\s*[\w.\u4e00-\u9fff]+\s*\}\}|\$\{\w+\}",
            r"\[(?:[Yy]our|[Ii]nsert|[Aa]dd|[Ee]nter|INSERT|YOUR) [^\]\n]{2,40}\]",
            r"\[(?<=[\u4e00-\u9fff，、：]\[)(?:[你您我]的|姓名|名字|公司|职位|学校|产品|日期|时间|地[址点]|城市|电话)"
            r"[^\]\n]{0,8}\](?![(（:：])",
            r"<(?:[Yy]our|[Ii]nsert|INSERT|YOUR)[ _][^>\n]{2,40}>",
            rf"[：:]\s?(?P<it>{_VALUES})(?=[。.]?\s*$)",
            r"\{(?<![\\$#{}A-Za-z0-9_^]\{)(?:[A-Za-z]+_?[a-z]*|(?:姓名|名字|公司|产品|日期|地址|城市)\w{0,4})\}(?!\})",
            r"(?:nan|NaN)(?=[\u4e00-\u9fff])|(?=[Xx])(?<![A-Za-z.@/])"
            # A Roman number, too, but not in Chinese.
            rf"(?:(?<={_CHINESE})|(?<={_CHINESE}\s)|(?=[Xx]+\s?{_CHINESE}))[Xx]{{3,}}(?![A-Za-z.届])",
        ]
    ),
    re.MULTILINE,
)
_VALUES_ARE_THE_SUBJECT = re.compile(f"{_VALUES}|null|{_TO_DO}|占位")
# A note of what is to come instead of an answer.
_NOTE_ALONE = re.compile(rf"\s*(?:{_TO_DO})\b[^\n]{{0,40}}\s*")
_ASKS_FOR_BLANKS = ("模板", "填空", "template", "范本", "样本")


_QUOTED = ("'", '"', "`", "‘", "“", "’", "”")


def _is_quoted(text: str, start: int, end: int) -> bool:
    """Whether a mark stands alone between two quotation marks, as what a text speaks of."""
    return text[start - 1 : start] in _QUOTED and text[end : end + 1] in _QUOTED


# A question for a tag or an entity names it as it names a word.
_TAG = rf"(?:</?{_TAGS}\s?/?>|&\w{{2,8}};)"
_MARKUP_IS_THE_SUBJECT = re.compile(
    rf"{_TAG}\s?(?:和|与|跟|同|或|及|、|and|or|vs\.?|,)\s?{_TAG}"
    rf"|{_TAG}\s?(?:这个|的)?(?:有什么|是什么|是啥|什么意思|怎么用|区别|作用|用法|含义|元素|实体|tags?\b|elements?\b)"
    rf"|\b(?:what (?:is|does|are)|an?|the|use) {_TAG}",
    re.IGNORECASE,
)


def markup(talk: Talk) -> Iterator[Span]:
    """HTML and escapes in rows that do not speak of code."""
    marks = of.ANGLE | of.AMPERSAND
    if talk.turns and talk.classes[0] & marks and _MARKUP_IS_THE_SUBJECT.search(talk.turns[0][1]):
        return
    for turn, ((_, text), classes) in enumerate(zip(talk.turns, talk.classes, strict=True)):
        if classes & marks and not talk.is_of_code:
            plain = outside_code(text)
            for find in (_HTML, _ENTITY):
                for start, end in find(plain):
                    yield Span("html-leftover", turn, start, end)
        if classes & of.BRACKET and "[/" in text and not talk.is_of_code:
            for start, end in _BB_CODE(text):
                yield Span("html-leftover", turn, start, end)
        if classes & of.BACKSLASH or "%E" in text:
            spans = _escapes(talk, outside_code(text))
            yield from (Span("literal-escape", turn, start, end) for start, end in spans)


# Characters in a row that JSON has escaped. Where a row speaks of code, only they tell.
_ESCAPED_WORD = pattern(r"(?:\\u[0-9a-fA-F]{4}){4,}")
_ESCAPES_ARE_THE_SUBJECT = re.compile(r"\\u|转义|编码|解码|(?i:unicode|escape|utf|json|decod)")


def _escapes(talk: Talk, plain: str) -> Iterator[tuple[int, int]]:
    """The places of escapes that are spelled in a text without its code."""
    if talk.is_of_code:
        if not any(_ESCAPES_ARE_THE_SUBJECT.search(text) for _, text in talk.turns[:1]):
            yield from _ESCAPED_WORD(plain)
        return
    if _FORMULA.search(plain) or _DRIVE.search(plain):
        return
    for start, end in _ESCAPE(plain):
        before = max(0, start - _LONGEST_ADDRESS)
        is_address = plain[start] == "%" and _IN_ADDRESS.search(plain, before, start)
        if not (is_address or _is_quoted(plain, start, end)):
            yield start, end


_BLANK_WORDS = ("待", "此处", "在此", "在这里")


def blanks(talk: Talk) -> Iterator[Span]:
    """Placeholders that nobody filled in."""
    for turn, (role, text) in enumerate(talk.turns):
        asked = talk.turns[turn - 1][1] if role == "assistant" else ""
        if role == "assistant" and _NOTE_ALONE.fullmatch(text):  # beside code, too
            if not _VALUES_ARE_THE_SUBJECT.search(asked):
                yield Span("placeholder", turn, 0, len(text))
            continue
        if len(text) <= 40 and _WHOLE_BLANK.fullmatch(text):
            if not (talk.is_of_code or _VALUES_ARE_THE_SUBJECT.search(asked)):
                yield Span("placeholder", turn, 0, len(text))
            continue
        may_be = talk.classes[turn] & (of.LATIN | of.BRACKET | of.ANGLE)
        if not (may_be or has_any(text, _BLANK_WORDS)):
            continue
        spans = [Span("placeholder", turn, start, end) for start, end in _PART_BLANK(text)]
        if spans and not (talk.is_of_code or _asks_for_blanks(asked)):
            yield from spans


def _asks_for_blanks(question: str) -> bool:
    """Whether the question itself has a placeholder, or asks for a template with blanks."""
    return bool(_VALUES_ARE_THE_SUBJECT.search(question)) or has_any(question, _ASKS_FOR_BLANKS)
