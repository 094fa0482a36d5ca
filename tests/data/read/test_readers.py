"""readers*.py: the rules of reading, one by one; whole samples are in test_formats.py."""

from __future__ import annotations

from itertools import cycle

import pytest

from qwen_ds.data.read.dialogue import Dialogue, Dropped, RowError, as_conversation, as_prompt
from qwen_ds.data.read.readers import READERS, TABLE, find_reader, reader_named
from qwen_ds.data.read.readers_tree import NO_PARENT, MessageTrees
from qwen_ds.errors import UserError


def shown(result: object) -> dict[str, object]:
    """A result in the words of the expected files."""
    if isinstance(result, Dropped):
        return {"dropped": result.reason}
    return {"system": result.system, "turns": [[turn.role, turn.text] for turn in result.turns]}  # type: ignore


def read(row: dict[str, object]) -> list[dict[str, object]]:
    return [
        shown(outcome if isinstance(outcome, Dropped) else as_conversation(outcome))
        for outcome in find_reader(row).read(row)
    ]


def conversation(*texts: str, system: str | None = None) -> list[dict[str, object]]:
    turns = [[role, text] for role, text in zip(cycle(("user", "assistant")), texts)]
    return [{"system": system, "turns": turns}]


def dropped(reason: str) -> list[dict[str, object]]:
    return [{"dropped": reason}]


def messages(*turns: tuple[str, object]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def said(*contents: object) -> dict[str, object]:
    """Messages of the user and the assistant in turn."""
    return messages(*zip(cycle(("user", "assistant")), contents))


def alpaca(
    instruction: str, extra: str | None = None, output: str | None = "a", **more: object
) -> dict[str, object]:
    return {"instruction": instruction, "input": extra, "output": output, **more}


FAULTS: dict[str, list[tuple[object, str]]] = {
    "unknown keys": [
        ({"instuction": "q", "output": "a"}, "found: instuction, .*instruction [+] output .alpaca"),
        ({"content": "q"}, "found: content; keys expected: content [+] summary .adgen"),
        ({}, "keys found: none; keys expected: messages"),
    ],
    "wrong type": [
        (["q", "a"], "the row is a list; expected an object"),
        ({"instruction": 5, "output": "a"}, "instruction is a number; expected text"),
        ({"instruction": "q", "output": ["a"]}, "output is a list; expected text"),
        (alpaca("q", history=[["q"]]), r"history\[0\] is not a pair"),
        (alpaca("q", system={}), "system is an object; expected text"),
        (messages(("user", 5)), r"messages\[0\].content is a number"),
        ({"messages": ["hello"]}, r"messages\[0\] is text; expected an object"),
        ({"messages": "hello"}, "messages is 'hello'; expected a list, or the JSON of one"),
        ({"question": "q", "chatgpt_answers": [1]}, "chatgpt_answers holds a number"),
        ({"round_0": "x"}, "round_0 is text; expected an object"),
        (alpaca("q", output=float("nan")), "output is NaN; expected text"),  # type: ignore[arg-type]
        ({**said("q", "a"), "loss_mask": [1]}, "loss_mask has 1 entries; expected 2"),
        ({**said("q", "a"), "loss_mask": [1, 2]}, r"loss_mask\[1\] is 2; expected 0 or 1"),
        ({**said("q", "a"), "mask": "gpt"}, "mask is 'gpt'; expected a role that asks"),
    ],
    "unknown role": [
        (messages(("bot", "x")), "role is 'bot'; expected one of system, user"),
        (messages(("human", "x")), "role is 'human'"),
        ({"conversations": [{"from": "alien"}]}, "from is 'alien'; expected one of system"),
    ],
    "missing key": [
        (
            {"messages": [{"role": "user", "text": "x"}]},
            r"messages\[0\] has the keys role, text; .*content",
        ),
        ({"conversation": [{"question": "x"}]}, "keys question; expected role and content"),
        (said([{"type": "text", "value": "x"}], "a"), "a part has `value`; expected `text`"),
        ({"chat": {"first": {}}}, "chat has the keys first; expected turn_1"),
    ],
}
ORDER = """
    messages conversations conversation chat message_tree_id message_id plain_text dialogue
    textbox_question trans_instruction instruction
""".split()


def test_keys_are_looked_for_in_the_documented_order() -> None:
    seen = [reader.keys[0] for reader in TABLE if reader.keys]
    assert [key for key in seen if key in ORDER][: len(ORDER)] == ORDER


def test_a_column_that_is_null_is_no_sign_of_a_shape() -> None:
    row = {"messages": None, "conversations": None, "instruction": "q", "output": "a"}
    assert find_reader(row).name == "alpaca"
    assert find_reader({"messages": None, "id": 1}).name == "messages"
    assert find_reader({"messages": None, "conversations": None}).name == "messages"
    assert find_reader({"messages": None, "conversations": []}).name == "sharegpt"


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [(row, reason, detail) for reason, cases in FAULTS.items() for row, detail in cases],
)
def test_a_row_that_cannot_be_read_says_what_came_and_what_was_expected(
    row: object, reason: str, detail: str
) -> None:
    with pytest.raises(RowError, match=detail) as error:
        find_reader(row).read(row)  # type: ignore[arg-type]
    assert error.value.reason == reason


