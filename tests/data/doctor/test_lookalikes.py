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


@pytest.mark.parametrize(
    ("answer", "is_phone"),
    [
        ("Her number is (212) 736-5080 until five.", True),
        ("请联系汉斯，电话+49 30 2345678。", True),
        ("Text Priya at +91 98200 12345 tonight.", True),
        ("Ring +442079460958, please.", True),
        ("Toll-free numbers look like +1 (800) 438-0199.", False),
        ("They are (888) 438-0199, +1-800-438-0199 or +18004380199.", False),
        ("In films it is (415) 555-0132, or +1 415 555 0132.", False),
        ("It lies at +39.904200, +116.407400.", False),
        ("+1,234,567 + 890 = 1,235,457", False),
        ("It began at 2024-05-01T08:00:00+08:00.", False),
    ],
)
def test_a_number_of_another_country_is_a_phone_number(answer: str, is_phone: bool) -> None:
    assert ("phone" in kinds("What is it?", answer)) == is_phone


LIST = "\n".join(f"{at}. 泰山" for at in range(1, 10))
NOPS = "\n".join(["    mov eax, ebx"] * 6)


@pytest.mark.parametrize(
    ("answer", "is_loop"),
    [
        (LIST, True),
        (LIST.replace("泰山", "A"), False),
        (LIST.replace("5. 泰山", "5. 华山"), False),
        (f"```\n{NOPS}\n```", False),
        (NOPS, True),
        (f"```\n{NOPS}\n{NOPS}\n```", True),
    ],
)
def test_equal_items_are_a_loop_and_equal_lines_of_code_are_none(
    answer: str, is_loop: bool
) -> None:
    assert ("loop" in kinds("请列出一些。", answer)) == is_loop


@pytest.mark.parametrize(
    ("answer", "is_open"),
    [
        ('[{"city": "上海"}, {"city": "北京"', True),
        ('{"name": "{", "tags": ["a", "b"]', True),
        ('{"text": "only a { in a string"}', False),
        ('{"a": 1, // a remark\n "b": [1, 2]}', False),
        ("[1, 2", False),
    ],
)
def test_json_that_stops_before_its_last_bracket_is_unclosed(answer: str, is_open: bool) -> None:
    assert ("unclosed-bracket" in kinds("返回JSON。", answer)) == is_open


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("<br> 和 <p> 有什么不同？", "<br> 只换行，<p> 是一段。", None),
        ("What is <span>?", "<span> holds a part of a line.", None),
        ("怎么煮面？", "水开下面。<br>两分钟捞出。", "html-leftover"),
        ("When is quopri called?", "It adds soft line breaks ('\\n') to a line.", None),
        ("列出两种水果。", "苹果\\n香蕉", "literal-escape"),
        ("锟斤拷是怎么来的？", "它由编码错误而来。", None),
        ("“ü”什么时候省去两点？", "与 j、q、x 相拼时。", None),
        ("这家店叫什么？", "叫“cafÃ©”，在街角。", "mojibake-latin1"),
        ("几点开门？", "早上锟斤拷点开门。", "kun-kao"),
        ("Write a haiku in Japanese.", "古池や\n蛙飛びこむ\n水の音", None),
        ("Please write a haiku.", "ふるいけや\nかわずとびこむ\nみずのおと", "language-mismatch"),
        ("Explain it.", "La force attire les corps, et elle dépend de la masse qui est là.",
         "language-mismatch"),
        ("Name dishes of Spain.", "Arroz con leche, pulpo a la gallega, tarta de queso, el pan",
         None),
        ("What is in a Message-ID?", "Say <142480216486.20800.1652638@host.mastaler.com>.", None),
        ("大家好怎么说？", "大家好，我叫[姓名]。", "placeholder"),
    ],
)  # fmt: skip
def test_what_a_row_speaks_of_is_no_leftover(question: str, answer: str, kind: str | None) -> None:
    found = kinds(question, answer)
    assert kind in found if kind else not found


@pytest.mark.parametrize("many", ("十几", "几十", "好几"))
def test_a_vague_number_asks_nothing(many: str) -> None:
    statement = f"熊猫住在四川和陕西的山里，以竹子为食，每天要吃{many}公斤，是中国的国宝。"
    assert kinds(statement, "熊猫住在哪座山里？") == {"swapped-columns"}
