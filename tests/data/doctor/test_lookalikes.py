"""Sound rows that look like a defect, each beside the defect that it looks like."""

from __future__ import annotations

import pytest

from tests.data.doctor.test_detectors import spans


def kinds(question: str, answer: str) -> set[str]:
    return {span.kind for span in spans(question, answer)}


@pytest.mark.parametrize("char", "裡裏跡週麵髮鬆鬥牆產總視")
def test_a_traditional_character_among_simplified_ones_is_found(char: str) -> None:
    (found,) = spans("请介绍一下这里的风景。", f"这边的湖{char}很漂亮，适合春天来。")
    assert (found.kind, found.start) == ("traditional-among-simplified", 4)


@pytest.mark.parametrize("char", "著乾藉徵瞭堃喆昇")
def test_a_character_of_both_scripts_is_no_finding(char: str) -> None:
    assert kinds("请介绍一下这个人的名字。", f"他叫王{char}，这是一个常见的名字。") == set()


@pytest.mark.parametrize(
    ("question", "answer", "is_blank"),
    [
        ("Which option is correct?", "None of them is, as all ignore friction.", False),
        ("Who came to the party?", "None, I am afraid. I was alone there.", False),
        ("Did anybody call?", "No one did,\nNone, to be exact.", False),
        ("Did anybody call?", "None", True),
        ("介绍一下这家酒店。", "酒店名称：None", True),
        ("介绍一下这家酒店。", "评分：nan。\n地址：南京路。", True),
        ("Who won in 1996?", "Super Bowl XXX was won by Dallas.", False),
        ("谁赢了1996年的超级碗？", "第XXX届超级碗由达拉斯牛仔队赢得。", False),
        ("写一份简历。", "姓名：XXX\n电话：无", True),
        ("写一份简历。", "我毕业于 xxx 大学。", True),
    ],
)
def test_words_of_english_are_no_blanks(question: str, answer: str, is_blank: bool) -> None:
    assert ("placeholder" in kinds(question, answer)) == is_blank


@pytest.mark.parametrize(
    ("answer", "is_phone"),
    [
        ("约为 13512345678 美元，比上年增长百分之五。", False),
        ("共有13512345678人。", False),
        ("大约是13512345678%。", False),
        ("重13512345678吨。", False),
        ("大约是 13500000000，比上年多。", False),
        ("请拨打13512345678，人工服务全天在线。", True),
        ("请拨打13512345678人工服务。", True),
        ("电话 13512345678 个人手机。", True),
        ("下单请打13512345678次日送达，元旦不休。", True),
        ("请打13512345678元旦不休。", True),
        ("号码是 13512345600。", True),
    ],
)
def test_an_amount_is_no_phone_number(answer: str, is_phone: bool) -> None:
    assert ("phone" in kinds("是多少？", answer)) == is_phone


SUM = "小明有3个苹果，又买了5个，一共有几个？"


@pytest.mark.parametrize(
    ("question", "answer", "is_marked"),
    [
        (SUM, "3+5=8（个）\n答：小明一共有8个苹果。", False),
        (SUM, "3+5=8（个）。答：小明一共有8个苹果。", False),
        ("谁发明了电话？", "问：谁发明了电话？\n答：贝尔。", False),
        ("出一道加法应用题。", "小红有4支笔，又买了2支。问：一共几支？\n答：6支。", False),
        ("解释 HCI。", "研究人与计算机的交互。\nHuman: 指用户；Computer: 指系统。", False),
        ("解释 HCI。", "研究人与计算机的交互。\nHuman: 继续", True),
        ("西湖在哪里？", "答：在杭州。\n问：它大吗？\n答：很大。", True),
        ("西湖在哪里？", "在杭州。\n答：是的。\n用户：它大吗？", True),
        ("西湖在哪里？", "答：在杭州。\n答：在浙江。", True),
        ("西湖在哪里？", "在杭州。\n问：它大吗？", True),
        ("西湖在哪里？", "在杭州。\n用户：它大吗？", True),
    ],
)
def test_the_solution_of_a_sum_is_no_talk(question: str, answer: str, is_marked: bool) -> None:
    assert ("chat-marker-in-text" in kinds(question, answer)) == is_marked