def test_an_unknown_format_names_the_formats_and_the_nearest() -> None:
    message = "'alpacca'; expected auto or one of messages, .*did you mean alpaca"
    with pytest.raises(UserError, match=message):
        reader_named("alpacca")
    assert {"adgen", "alpaca", "sharegpt", "messages"} <= set(READERS)


ROLES = [("user", "gpt"), ("human", "assistant"), ("Human", "MOSS"), ("prompter", "bot")]


@pytest.mark.parametrize(("user", "assistant"), ROLES)
def test_sharegpt_has_many_names_for_two_roles(user: str, assistant: str) -> None:
    row = {"conversations": [{"from": user, "value": " q "}, {"from": assistant, "value": " a "}]}
    assert read(row) == conversation("q", " a ")


@pytest.mark.parametrize("key", ["messages", "conversations", "conversation"])
def test_the_kind_of_turn_does_not_depend_on_the_name_of_the_list(key: str) -> None:
    openai = said("q", "a")["messages"]
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    nulls = dict.fromkeys(("role", "content", "human", "assistant"))
    through_arrow = [{**nulls, **turn} for turn in sharegpt]
    for turns in (openai, sharegpt, through_arrow, [{"human": "q", "assistant": "a"}]):
        assert read({key: turns}) == conversation("q", "a")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (messages(), dropped("no turns")),
        (messages(("system", "s")), dropped("no turns")),
        (said(" "), dropped("no question")),
        (said("q", None), dropped("no answer")),
        (messages(("assistant", "a")), dropped("roles do not alternate")),
        (
            messages(("user", "q"), ("system", "s"), ("assistant", "a")),
            dropped("roles do not alternate"),
        ),
        (messages(("user", "q"), *[("assistant", "a")] * 2), dropped("roles do not alternate")),
        (messages(("user", "q"), ("tool", "t"), ("assistant", "a")), dropped("tool turns")),
        (said([{"type": "image_url"}], "a"), dropped("content is not text")),
        (said("q", "a", "r"), conversation("q", "a")),
        (said("q", "a", "r", " "), conversation("q", "a")),
        # The conversation ends at the first pair with an empty side.
        (said("q", "", "r", "b"), dropped("no answer")),
        (
            messages(("system", " s\n"), ("user", "\u3000q\n"), ("assistant", "\n\na ")),
            conversation("q", "\n\na ", system="s"),
        ),
        (messages(("system", ""), ("user", "q"), ("assistant", "a")), conversation("q", "a")),
        (said([{"type": "text", "text": text} for text in "qr"], "a"), conversation("qr", "a")),
        ({**said("q", "a"), "system": "column"}, conversation("q", "a", system="column")),
    ],
)
def test_turns_that_are_incomplete_or_not_in_order(
    row: dict[str, object], expected: object
) -> None:
    assert read(row) == expected


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": None}, "messages is null"),
        (said("q", ""), "turn 2 has no text"),
        (said("q"), "turn 1, a question, is the last; expected turn 2 after it"),
        (said(" ", "a"), "turn 1 has no text"),
        (messages(("system", "s")), "turn 1, the system's, is the last; expected turn 2 after it"),
        (messages(("system", "s"), ("user", "q"), ("assistant", "")), "turn 3 has no text"),
        (said("q", "", "r", "b"), "turn 2 has no text"),
        (messages(("assistant", "a")), "turn 1 is the assistant's; expected the user's"),
        (
            messages(("system", "s"), ("user", "q"), ("user", "q")),
            "turn 3 is the user's; expected the assistant's",
        ),
        (messages(("user", "q"), ("tool", "t")), "turn 2 calls a tool, or is its answer"),
        (
            said([{"type": "image_url"}], "a"),
            "messages[0].content has a part of the type 'image_url'",
        ),
    ],
)
def test_turns_that_give_nothing_say_which_of_them(row: dict[str, object], detail: str) -> None:
    (found,) = find_reader(row).read(row)
    found = found if isinstance(found, Dropped) else as_conversation(found)
    assert isinstance(found, Dropped) and found.detail == detail


