"""Columns that are empty, constant or swapped, and what a row that is not read says."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwen_ds.data.doctor.spans import Span, Talk

_ASKS = re.compile(
    r"[？?]|^(?:请|帮|怎样|哪|谁|写|列|介绍|解释|说明|描述|翻译|总结|根据|生成|编写|设计|"
    r"计算|判断|分析|推荐|告诉|能否|可以|你能|将|把|创建|回答|续写|改写|比较|讨论|简述|分类|提取|用|以|对|从|给|在|我|有|是)"
    r"|(?:什么|怎么|如何|哪些|多少|(?<![十百千万好近])几(?![乎十百千万])|吗|呢|为何)|^(?:What|How|Why|When|Where|Who|Which|Can|Could|Please|Write|Give|List|"
    r"Explain|Describe|Translate|Summari|Create|Generate|Tell|Is|Are|Do|Does|Name|Find|Make|Compare|Classify)\b"
)
_IS_QUESTION = re.compile(
    r"\A(?:请问?[^，。！\n]{2,40}|[^，。！\n]{0,24}(?:什么|怎么|怎样|如何|为什么|为何|哪[个些里座位种年月天本部条只项国]|多少|是否|谁)[^，。！\n]{0,24}"
    r"|(?:帮我|给我|写一|列出|列举|介绍一?下?|解释|描述|翻译|总结|简述|说明)[^。！\n]{2,40}"
    r"|(?:What|How|Why|When|Where|Who|Which|Please|Write|Give|List|Explain|Describe|Translate|Summarize)\b[^.!\n]{4,80})"
    r"[？?。.！]?\Z"
)
# Within a line: white space that may cross line breaks is tried from each of them anew.
_SPACE = r"[^\S\n]*"
# Whoever asks for a title, a label or a question is answered by one.
_INSTRUCTS = re.compile(
    rf"(?:^|[。！？：:；;\n]){_SPACE}(?:请(?!您|问)|帮我|给我)"
    rf"|(?:^|[。！？：:；;，\n]){_SPACE}(?:提出|写出?|列出|列举|介绍|解释|描述|翻译|总结|概括|归纳|生成|编写|设计|计算|判断|分析|续写|改写|"
    r"[英中汉日韩]译|比较|简述|分类|提取|抽取|找出|选择|选出|识别|拟|取|起)(?!了|的|出了|完)[^。\n]{0,40}[。：:；;\n]?"
    rf"|(?:^|\n){_SPACE}(?:根据|针对|阅读|对|把|将|用|为|给|从|就)[^。！？\n]{{1,30}}(?:提出|提问|提一|写|列|拟|取|起|生成|编|设计|判断|分析|"
    r"总结|概括|归纳|分类|提取|抽取|回答|翻译|改写|出一|问)"
    rf"|(?im:^{_SPACE}(?:please|write|give|list|ask|read|generate|create|make|summari[sz]e|translate|classify|extract|"
    r"tell|name|find|choose|answer|based on|given|pose|suggest|identify|compose|label)\b)"
)
# ADGEN: `类型#裙*材质#针织*颜色#纯色`.
_IS_LIST = re.compile(r"(?:[^\s#*。，]{1,12}#[^#*。\n]{1,30}(?:\*|\Z)){2,}\Z")
_ENDS_ASKING, _ENDS_STATEMENT = tuple("？?"), tuple("。.！!；;")


def swapped(talk: Talk) -> Iterator[Span]:
    """A question that reads like an answer, answered by what reads like its question."""
    if len(talk.turns) != 2:
        return
    question, answer = talk.turns[0][1].strip(), talk.turns[1][1].strip()
    if len(answer) > 100 or len(question) < 24 or len(question) < 1.5 * len(answer):
        return
    if not question.endswith(_ENDS_STATEMENT) or _ASKS.search(question):
        return
    if _IS_QUESTION.match(answer) and not _INSTRUCTS.search(question):
        yield Span("swapped-columns", 1, 0, len(answer))


def looks_swapped(question: str, answer: str) -> int:
    """1 where the answer reads like a question or a list of attributes and the question does not,
    nor holds an instruction; -1 the other way round; 0 where neither or both do. Single rows prove
    nothing; all rows of a file do."""
    asked, said = _reads_as_question(question), _reads_as_question(answer)
    if asked == said:
        asked, said = (_IS_LIST.match(text.strip()) is not None for text in (question, answer))
    if asked == said:
        return 0
    if asked:
        return -1
    return 0 if _INSTRUCTS.search(question) else 1


def _reads_as_question(text: str) -> bool:
    text = text.strip()
    if text.endswith(_ENDS_ASKING):
        return True
    return len(text) <= 60 and _IS_QUESTION.match(text) is not None