TIPS = "\n1. 早睡早起。\n2. 多走路。\n3. 少吃糖。"


@pytest.mark.parametrize(
    ("question", "answer", "is_echo"),
    [
        ("保持健康的三个提示。", f"以下是保持健康的三个提示：{TIPS}", False),
        ("保持健康的三个提示。", f"保持健康的三个提示：{TIPS}", False),
        ("保持健康的三个提示", f"**保持健康的三个提示**\n{TIPS}", False),
        ("Three tips for staying healthy.", f"Three tips for staying healthy:{TIPS}", False),
        ("保持健康的三个提示。", f"保持健康的三个提示。{TIPS}", True),
        ("请给出三个健康提示。", f"请给出三个健康提示：{TIPS}", True),
        ("列出保持健康的三个提示。", f"列出保持健康的三个提示：{TIPS}", True),
        ("怎样才能保持身体健康？", f"怎样才能保持身体健康：{TIPS}", True),
        ("How do I stay healthy?", f"How do I stay healthy\n{TIPS}", True),
    ],
)
def test_a_heading_that_names_the_topic_is_no_echo(
    question: str, answer: str, is_echo: bool
) -> None:
    assert ("answer-repeats-question" in kinds(question, answer)) == is_echo


QUARREL = "男：对不起，我不能没有你。\n女：你早干什么去了？"


@pytest.mark.parametrize(
    ("question", "answer", "is_refusal"),
    [
        ("写一段情侣吵架的对话。", QUARREL, False),
        ("他们后来怎么样？", QUARREL, False),
        ("写一段小说。", "“对不起，我不能跟你走。”她低声说，然后关上了门。", False),
        ("写一段小说。", "侦探问：“你是谁？”它答：“我是一个机器人，我没有感情。”", False),
        ("她说了什么？", "她低声说：“对不起，我不能跟你一起走。”", False),
        (
            "写一段小说。",
            "雨下了一整夜，冷清的车站里只剩他们两个。对不起，我不能等了，她想。",
            False,
        ),
        (
            "写一段小说。",
            "这是一个有意思的题目，写起来也不难。但是，作为AI语言模型，我无法写。",
            True,
        ),
        ("写一段情侣吵架的对话。", "对不起，我不能写这样的对话。", True),
        ("写一个故事。", "作为一个AI语言模型，我无法写这个故事。", True),
        ("她说了什么？", "“对不起，我不能回答这个问题。”", True),
        ("她说了什么？", "回答：对不起，我不能回答这个问题。\n说明：内容敏感。", True),
        ("她说了什么？", "助手：对不起，我不能回答这个问题。\n用户：为什么？", True),
    ],
)
def test_a_figure_that_refuses_is_no_refusal(question: str, answer: str, is_refusal: bool) -> None:
    assert ("refusal" in kinds(question, answer)) == is_refusal


HELLO = '#include <stdio.h>\nint main() { printf("hello\\n"); return 0; }'


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("写出C语言的helloworld", HELLO),
        ("打印一句问候，要能直接运行。", HELLO),
        ("打印一句问候，要能直接运行。", 'fn hi() {\n    print("hi\\n and hello to you all");\n}'),
        ("打印一句问候，要能直接运行。", '#!/bin/sh\necho "hello to all of you\\n"'),
        ("C语言里换一行怎么写？", "用 \\n 换行。"),
    ],
)
def test_code_without_a_fence_is_code(question: str, answer: str) -> None:
    assert kinds(question, answer) == set()


def test_a_text_with_a_brace_or_a_semicolon_is_no_code() -> None:
    assert kinds("有哪些景点？", "断桥；苏堤；\\n雷峰塔（新塔）；西湖。") == {"literal-escape"}
    assert kinds("有哪些景点？", "断桥{新}，苏堤;\\n雷峰塔。") == {"literal-escape"}
