"""Readers of rows whose question and answer are columns: alpaca, ADGEN, BELLE, COIG, HC3 and
others. Questions are stripped, answers kept as they are, a leading line break included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from qwen_ds.data.read.dialogue import (
    Dialogue,
    Dropped,
    Outcome,
    Pair,
    Row,
    RowError,
    is_blank,
    json_name,
    list_of,
    object_of,
    text_of,
)
from qwen_ds.data.read.readers_marked import dialogue_in_instruction

_ROUND = re.compile(r"round_(\d+)")


def column_pair(question_key: str, answer_keys: Sequence[str]) -> Callable[[Row], list[Outcome]]:
    """Make a reader of a question column and the first of `answer_keys` that says something."""

    def read(row: Row) -> list[Outcome]:
        pair = (text_of(row, question_key).strip(), _answer(row, answer_keys))
        return [Dialogue(None, (*_history(row), pair))]

    return read


def alpaca(answer_keys: Sequence[str]) -> Callable[[Row], list[Outcome]]:
    """Make a reader of Alpaca's instruction and input, with LLaMA-Factory's history, and the first
    of `answer_keys` that says something.

    A history spelled out in the instruction is also read. A tab joins instruction and input, as in
    the original project.
    """

    def read(row: Row) -> list[Outcome]:
        instruction, extra = text_of(row, "instruction"), text_of(row, "input")
        answer, history = _answer(row, answer_keys), _history(row)
        if not history:
            marked = dialogue_in_instruction(instruction, extra, answer)
            if marked is not None:
                return [marked]
        return [Dialogue(None, (*history, (_tab_joined(instruction, extra), answer)))]

    return read


def read_coig_translated(row: Row) -> list[Outcome]:
    """COIG's translated instructions: the Chinese columns, not the English ones beside them."""
    question = _tab_joined(text_of(row, "trans_instruction"), text_of(row, "trans_input"))
    return [Dialogue(None, ((question, text_of(row, "trans_output")),))]


def read_coig_exam(row: Row) -> list[Outcome]:
    """COIG's exams and value alignment; as in COIG's script the analysis, if any, is the answer."""
    context = text_of(row, "textbox_q_context").strip()
    question = text_of(row, "textbox_question").strip()
    if question and context:
        question = f"{context}\n{question}"
    if question:
        question = _tab_joined(text_of(row, "textbox_q_instruction"), question)
    analysis = row.get("textbox_answer_analysis")
    has_analysis = isinstance(analysis, str) and not is_blank(analysis)
    answer_key = "textbox_answer_analysis" if has_analysis else "textbox_answer"
    return [Dialogue(None, ((question, text_of(row, answer_key)),))]


def read_coig_rounds(row: Row) -> list[Outcome]:
    """COIG's counterfactual chats: round_0, round_1 .. (some missing), each {"Q", "A"} as JSON.

    One fault drops the whole chat: its later rounds answer the earlier ones.
    """
    rounds = sorted((int(found[1]), key) for key in row if (found := _ROUND.fullmatch(key)))
    pairs: list[Pair] = []
    for _, key in rounds:
        if row[key] is None:
            continue
        response = object_of(row[key], key).get("response")
        try:
            said = json.loads(response) if isinstance(response, str) else response
        except (ValueError, RecursionError):
            return [Dropped("response is not valid JSON")]
        match said:
            case {"Q": str(question), "A": str(answer)}:
                pairs.append((question.strip(), answer))
            case _:
                return [Dropped("Q or A is not text")]
    return [Dialogue(None, tuple(pairs))]


def read_hc3(row: Row) -> list[Outcome]:
    """HC3: the first ChatGPT answer that is not blank."""
    answers = list_of(row, "chatgpt_answers")
    for found in answers:
        if not isinstance(found, str | None):
            raise RowError(
                "wrong type", f"chatgpt_answers holds {json_name(found)}; expected a list of texts"
            )
    answer = next((text for text in answers if isinstance(text, str) and not is_blank(text)), "")
    return [Dialogue(None, ((text_of(row, "question").strip(), answer),))]


def read_math23k(row: Row) -> list[Outcome]:
    """math23k: the text before segmentation; the answer is the equation, then its value."""
    equation, value = text_of(row, "equation"), text_of(row, "ans")
    answer = "" if is_blank(equation) or is_blank(value) else f"{equation}\n{value}"
    return [Dialogue(None, ((text_of(row, "original_text").strip(), answer),))]


def _answer(row: Row, keys: Sequence[str]) -> str:
    answer = ""
    for key in keys:
        if key in row:
            answer = text_of(row, key) or answer
            if not is_blank(answer):
                break
    return answer


def _tab_joined(instruction: str, extra: str) -> str:
    """The question of the original project: joined as they are, then stripped. Blanks around the
    tab stay (test_encode's rows of the original data set)."""
    return f"{instruction}\t{extra}".strip()


def _history(row: Row) -> tuple[Pair, ...]:
    """LLaMA-Factory's history column: [[question, answer], ..], or null, "" or absent."""
    if not row.get("history"):
        return ()
    pairs: list[Pair] = []
    for place, value in enumerate(list_of(row, "history")):
        pair = value if isinstance(value, list) else []
        if len(pair) != 2 or not all(isinstance(side, str | None) for side in pair):
            fault = f"history[{place}] is not a pair of texts; expected [question, answer]"
            raise RowError("wrong type", fault)
        pairs.append(((pair[0] or "").strip(), pair[1] or ""))
    return tuple(pairs)