def learnt(row: dict[str, object]) -> list[bool]:
    (found,) = find_reader(row).read(row)
    conversation = as_conversation(found)  # type: ignore[arg-type]
    return [turn.learnt for turn in conversation.turns]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"training": False},
     {"loss_scale": 0}],
)  # fmt: skip
def test_a_turn_may_be_marked_as_not_to_be_learnt(mark: dict[str, object]) -> None:
    row = said("q", "a", "r", "b")
    row["messages"][1].update(mark)  # type: ignore[index]
    assert learnt(row) == [True, False, True, True]
    nulls = [{**dict.fromkeys(mark), **turn} for turn in said("q", "a")["messages"]]  # type: ignore[attr-defined]
    assert learnt({"conversations": nulls}) == [True, True]


def test_a_mask_of_the_row_counts_every_turn_of_it() -> None:
    system = {"role": "system", "content": "s"}
    turns = [system, *said("q", "a", "r", "b")["messages"]]  # type: ignore[misc]
    assert learnt({"messages": turns, "loss_mask": [0, 0, 0, 0, 1]}) == [False, False, False, True]
    pairs = [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}]
    for mask in ([0, 1], [False, False, True, True]):
        assert learnt({"conversation": pairs, "loss_mask": mask}) == [False, False, True, True]


def test_a_call_of_a_tool_is_a_tool_turn_even_when_it_says_something() -> None:
    row = said("q", "a")
    row["messages"][1]["tool_calls"] = [{"id": "c"}]  # type: ignore[index]
    assert read(row) == dropped("tool turns")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (alpaca(" q\n", "\nx "), conversation("q\n\t\nx", "a")),
        (alpaca("q ", ""), conversation("q", "a")),
        (alpaca("", "x"), conversation("x", "a")),
        (alpaca("q", " \n"), conversation("q", "a")),
        (alpaca("q", output="\n a \n"), conversation("q", "\n a \n")),
        (alpaca("q", history=[[" h\n", " i"]]), conversation("h", " i", "q", "a")),
        (alpaca("q", history=[["h", None]]), dropped("no answer")),
        (alpaca("q", output=None, history=[["h", "i"]]), conversation("h", "i")),
        (alpaca("q", system=" "), conversation("q", "a")),
        ({"instruction": "q"}, dropped("no answer")),
    ],
)
def test_alpaca_columns(row: dict[str, object], expected: object) -> None:
    assert read(row) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # A dialogue, and what only looks like one.
        (alpaca("Human: q\nAssistant: b\nHuman: r\nAssistant:"), conversation("q", "b", "r", "a")),
        (alpaca("Human：q\nAssistant："), conversation("q", "a")),
        (alpaca("续写：\nHuman: q\nAssistant:"), conversation("续写：\nHuman: q\nAssistant:", "a")),
        (alpaca("Human: q", "输入"), conversation("Human: q\t输入", "a")),
        (
            alpaca("翻译", "User: hi\nAssistant: hello"),
            conversation("翻译\tUser: hi\nAssistant: hello", "a"),
        ),
        (alpaca("System: q"), conversation("System: q", "a")),
        (alpaca("Assistant: q", "User: r"), conversation("Assistant: q\tUser: r", "a")),
        (
            alpaca("User:q\nAssistant:b", "System:s\nt\nUser:r"),
            conversation("q", "b", "r", "a", system="s\nt"),
        ),
        (
            alpaca("User:q\nAsssistent：b\nUser:c\nAssistenz:d", "User:r"),
            conversation("q", "b", "c", "d", "r", "a"),
        ),
        (alpaca("User:q, User:r", "User:s"), dropped("history is not question and answer pairs")),
        (alpaca("User:q\nAssistant:b"), dropped("history is not question and answer pairs")),
        (alpaca("User:q\nAssistant:b", "User:r", None), conversation("q", "b")),
        (alpaca("User:q\nAssistant:", "User:r"), dropped("no answer")),
    ],
)
def test_marks_of_belle_and_guanaco_count_only_where_a_line_begins(
    row: dict[str, object], expected: object
) -> None:
    assert read(row) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("preface <user> q <assistant> a\nUser: b", conversation("q", "a\nUser: b")),
        ("<assistant>a<user>q", dropped("roles do not alternate")),
        ("<user>q<user>r<assistant>a", dropped("roles do not alternate")),
        ("<user>q<assistant>", dropped("no answer")),
        ("no marks", dropped("no turns")),
        ("preface\nHuman: q\nAssistant: a", conversation("q", "a")),
        ("\n Human: q, Human: x\nAssistant: a", conversation("q, Human: x", "a")),
    ],
)
def test_refgpt_is_cut_at_its_marks_anywhere(text: str, expected: object) -> None:
    assert read({"dialogue": text}) == expected


