"""Control tokens, chat templates and tool calls that are spelled in texts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwen_ds.data.doctor import characters as of
from qwen_ds.data.doctor.spans import Span, Talk, any_of, has_any, outside_code, pattern

_SPECIAL = pattern(
    "|".join(
        [
            r"<[|｜][^<>\s|｜]{1,40}[|｜]>",
            r"</?s>",
            r"<[|｜]?(?:im[_ ]?(?:start|end)|endoftext)[|｜]?>|<extra_id_\d+>",
            f"<{any_of('pad unk eos bos cls sep mask sop eop eod eoh eoa eom eot eoc')}>",
            r"</?end_?of_?(?:text|turn|sentence)/?>",
            r"<(?:start|end)_of_turn>",
            r"<0x[0-9A-F]{2}>",
            r"<UNUSED_TOKEN_\d+>",
            r"<reserved_\d+>",
            r"\[(?:CLS|SEP|PAD|UNK|gMASK|sMASK|EOS|BOS|unused\d+)\]",
        ]
    ),
    re.IGNORECASE,
)
_MASK = pattern(r"\[MASK\]")  # a word for a blank in exercises, too
_HEADINGS = any_of(
    "Instruction Response Input Output Human Assistant User System Question Answer "
    "指令 输入 输出 回答 回复 问题 用户 助手"
)
_SPEAKER = any_of("Human User Assistant AI Bot System 用户 助手 人类")
_NOT_DEFINED = r"(?!\s?(?:是?指|即|表示|代表|means\b|refers\b|stands\b))"
_CHAT = pattern(
    "|".join(
        [
            r"\[/?INST\]|<</?SYS>>|\[Round \d+\]|BEGINNING OF CONVERSATION",
            r"</?(?:human|bot|user|assistant)>:?",
            r"<im_(?:start|end|sep)>",
            r"<\|im_start\|>\s?(?:user|assistant|system)\b",
            r"<\|(?:user|assistant|system|human|bot|prompter)\|>|<\|start_header_id\|>",
            rf"\[\|{_SPEAKER}\|\]|\[{_SPEAKER}\]\s?[:：]",
            r"^system[:：]\s?You are|##(?:回答|问题|指令|输出)##",
            rf"#{{2,4}} ?{_HEADINGS}\s?(?:[:：]|$)",
            r"(?:(?<=[\s。！？.!?])|^)(?:Human|Assistant|USER|ASSISTANT)\s?[:：]" + _NOT_DEFINED,
        ]
    ),
    re.MULTILINE,
)
_ANSWERS = any_of("助手 助理 机器人 小助手 AI助手 客服助手 Bot Robot AI GPT ChatGPT 模型 回答 回复")
_ASKS_ON = re.compile(r"(?:^|[\s。！？.!?])(?:问|提问|追问|用户|User|Human)[:：]")
# In a question these may open a talk to be summed up; in an answer they continue one.
_CHAT_IN_ANSWER = pattern(
    rf"\A\s*{_ANSWERS}[:：]"
    r"|\A\s*【(?:回答|回复|输出|助手)】|\A\s*Q[:：][^\n]+\n+A[:：]"
    r"|(?<=[\n。！？.!?])[ \t]*"
    rf"(?P<it>{any_of('User Human Bot 用户 人类 助手 助理 机器人 问 答 提问 回答')}[:：])"
    + _NOT_DEFINED
)
_TOOL = pattern(
    "|".join(
        [
            r"</?\|?tool_?(?:call|use|response|result|output)s?(?:_begin|_end)?\|?>",
            r"</?function_?(?:call|response|s)?(?:=[\w.]+)?>",
            r"^[ \t]*(?P<it>Action Input|Action|Observation|Thought|Final Answer)[:：]",
            r"✿[A-Z]+✿",
            r"[\"'](?:function_call|tool_calls?|tool|tool_name|action|action_input|plugin)[\"']\s*:",
            r"\{\s*[\"']name[\"']\s*:\s*[\"'][\w.-]+[\"']\s*,\s*[\"'](?:arguments|parameters)[\"']\s*:",
            r"oaicite|【\d+†[^】]*】|\bturn\d+(?:search|view|news)\d+",
            r"<\|?(?:plugin|interpreter|python_tag|action_start|action_end)\|?>",
            r"</?(?:search|api|plugin|code_interpreter)>|<invoke\b|<eo[ctr]>",
            r"(?:调用|使用)(?:工具|函数|插件|接口|API)[:：]|\[(?:调用|使用|执行)[^\[\]\n]{2,16}\]",
            r"[Cc]alling (?:the )?(?:function|tool) \w+|^\[\w+\(\w+=[^\n]*\)\]$",
            r"[\"']type[\"']\s*:\s*[\"']function[\"']",
            r"[\"']api(?:_name)?[\"']\s*:\s*[\"'][^\"'\n]+[\"']\s*,\s*[\"']param\w*[\"']\s*:",
            r"^(?:search|browse|lookup|calculator|get_\w+|query_\w+|call_\w+)\([^()\n]*\)",
            r"\[TOOL_CALLS\]|\[AVAILABLE_TOOLS\]|^Command: ?\w+\(",
        ]
    ),
    re.MULTILINE,
)
_STEPS = {"Action", "Observation", "Thought", "Final Answer"}
_CALLS_BY_NAME = re.compile(
    r"^[ \t]*Action[:：]\s*[A-Za-z_][\w.-]*\s*(?:\(.*\)|\[.*\])?\s*$", re.MULTILINE
)
_TOOL_WORDS = (
    "Action", "Observation", "Thought", "Final", "✿", "turn", "Command", "alling", "调用",
    "使用", "(", "【",
)  # fmt: skip
# A row about the marks, and a question for a talk.
_MARKS_ARE_THE_SUBJECT = re.compile(
    r"特殊(?:标记|记号|符号|字符|词元|token)|(?:对话|聊天|提示)模板"
    r"|(?:chat|prompt) template|special tokens?"
    r"|(?<![<\[/])\b[BE]OS\b(?![>\]])|[”`\]>]\s?(?:标记|记号|符号|token)",
    re.IGNORECASE,
)
_ASKS_FOR_A_TALK = re.compile(
    r"对话|对白|问答|采访|访谈|面试|剧本|台词|聊天|FAQ|Q&A|dialog|conversation|interview|script|chat",
    re.IGNORECASE,
)
_TOOLS_ARE_THE_SUBJECT = ("Action Input", "tool_call", "function_call", "You have access to", "API")


def leftovers(talk: Talk) -> Iterator[Span]:
    """Control tokens, chat markers and tool calls spelled in any turn."""
    for turn, ((role, text), classes) in enumerate(zip(talk.turns, talk.classes, strict=True)):
        asked = talk.turns[turn - 1][1] if turn else ""
        if classes & (of.ANGLE | of.BRACE):
            yield from _special(talk, turn, text)
        may_chat = classes & (of.COLON | of.ANGLE | of.BRACE) or "##" in text or "【" in text
        if may_chat or "BEGINNING" in text:
            spans = _chat(turn, role, outside_code(text), asked, classes)
            if spans and not _is_subject(talk, turn):
                yield from spans
        if _may_call_tools(text, classes):
            about = f"{talk.system}\n{asked if role == 'assistant' else ''}"
            if not has_any(about, _TOOLS_ARE_THE_SUBJECT):
                yield from _tools(turn, text)


def _special(talk: Talk, turn: int, text: str) -> Iterator[Span]:
    text = outside_code(text)
    found = list(_SPECIAL(text))
    if found and _is_subject(talk, turn):
        return
    for start, end in found:
        # <s> is also HTML's struck out text.
        is_html = text[start:end].lower() in ("<s>", "</s>") and talk.is_of_code
        if not is_html:
            yield Span("special-token-in-text", turn, start, end)
    if "[MASK]" in text and not talk.is_of_code:
        for start, end in _MASK(text):
            yield Span("special-token-in-text", turn, start, end)


def _is_subject(talk: Talk, turn: int) -> bool:
    asked = turn if talk.turns[turn][0] == "user" else turn - 1
    return _MARKS_ARE_THE_SUBJECT.search(talk.turns[max(0, asked)][1]) is not None


def _chat(turn: int, role: str, text: str, asked: str, classes: int) -> list[Span]:
    may_be = classes & (of.LATIN | of.ANGLE | of.BRACE) or "##" in text
    found = list(_CHAT(text)) if may_be else []
    if role == "assistant" and not found and (classes & of.COLON or "【" in text):
        places = _of_a_talk(text)
        found = [(start, end) for start, end in places if text[start:end].strip() not in asked]
        if found and _ASKS_FOR_A_TALK.search(asked):
            found = []
    return [Span("chat-marker-in-text", turn, start, end) for start, end in found]


def _of_a_talk(text: str) -> Iterator[tuple[int, int]]:
    """Places of markers in an answer, without the 问 and 答 of a problem and its solution: a talk
    has a question after an answer."""
    found = list(_CHAT_IN_ANSWER(text))
    if not found:
        return
    starts_so = text.lstrip().startswith("答") and "\n答" in text
    last_asked = max((match.start() for match in _ASKS_ON.finditer(text)), default=-1)
    for start, end in found:
        name = text[start : end - 1]
        if name == "答":
            is_of_a_sum = not starts_so and last_asked < end
        else:
            is_of_a_sum = name == "问" and not text[:start].rstrip(" \t").endswith("\n")
        if not is_of_a_sum:
            yield start, end


def _tools(turn: int, text: str) -> Iterator[Span]:
    spans = [Span("tool-call-leftover", turn, start, end) for start, end in _TOOL(text)]
    words = {text[span.start : span.end] for span in spans}
    # One such word may be a heading; a tool's name, or another of them, makes it a call.
    if words & _STEPS and len(words) == 1 and not _CALLS_BY_NAME.search(text):
        return
    yield from spans


def _may_call_tools(text: str, classes: int) -> bool:
    if not classes & (of.LATIN | of.BRACE | of.COLON):
        return "†" in text
    return bool(classes & (of.ANGLE | of.BRACE)) or has_any(text, _TOOL_WORDS)
