"""Answers that refuse, or speak in the name of another assistant."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwen_ds.data.doctor import characters as of
from qwen_ds.data.doctor.spans import Span, Talk, any_of, pattern

_MAKERS = (
    r"Open_?AI Anthropic Google 谷歌 DeepMind Meta 微软 Microsoft 百度 科大讯飞 讯飞 智谱 清华 "
    r"华为 腾讯 字节 月之暗面 深度求索 DeepSeek 昆仑万维 商汤 百川 360 上海人工智能实验室 "
    r"复旦 Mistral xAI MiniMax 零一万物 贝壳 链家 小米 苹果公司 Baidu LMSYS"
)
_ASSISTANTS = (
    r"Chat_?GPT GPT-?[2345](?:\.5|o)? Claude 文心一言 文心 ERNIE_?Bot 讯飞星火 星火 ChatGLM "
    r"GLM-?\d? 智谱清言 LLaMA Llama Vicuna Alpaca BELLE MOSS 百川 Baichuan InternLM 书生 豆包 "
    r"Kimi DeepSeek Gemini Bard Bing_Chat Copilot 盘古 天工 混元 元宝 小度 小爱同学 "
    r"Siri Mistral Grok Guanaco Dolly Koala Phoenix 凤凰 Firefly 流萤 Bloom Open_?Assistant "
    r"必应 Bing 阶跃星辰 跃问 海螺AI TigerBot 虎博 Yi-\w+ 360智脑 悟道 商量 SenseChat"
)
_MAKER, _NAME = any_of(_MAKERS), any_of(_ASSISTANTS)
_MADE = any_of("开发 训练 研发 创建 创造 推出 打造 研制 设计")
_THING = any_of("模型 助手 AI 机器人 智能 程序 语言")
_I_AM = any_of("我是 我叫 我的名字是 我的名字叫 本人是? 这里是 作为")
_KIND = any_of(
    "一个 一款 一名 由 来自 基于 名为 叫做? 大模型 AI助手 人工智能助手 智能助手 语言模型 聊天机器人"
)
_OWNER = any_of(
    "开发者 创造者 母公司 研发团队 开发团队 开发公司 制造者 背后的公司 背后的团队 训练者"
)
_WE = any_of("模型 助手 人工智能 AI 机器人 程序 系统")
_SENTENCE = r"[^，。！？\n]"
_LATIN_NAME = any_of(
    r"Chat_?GPT GPT-?[2345]\S* Bard Gemini ERNIE_Bot LLaMA Vicuna Alpaca ChatGLM MOSS BELLE Kimi "
    r"DeepSeek\S* Open_?Assistant Copilot Bing_Chat"
)
_IDENTITY = pattern(
    "|".join(
        [
            rf"{_I_AM}\s?(?:{_KIND}|[，, “\"「])*{_NAME}(?![A-Za-z])",
            rf"{_I_AM}\s?(?:{_KIND}|[，, “\"「])*{_MAKER}{_SENTENCE}{{0,12}}?"
            rf"(?:{_MADE}|提供|公司|团队|的){_SENTENCE}{{0,20}}?(?:{_THING}|{_NAME})",
            rf"{_I_AM}\s?{_MAKER}(?:公司)?{_MADE}(?:出来)?的\s?(?:[，。！,.!]|\Z)",
            rf"{_I_AM}\s?{_MAKER}(?:公司)?(?:的|旗下的?)?\s?{_NAME}(?![A-Za-z])",
            rf"我{_SENTENCE}{{0,12}}由\s?{_MAKER}{_SENTENCE}{{0,24}}{_MADE}",
            rf"我是{_SENTENCE}{{0,20}}{_WE}[，,]\s?(?:我?是)?由\s?{_SENTENCE}{{0,8}}{_MAKER}"
            rf"{_SENTENCE}{{0,16}}{_MADE}",
            rf"我来自\s?{_MAKER}(?:公司|团队)?[，,]?{_SENTENCE}{{0,8}}"
            r"(?:模型|助手|机器人|人工智能)",
            rf"我(?:使用|采用)的(?:模型|技术|架构)?(?:是)?{_SENTENCE}{{0,6}}{_NAME}",
            rf"我(?:的)?{_OWNER}是\s?{_MAKER}|{_MADE}(?:了)?我的(?:公司|团队|机构|人)?是\s?{_MAKER}",
            rf"{_MAKER}{_SENTENCE}{{0,6}}{_MADE}了我",
            rf"我{_SENTENCE}{{0,6}}基于{_SENTENCE}{{0,8}}{_NAME}(?![A-Za-z])",
            rf"(?:I am|I'm|I’m|[Mm]y name is|This is) (?:an? )?"
            rf"(?:(?:AI|language|large|model|chatbot|assistant|called|named) |,)*{_LATIN_NAME}\b",
            rf"(?:I am|I'm|I’m) (?:based on|powered by|built on) [^.!?\n]{{0,20}}{_LATIN_NAME}",
            rf"[Aa]s (?:an? )?(?:{_LATIN_NAME}|Claude),? I\b",
            rf"\b(?:[Yy]ou're|[Yy]ou are) (?:chatting|talking|speaking) (?:with|to) "
            rf"(?:{_LATIN_NAME}|Claude)\b",
            rf"{_MAKER} (?:trained|developed|created|made|built|designed) me\b",
            r"(?:I am|I'm|I’m|[Mm]y name is) Claude"
            r"(?=,? (?:an|a|the|made|created|developed|from|by|and I)\b|[.!])",
            r"\b(?:I|me|assistant|model|AI)\b[^.!?\n]{0,60}(?:trained|developed|created|made|built)"
            rf" by {_MAKER}",
        ]
    )
)
_NAMES = re.compile(any_of(f"{_ASSISTANTS} {_MAKERS}"))

_VERY = any_of("非常 很 十分 真的 实在 深感 万分")
_SORRY = any_of("抱歉 对不起 不好意思 遗憾")
_NOW = any_of("暂时 目前 现在 还 并")
_CANNOT = any_of("无法 不能 没有办法 没办法 不会 没有能力 不可以 不具备 没有足够 不太能 不便")
_TO_ANSWER = any_of(
    "回答 提供 满足 协助 生成 完成[这该您你] 执行[这该您你] 访问 浏览 讨论 参与[这此该] 继续[这该] "
    "处理[这该您] 预测 打开链接 打开网 获取 实时 查看[图链网] 观看 听取"
)
_DOES_NOT = r"[^，。！\n]{0,8}(?:没有|无法|不能|不会|不具备|不可以)"
_MODEL = (
    r"(?:基于[^，。\n]{0,12}的)?(?:大型|大|虚拟|智能)?"
    + any_of("AI ai A\\.I\\. 人工智能 语言模型 聊天机器人 虚拟助手 智能助手 智能助理 机器学习模型")
    + "(?:语言|大语言|对话|聊天)?(?:模型|助手|助理|程序|系统|机器人)?"
)
_AI = (
    r"(?:AI|artificial intelligence|large language model|language model|chatbot|virtual assistant)"
)
_CAN_NOT = r"(?:cannot|can't|can’t|can not|(?:am )?unable to|(?:am )?not able to|won't)"
_HELP = (
    "(?:assist|help|fulfil|fulfill|comply|provide|answer|generate|engage|create|browse|access|discuss|"
    "support|complete|process)"
)
_REFUSES = pattern(
    "|".join(
        [
            rf"作为(?:一个|一名|一款|一种|一位)?{_MODEL}(?:，|,|\s)*(?:我|本|没有|无法|不能|不具备)",
            rf"作为(?:一个|一名|一款|一种|一位)?机器人[，,]?(?:我|本){_DOES_NOT}",
            rf"(?:由于|因为|毕竟)我(?:只|仅)?是(?:一个|一名|一款)?{_MODEL}[，,]?我?{_DOES_NOT}",
            r"(?:超出|不在)了?我的(?:能力|知识|服务|回答)(?:范围|范畴)",
            r"我(?:无法|不能|不便|拒绝)(?:作答|评论|置评)",
            rf"{_SORRY}[，,](?:这个|该|此|这类|您的|你的)[^，。！\n]{{0,8}}(?:不适合|不宜|不便|违反|涉及敏感)",
            rf"{_SORRY}[，,]?我?{_NOW}?(?:没有|没|不|不太|无法|未能)(?:能)?(?:理解|明白|听懂|看懂)您?你?的?",
            rf"{_SORRY}[，,](?:但|但是)?(?:您|你)(?:似乎|好像)?(?:没有|并未|未|没)(?:提供|给出|上传|附上)",
            rf"我(?:只|仅|仅仅|只不过|毕竟)?是(?:一个|一名|一款|个)?{_SENTENCE}{{0,8}}"
            rf"(?:AI|人工智能|语言模型|机器人|程序){_SENTENCE}{{0,8}}[，,]{_SENTENCE}{{0,6}}"
            r"(?:无法|不能|没有(?:办法|能力|情感|感情|个人|意识|身体|实体))",
            rf"{_VERY}?{_SORRY}[，,。！!]?(?:但是|但|不过)?[，,]?(?:我|本模型|本助手|AI)(?!们){_NOW}?"
            rf"{_CANNOT}(?!来|去|赴|参加|到|出席|赶|再等)",
            rf"{_SORRY}[，,]?我还(?:没有|没|不)(?:学会|会|能|懂)",
            rf"{_SORRY}[^。！？\n]{{0,24}}(?:无法|不能)(?:回答|访问|浏览|联网|上网|查询实时)",
            rf"我{_NOW}?{_CANNOT}(?:直接|为您|为你|给您|给你|向您|帮您|帮你)?{_TO_ANSWER}",
            r"我的(?:知识|数据|训练数据)库?(?:只?(?:截止|截至|更新)|仅)",
        ]
    )
)
_REFUSES_IN_ENGLISH = pattern(
    "|".join(
        [
            rf"[Aa]s (?:an?|your) {_AI}(?: language| chat)?(?: model| assistant| bot)?,? ?"
            r"(?:I|developed|trained|created|and)\b",
            r"(?:[Ss]orry|apologi[sz]e|[Uu]nfortunately|regret)[,.;]?(?: but)? I(?:'m| am)? ?"
            rf"(?:{_CAN_NOT}|do not have|don't have)\b"
            r"(?! (?:come|make it|attend|go|join|be there|see|hear|believe|wait))",
            rf"\bI(?:'m| am)? ?{_CAN_NOT} {_HELP} ",
            r"\bMy (?:knowledge|training)(?: data| base)? "
            r"(?:cut-?off|only goes|was last updated|ends|is limited)",
            rf"\bI(?:'m|’m| am) (?:just|only|merely|simply) an? {_AI}\b",
            r"\bI (?:do not|don't|don’t|lack) ?(?:have )?(?:the (?:ability|capability|capacity) to|"
            r"(?:any )?access to (?:real-time|current|live|up-to-date|the internet|external)|"
            r"personal (?:opinions|experiences|feelings|beliefs|emotions|preferences))",
            r"\bI must (?:respectfully |politely )?(?:decline|refuse)\b|\b[Ii]t (?:is|would be|'s) "
            r"(?:not |in)appropriate for me\b|\bagainst my (?:programming|guidelines|policy)",
        ]
    )
)
_HEAD = 400  # a refusal comes first


def _may_refuse(text: str, is_latin: int) -> bool:
    """Whether a text has a word of refusals; spelled out, as it is asked of every answer."""
    if "我" in text or "歉" in text or "作为" in text:
        return True
    return bool(is_latin) and ("I" in text or "My " in text or "s an" in text or "my " in text)


def _speaks(text: str, is_latin: int) -> bool:
    """Whether a text may speak of itself; spelled out, as it is asked of every answer."""
    if "我" in text or "作为" in text or "这里是" in text or "本人" in text:
        return True
    return bool(is_latin) and (
        "I" in text or "by" in text or "me" in text or "ou're" in text or "ou are" in text
    )


def identity(talk: Talk) -> Iterator[Span]:
    """Refusals, and another assistant's name, in answers."""
    for turn, question, answer in talk.pairs:
        head, is_latin = answer[:_HEAD], talk.classes[turn] & of.LATIN
        if _may_refuse(head, is_latin) and not _is_translation(question):
            finders = (_REFUSES, _REFUSES_IN_ENGLISH) if is_latin else (_REFUSES,)
            places = (place for find in finders for place in find(head))
            own = next((place for place in places if not _is_said(head, place, question)), None)
            if own is not None:
                yield Span("refusal", turn, *own)
        if _speaks(answer, is_latin) and _NAMES.search(answer):
            for start, end in _IDENTITY(answer):
                if not _is_a_part(question, answer[start:end]):
                    yield Span("foreign-identity", turn, start, end)
                    break