def test_the_first_sharegpt_cn_is_cut_at_its_own_marks() -> None:
    row: dict[str, object] = {"key": "1", "translation": "<|user|>: q\n<|bot|>：a\n<|user|>: r"}
    assert read(row) == conversation("q", "a")


def test_moss_002_is_cut_only_behind_closing_marks() -> None:
    text = "[Human]: q [MOSS]: x<eoh> [MOSS]: a [Human]: y<eoa> [Human]: r<eoh>"
    assert read({"prefix": " ", "plain_text": text}) == conversation("q [MOSS]: x", "a [Human]: y")
    assert read({"prefix": "s", "plain_text": "[MOSS]: a<eoa>"}) == dropped("no turns")


def moss_003(answer: str, commands: str = "None") -> dict[str, object]:
    turn = {"Human": "<|Human|>: q<eoh>\n", "Commands": f"<|Commands|>: {commands}<eoc>\n"}
    return {"chat": {"turn_1": {**turn, "MOSS": f"<|MOSS|>: {answer}<eom>\n"}}}


def test_citations_of_moss_003_are_removed_and_exponents_stay() -> None:
    cited = moss_003("x<sup>2</sup> 是<sup><|1|>, <|2|></sup>对的<|3|><eor>")
    assert read(cited) == conversation("q", "x<sup>2</sup> 是对的")
    assert read(moss_003("雨<sup>1</sup>。", "Search(x)")) == conversation("q", "雨。")
    assert read({"chat": {}}) == read({"chat": None}) == dropped("no turns")
    assert read({"chat": said("q", "a")["messages"]}) == conversation("q", "a")


def test_coig_exam_takes_the_analysis_only_when_it_is_text() -> None:
    row: dict[str, object] = {"textbox_q_instruction": "i", "textbox_question": " q "}
    row["textbox_answer"] = "A"
    for analysis in (None, "", " ", ["x"], {}):
        assert read({**row, "textbox_answer_analysis": analysis}) == conversation("i\tq", "A")
    assert read({**row, "textbox_q_context": " c\n"}) == conversation("i\tc\nq", "A")
    assert read({**row, "textbox_question": ""}) == dropped("no question")


def test_coig_rounds_are_sorted_by_number_and_one_fault_drops_the_chat() -> None:
    def rounds(**responses: object) -> dict[str, object]:
        return {key: {"response": response} for key, response in responses.items()}

    good = rounds(round_10='{"Q": " r\\n", "A": "b"}', round_9='{"Q": "q", "A": "a"}')
    assert read(good) == conversation("q", "a", "r", "b")
    # Arrow files hold missing rounds as null.
    assert read({**good, "round_2": None}) == conversation("q", "a", "r", "b")
    assert read({**good, **rounds(round_11='{"Q": "r"')}) == dropped("response is not valid JSON")
    assert read({**good, **rounds(round_11='{"Q": "r"}')}) == dropped("Q or A is not text")
    assert read({**good, **rounds(round_11="[]")}) == dropped("Q or A is not text")


