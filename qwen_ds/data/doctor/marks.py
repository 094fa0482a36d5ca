"""Marks left over in texts: control tokens, chat templates, tool calls, markup, escapes, blanks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwen_ds.data.doctor import characters as of
from qwen_ds.data.doctor.spans import Span, Talk, has_any, outside_code, pattern

_SPECIAL = pattern(
    r"<[|｜][^<>\s|｜]{1,40}[|｜]>|</?s>|<(?:pad|unk|eos|bos|cls|sep|mask|sop|eop|eod|eoh|eoa|eom|eot|eoc)>"
    r"|</?end_?of_?(?:text|turn|sentence)/?>|<(?:start|end)_of_turn>|<0x[0-9A-F]{2}>|<UNUSED_TOKEN_\d+>"
    r"|\[(?:CLS|SEP|PAD|UNK|gMASK|sMASK|EOS|BOS|unused\d+)\]|<reserved_\d+>",
    re.IGNORECASE,
)
_MASKED = pattern(r"\[MASK\]")
_CHAT = pattern(
    r"\[/?INST\]|<</?SYS>>|\[Round \d+\]|BEGINNING OF CONVERSATION|</?(?:human|bot|user|assistant)>:?"
    r"|#{2,4} ?(?:Instruction|Response|Input|Output|Human|Assistant|User|System|Question|Answer|"
    r"指令|输入|输出|回答|回复|问题|用户|助手)\s?(?:[:：]|$)"
    r"|(?:(?<=[\s。！？.!?])|^)(?:Human|Assistant|USER|ASSISTANT|GPT|AI)\s?[:：](?=\s|\S)"
    r"|<\|?im_(?:start|end|sep)\|?>",
    re.MULTILINE,
)
# In a question these may open a talk to be summed up; in an answer they continue one.
_CHAT_IN_ANSWER = pattern(
    r"\A\s*(?:助手|助理|机器人|小助手|AI助手|客服助手|Bot|Robot)[:：]|(?<=[\n。！？.!?])[ \t]*(?P<it>(?:User|Human|Bot|用户|人类|助手|助理|机器人|问|答|提问|回答)[:：])"
)
_TOOL = pattern(
    r"</?tool_?(?:call|response|result)s?>|</?function_?(?:call|response|s)?(?:=[\w.]+)?>"
    r"|^[ \t]*(?P<it>Action Input|Action|Observation|Thought|Final Answer)[:：]|✿[A-Z]+✿"
    r"|[\"'](?:function_call|tool_calls?)[\"']\s*:|\{\s*[\"']name[\"']\s*:\s*[\"'][\w.-]+[\"']\s*,\s*"
    r"[\"'](?:arguments|parameters)[\"']\s*:|oaicite|【\d+†[^】]*】|\bturn\d+(?:search|view|news)\d+"
    r"|<\|?(?:plugin|interpreter|python_tag|action_start|action_end)\|?>|</?(?:search|api|plugin|code_interpreter)>"
    r"|<invoke\b|(?:调用|使用)(?:工具|函数|插件|接口|API)[:：]|[\"'](?:tool|tool_name|action|action_input|plugin)[\"']\s*:"
    r"|^(?:search|browse|lookup|calculator|get_\w+|query_\w+|call_\w+)\([^()\n]*\)"
    r"|\[TOOL_CALLS\]|\[AVAILABLE_TOOLS\]|<eo[ctr]>|^Command: ?\w+\(",
    re.MULTILINE,
)
_STEPS = {"Action", "Observation", "Thought", "Final Answer"}
_CALLS_BY_NAME = re.compile(r"^[ \t]*Action[:：]\s*[A-Za-z_][\w.-]*\s*(?:\(.*\)|\[.*\])?\s*$", re.MULTILINE)
_TOOLS_ARE_THE_SUBJECT = ("Action Input", "tool_call", "function_call", "You have access to", "API")
_HTML = pattern(
    r"</?(?:br|p|div|span|a|b|i|u|em|strong|font|li|ul|ol|td|tr|th|table|tbody|thead|img|h[1-6]|hr|script|style|"
    r"center|section|article|iframe|input|button|body|html|head|meta|link|sup|sub|blockquote|pre|code|small|"
    r"label|form|option|select|video|svg|nobr|strike|del|ins|figure|header|footer|nav)(?:\s[^<>]{0,300})?/?\s?>"
    r"|<!--|-->|<!DOCTYPE",
    re.IGNORECASE,
)
_ENTITY = pattern(
    r"&(?:nbsp|lt|gt|amp|quot|apos|ldquo|rdquo|lsquo|rsquo|hellip|mdash|ndash|middot|copy|reg|times|"
    r"#\d{2,6}|#[xX][0-9a-fA-F]{2,5});"
)
_ESCAPE = pattern(
    r"\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|(?<!\\)(?:\\r)?\\n(?!(?:abla|eq|u|ot|e|i|otin|ewline|ewcommand|exists|mid|olimits|onumber|ormalsize)(?![a-z]))|\\n(?=\\n)|(?<!\\)\\t(?![a-z])"
    r"|\\\\n|(?<!\\)\\[\"'](?![a-z]\b)|(?:%[0-9A-F]{2}){6,}"
)
_FORMULA = re.compile(r"\\[(\[]|\\(?:frac|sqrt|times|cdot|begin|end|left|right|sum|int|text|pi)\b")
_DRIVE = re.compile(r"(?<![A-Za-z])[A-Za-z]:\\|\\\\\w+\\")
_WHOLE_BLANK = re.compile(
    r"[\s\[【（(<「]*(?:nan|none|null|nil|undefined|n/?a|#n/a|todo|tbd|tba|fixme|xxx+|待补充?|待定|待填写?|待完善|"
    r"待更新|待添加|待写|暂无|暂无答案|暂缺|暂略|略|同上|省略|占位符?|空|无内容|没有内容|测试|test|\.{2,}|…+|-+|_+|/+|\?+|"
    r"？+|placeholder|lorem ipsum.*|your (?:answer|text) here|answer here|此处填写.*|在此输入.*)"
    r"[\s\]】）)>」。.!！]*",
    re.IGNORECASE,
)
_PART_BLANK = pattern(
    r"(?:待补充|待完善|待填写)(?![\u4e00-\u9fff])|[（(【\[](?:待定|略|此处省略|内容省略|省略|占位符?|待写|待更新|待添加|填写|请填写)[^）)】\]\n]{0,12}[）)】\]]"
    r"|\b(?:TODO|TBD|FIXME)\b(?! ?(?:list|app|lists|列表|清单|应用|事项|注释))|此处(?:填写|插入|输入|补充|省略)|"
    r"(?:请)?在(?:此|这里)(?:填写|输入|插入|补充)|[Ll]orem ipsum|\{\{\s*[\w.\u4e00-\u9fff]+\s*\}\}|\$\{\w+\}|"
    r"\[(?:[Yy]our|[Ii]nsert|[Aa]dd|[Ee]nter|INSERT|YOUR) [^\]\n]{2,40}\]|<(?:[Yy]our|[Ii]nsert|INSERT|YOUR)[ _][^>\n]{2,40}>|"
    r"(?:^|[：:，,\s])(?P<it>(?:nan|NaN|NULL|None|undefined))(?=$|[。，,\s])|\[object Object\]|(?<![A-Za-z.@/])[Xx]{3,}(?![A-Za-z.])|(?:nan|NaN)(?=[\u4e00-\u9fff])|<placeholder>",
    re.MULTILINE,
)
_NUMBERS_ARE_THE_SUBJECT = re.compile(r"NaN|nan|None|NULL|null|undefined|TODO|TBD|占位")


def leftovers(talk: Talk) -> Iterator[Span]:
    """Control tokens, chat markers, tool calls, markup and escapes spelled in any turn."""
    for turn, ((role, text), classes) in enumerate(zip(talk.turns, talk.classes, strict=True)):
        asked = talk.turns[turn - 1][1] if turn else ""
        if classes & (of.ANGLE | of.BRACE):
            yield from _special(talk, turn, text)
        if classes & (of.COLON | of.ANGLE | of.BRACE) or "##" in text or "BEGINNING" in text:
            yield from _chat(turn, role, text, asked)
        if _may_call_tools(text, classes):
            about = f"{talk.system}\n{asked if role == 'assistant' else ''}"
            if not has_any(about, _TOOLS_ARE_THE_SUBJECT):
                yield from _tools(turn, text)
        if classes & (of.ANGLE | of.AMPERSAND):
            yield from _html(talk, turn, text)
        if (classes & of.BACKSLASH or "%E" in text) and not talk.is_of_code:
            yield from _escapes(turn, text)


def _special(talk: Talk, turn: int, text: str) -> Iterator[Span]:
    text = outside_code(text)
    for start, end in _SPECIAL(text):
        # <s> is also HTML's struck out text: with its end behind it and other tags around.
        is_html = text[start:end].lower() in ("<s>", "</s>") and talk.is_of_code
        if not is_html:
            yield Span("special-token-in-text", turn, start, end)
    if "[MASK]" in text and not talk.is_of_code:
        for start, end in _MASKED(text):
            yield Span("special-token-in-text", turn, start, end)


def _chat(turn: int, role: str, text: str, asked: str) -> Iterator[Span]:
    taken: list[tuple[int, int]] = []
    for start, end in _CHAT(text):
        taken.append((start, end))
        yield Span("chat-marker-in-text", turn, start, end)
    if role == "assistant" and not taken:
        for start, end in _CHAT_IN_ANSWER(text):
            if text[start:end] not in asked:
                yield Span("chat-marker-in-text", turn, start, end)


def _tools(turn: int, text: str) -> Iterator[Span]:
    spans = [Span("tool-call-leftover", turn, start, end) for start, end in _TOOL(text)]
    words = [text[span.start : span.end] for span in spans]
    # One such word may be a heading; a tool's name, or another of them, makes it a call.
    if {*words} & _STEPS and len({*words}) == 1 and not _CALLS_BY_NAME.search(text):
        return
    yield from spans


def _may_call_tools(text: str, classes: int) -> bool:
    if not classes & of.LATIN:
        return False
    return bool(classes & (of.ANGLE | of.BRACE)) or has_any(
        text, ("Action", "Observation", "Thought", "Final", "✿", "turn", "Command", "调用", "使用", "(", "【")
    )


def _html(talk: Talk, turn: int, text: str) -> Iterator[Span]:
    if talk.is_of_code:
        return
    text = outside_code(text)
    for find in (_HTML, _ENTITY):
        for start, end in find(text):
            yield Span("html-leftover", turn, start, end)


def _escapes(turn: int, text: str) -> Iterator[Span]:
    text = outside_code(text)
    if _FORMULA.search(text) or _DRIVE.search(text):
        return
    for start, end in _ESCAPE(text):
        yield Span("literal-escape", turn, start, end)


def blanks(talk: Talk) -> Iterator[Span]:
    """Placeholders that nobody filled in."""
    for turn, (role, text) in enumerate(talk.turns):
        if len(text) <= 40 and _WHOLE_BLANK.fullmatch(text):
            yield Span("placeholder", turn, 0, len(text))
            continue
        asked = talk.turns[turn - 1][1] if role == "assistant" else ""
        for start, end in _PART_BLANK(text):
            if talk.is_of_code or _asks_for_blanks(asked):
                break
            yield Span("placeholder", turn, start, end)


def _asks_for_blanks(question: str) -> bool:
    """Whether the question itself has a placeholder, or asks for a template with blanks."""
    return bool(_NUMBERS_ARE_THE_SUBJECT.search(question)) or has_any(
        question, ("模板", "填空", "template", "范本", "样本")
    )