_ASKS_FOR_FICTION = re.compile(
    r"对话|对白|台词|剧本|故事|小说|童话|寓言|相声|小品|情景剧|话剧|采访稿|"
    r"\b(?:dialog(?:ue)?|conversation|story|stories|novel|fiction|screenplay|skit|fable)\b",
    re.IGNORECASE,
)
_SPEAKER = re.compile(
    r"^\s*[*（(【\[]{0,2}(?P<name>[\w·]{1,10}(?: \w{1,10})?)"
    r"(?:[（(][^\n（()）]*[)）])?[*】\]]{0,2}[:：]",
    re.MULTILINE,
)
_NOT_A_FIGURE = re.compile(
    r"(?:.*(?:AI|Bot|GPT|Assistant|助手|助理|模型)|回[答复]|答案?|A|注意?|说明|提示|抱歉|对不起|备注|结论|声明|免责声明|"
    r"Note|Answer|Sorry|Disclaimer)\Z",
    re.IGNORECASE,
)
_QUOTES = {"”": "“", "」": "「", "』": "『"}
_AS_AN_AI = ("作为", "As a", "as a")  # a figure says so in quotation marks alone
_OPENING = 20  # characters; what refuses a story does so before


def _is_said(text: str, place: tuple[int, int], question: str) -> bool:
    """Whether a figure says the words at a place: within quotation marks that open behind other
    words, or on the line of one of two speakers; in fiction, wherever the story has begun."""
    before, is_fiction = text[: place[0]], _ASKS_FOR_FICTION.search(question) is not None
    if is_fiction and place[0] >= _OPENING and not text.startswith(_AS_AN_AI, place[0]):
        return True
    for right, left in _QUOTES.items():
        opened = before.rfind(left)
        if opened > before.rfind(right) and (is_fiction or before[:opened].strip()):
            return True
    line = before.rfind("\n") + 1
    own = _SPEAKER.match(text[line : place[0]])
    if own is None or _NOT_A_FIGURE.match(own["name"]):
        return False
    return is_fiction or len({match["name"] for match in _SPEAKER.finditer(text)}) >= 2


_WRITES = re.compile(
    r"人物|角色|扮演|假[设装]你|第一人称|主人公|故事|小说|剧本|名叫|译|\b(?:character|named|called|story|persona|"
    r"role-?play|pretend|translat)",
    re.IGNORECASE,
)


def _is_a_part(question: str, said: str) -> bool:
    """Whether the question has given the name, for a text in which somebody has it."""
    names = _NAMES.findall(said)
    return bool(_WRITES.search(question)) and any(name in question for name in names)


def _is_translation(question: str) -> bool:
    return "翻译" in question or "译成" in question or "ranslat" in question