def test_of_several_answer_columns_the_first_in_the_table_counts() -> None:
    row = {"prompt": "q", "output": "later", "response": "a"}
    assert read(row) == conversation("q", "a")


def test_math23k_needs_equation_and_value() -> None:
    row = {"original_text": "q", "segmented_text": "s", "equation": "x=1", "ans": ""}
    assert read(row) == dropped("no answer")
    assert read({**row, "original_text": " q\n", "ans": "1"}) == conversation("q", "x=1\n1")


def node(
    role: str, text: str, *replies: dict[str, object], deleted: bool = False
) -> dict[str, object]:
    return {"role": role, "text": text, "deleted": deleted, "replies": list(replies)}


def tree(root: dict[str, object], state: str | None = "ready_for_export") -> dict[str, object]:
    return {"message_tree_id": "m", "tree_state": state, "prompt": root}


def test_a_tree_gives_a_conversation_for_every_answer_that_nobody_follows() -> None:
    ask, say = "prompter", "assistant"
    first = node(say, "a", node(ask, "x"), node(ask, "y"))
    second = node(say, "b", node(ask, "gone", node(say, "lost"), deleted=True))
    third = node(say, "c", node(ask, "q2", node(say, "d")), node(ask, "z"))
    expected = conversation("q", "a") + conversation("q", "b") + conversation("q", "c", "q2", "d")
    assert read(tree(node(ask, "q", first, second, third))) == expected


def test_trees_that_give_nothing() -> None:
    assert read(tree(node("prompter", "q"))) == dropped("no answer")
    assert read(tree(node("prompter", "q", deleted=True))) == dropped("no question")
    assert read(tree(node("prompter", "q"), "growing")) == dropped("tree is not ready for export")
    wrong = tree(node("assistant", "q", node("assistant", "a")))
    assert read(wrong) == dropped("roles do not alternate")
    assert read(tree(node("prompter", "q", node("assistant", "a")), None)) == conversation("q", "a")


def test_single_messages_find_their_tree_in_any_order() -> None:
    def message(key: str, parent: str | None, role: str) -> dict[str, object]:
        row = {"message_id": key, "parent_id": parent, "role": role, "text": key}
        return {**row, "tree_state": "ready_for_export"}

    trees = MessageTrees()
    rows = [message("a1", "q1", "assistant")]
    rows += [message("q2", None, "prompter"), message("q1", None, "prompter")]
    rows += [message("a2", "q2", "assistant"), message("stray", "nowhere", "assistant")]
    for place, row in enumerate(rows):
        trees.add(row, f"f:{place}")
    assert list(trees.outcomes()) == [
        (Dialogue(None, (("q2", "a2"),)), "f:3"),
        (Dialogue(None, (("q1", "a1"),)), "f:0"),
        (Dropped(NO_PARENT), "f:4"),
    ]


@pytest.mark.parametrize(
    ("pairs", "turns", "reference"),
    [
        ([("q", "")], ["q"], None),
        ([("q", "a")], ["q"], "a"),
        ([("q", "a"), ("r", "b")], ["q", "a", "r"], "b"),
        ([("q", "a"), ("r", " ")], ["q", "a", "r"], None),
        ([("q", ""), ("r", "b")], ["q"], None),
        ([("q", "a"), ("", "b")], ["q"], "a"),
    ],
)
def test_a_prompt_ends_with_the_last_question(
    pairs: list[tuple[str, str]], turns: list[str], reference: str
) -> None:
    prompt, found = as_prompt(Dialogue(None, tuple(pairs)), "s")
    assert shown(prompt) == conversation(*turns, system="s")[0]
    assert found == reference


def test_a_prompt_needs_a_question() -> None:
    assert as_prompt(Dialogue(None, (("", "a"),))) == (Dropped("no question"), None)
    assert as_prompt(Dialogue(None, ())) == (Dropped("no turns"), None)
