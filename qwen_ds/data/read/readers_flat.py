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
    system_of,
    text_of,
)
from qwen_ds.data.read.readers_marked import dialogue_in_instruction

_ROUND = re.compile(r"round_(\d+)")


def column_pair(question_key: str, answer_keys: Sequence[str]) -> Callable[[Row], list[Outcome]]:
    """Make a reader of a question column and the first of `answer_keys` that the row has."""

    def read(row: Row) -> list[Outcome]:
        answer = next((text_of(row, key) for key in answer_keys if key in row), "")
        pair = (text_of(row, question_key).strip(), answer)
        return [Dialogue(system_of(row), (*_history(row), pair))]

    return read


def read_alpaca(row: Row) -> list[Outcome]:
    """Alpaca: instruction, input and output, with LLaMA-Factory's system and history.

    A history spelled out in the instruction is also read. A tab joins instruction and input, as in
    the original project.
    """
    instruction, extra, answer = (text_of(row, key) for key in ("instruction", "input", "output"))
    history = _history(row)
    if not history:
        marked = dialogue_in_instruction(instruction, extra, answer, system_of(row))
        if marked is not None:
            return [marked]
    return [Dialogue(system_of(row), (*history, (_tab_joined(instruction, extra), answer)))]


def read_coig_translated(row: Row) -> list[Outcome]:
    """COIG's translated instructions: the Chinese columns, not the English ones beside them."""
    question = _tab_joined(text_of(row, "trans_instruction"), text_of(row, "trans_input"))
    return [Dialogue(system_of(row), ((question, text_of(row, "trans_output")),))]


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
    return [Dialogue(system_of(row), ((question, text_of(row, answer_key)),))]


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
    return [Dialogue(system_of(row), tuple(pairs))]


def read_hc3(row: Row) -> list[Outcome]:
    """HC3: the first ChatGPT answer that is not blank."""
    answers = list_of(row, "chatgpt_answers")
    for found in answers:
        if not isinstance(found, str | None):
            raise RowError(
                "wrong type", f"chatgpt_answers holds {json_name(found)}; expected a list of texts"
            )
    answer = next((text for text in answers if isinstance(text, str) and not is_blank(text)), "")
    return [Dialogue(system_of(row), ((text_of(row, "question").strip(), answer),))]


def read_math23k(row: Row) -> list[Outcome]:
    """math23k: the text before segmentation; the answer is the equation, then its value."""
    equation, value = text_of(row, "equation"), text_of(row, "ans")
    answer = "" if is_blank(equation) or is_blank(value) else f"{equation}\n{value}"
    return [Dialogue(system_of(row), ((text_of(row, "original_text").strip(), answer),))]


def _tab_joined(instruction: str, extra: str) -> str:
    instruction, extra = instruction.strip(), extra.strip()
    return f"{instruction}\t{extra}" if instruction and extra else instruction or extra


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
