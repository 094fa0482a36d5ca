"""Families of clean rows: each draws a question and an answer from independent parts.

A family is an endless or finite source; `clean.py` takes from it rows that differ truly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random

TEXTS = Path(__file__).parent / "texts"
Pair = tuple[str, str]
Family = Callable[[Random], Iterator[Pair]]


def lines(name: str) -> list[list[str]]:
    """The columns of each line of a text file; a written \\n is a line break."""
    text = (TEXTS / f"{name}.txt").read_text(encoding="utf-8")
    return [line.replace("\\n", "\n").split("|") for line in text.splitlines() if line]


@cache
def parts(name: str) -> dict[str, list[list[str]]]:
    """The lines of a text file by the heading `=NAME` above them."""
    found: dict[str, list[list[str]]] = {}
    for row in lines(name):
        if row[0].startswith("="):
            heading = found.setdefault(row[0][1:], [])
        else:
            heading.append(row)
    return found


def table(name: str, *ways: tuple[list[str], list[str]]) -> Family:
    """Rows of a text file, each in a question and an answer that fits it; {0} is a column."""

    def draw(rng: Random) -> Iterator[Pair]:
        rows = lines(name)
        rng.shuffle(rows)
        for row in rows:
            questions, answers = rng.choice(ways)
            yield rng.choice(questions).format(*row), rng.choice(answers).format(*row)

    return draw


def fashion(rng: Random) -> Iterator[Pair]:
    """Keywords and advertising copy, as in AdvertiseGen."""
    rows = lines("fashion")
    heads = [row for row in rows if row[0] == "类型"]
    kinds_of = {row[0] for row in rows} - {"类型"}
    while True:
        chosen = [rng.choice(heads)]
        worn_below = {"领型", "袖型"} if chosen[0][1] != "上衣" else set[str]()
        kinds = rng.sample(sorted(kinds_of - worn_below), rng.randint(3, 5))
        chosen += [rng.choice([row for row in rows if row[0] == kind]) for kind in kinds]
        copy = chosen[0][2]
        for row in chosen[1:]:
            copy += rng.choice("，。；。") + row[2]
        yield "*".join(f"{row[0]}#{row[1]}" for row in chosen), copy + rng.choice("。！")


def service(rng: Random) -> Iterator[Pair]:
    """A customer's complaint and a shop's reply, with hotlines that belong to nobody."""
    said = parts("service")
    while True:
        problem, thing = rng.choice(said["problem"])
        days = rng.randint(2, 29)
        start = rng.choice(
            ["你好，", "", f"{days}天前下的单，", "在吗？", f"订单付了{rng.randint(39, 2999)}元，"]
        )
        question = f"{start}{problem}，{rng.choice(said['ask'])[0]}"
        hello = rng.choice(["亲，您好！", "您好，", "非常抱歉让您遇到这个问题。", "收到，"])
        first, second = rng.sample(said["promise"], 2)
        answer = (
            f"{hello}关于{thing}的问题，{first[0]}。{second[0]}。{rng.choice(said['closing'])[0]}"
        )
        yield question, answer


def letters(rng: Random) -> Iterator[Pair]:
    """Notes between people whose names could be anyone's."""
    rows = lines("letters")
    rng.shuffle(rows)
    for to, sender, reason, want in rows:
        tone = rng.choice(["短信", "邮件", "便条", "信"])
        question = rng.choice(
            [
                f"我是{sender}，帮我写一封给{to}的{tone}，因为{reason}。",
                f"写{tone}，收信人：{to}；理由：{reason}",
                f"替{sender}给{to}起草{tone}，语气诚恳。情况：{reason}。",
            ]
        )
        opening = rng.choice(["您好！", "打扰了。", "近来一切可好？", "见信好。"])
        end = rng.choice(["此致\n敬礼", "祝一切顺利。", "顺颂时祺", "谢谢！"])
        yield question, f"{to}：\n{opening}{reason}，{want}。\n{end}\n{sender}"


def mails(rng: Random) -> Iterator[Pair]:
    """Letters in English, some of which are sorry."""
    said = parts("mails_en")
    topics = list(said["topic"])
    rng.shuffle(topics)
    for topic, reason in topics:
        way, ask, end = (rng.choice(said[key])[0] for key in ("length", "ask", "end"))
        head = rng.choice(["Dear all,", "Hello,", "Dear Ms Okafor,", "Hi Ben,", "Good morning,"])
        question = rng.choice(["Write an e-mail to {}, {}.", "Draft a letter to {}, {}."])
        yield question.format(topic, way), f"{head}\n{reason}. {ask}\n{end}"


def people(rng: Random) -> Iterator[Pair]:
    """Facts of invented persons, taken out of a sentence as JSON, a list or a table."""
    said = parts("people")
    while True:
        fact: dict[str, str | int] = {
            key: rng.choice(said[key])[0] for key in ("name", "city", "job", "hobby")
        }
        fact["age"] = rng.randint(19, 68)
        text = rng.choice(said["frame"])[0].format(**fact)
        named = dict(zip(("姓名", "城市", "职业", "爱好", "年龄"), fact.values(), strict=True))
        kept = {key: named[key] for key in rng.sample(sorted(named), rng.randint(3, 5))}
        way = rng.randrange(3)
        ask = ["用JSON输出下文中的", "列出文中的", "做成Markdown表格："][way] + "、".join(kept)
        if way == 0:
            answer = json.dumps(kept, ensure_ascii=False, indent=rng.choice([None, 2]))
        elif way == 1:
            answer = "\n".join(f"- {key}：{value}" for key, value in kept.items())
        else:
            cells = " | ".join(str(value) for value in kept.values())
            answer = f"| {' | '.join(kept)} |\n|{'---|' * len(kept)}\n| {cells} |"
        yield f"{ask}\n{text}", answer


def reviews(rng: Random) -> Iterator[Pair]:
    """The mood of a review: short labels that many rows share."""
    rows = lines("reviews")
    rng.shuffle(rows)
    for mark, text in rows:
        good = mark == "+"
        if text.isascii():
            yield (
                rng.choice(["Positive or negative? {}", "Classify the sentiment: {}"]).format(text),
                "Positive" if good else "Negative",
            )
        else:
            question = rng.choice(["判断情感（正面/负面）：{}", "这条评论是好评还是差评？“{}”"])
            labels = ("正面", "负面") if question.startswith("判断") else ("好评", "差评")
            yield question.format(text), labels[0 if good else 1]


def dialogue(rng: Random) -> Iterator[Pair]:
    """Short scenes between two people."""
    said = parts("dialogue")
    while True:
        place, host, guest = rng.choice(said["place"])
        turns = rng.sample(said["middle"], 2)
        topics = "和".join(topic for *_, topic in turns)
        turns = [turn[:2] for turn in [*turns, rng.choice(said["close"])]]
        text = f"{host}：{rng.choice(said['open'])[0]}\n"
        text += "\n".join(f"{guest}：{ask}\n{host}：{answer}" for ask, answer in turns)
        question = rng.choice(
            ["写一段发生在{0}的对话，聊到{3}。", "{0}，{1}和{2}聊起{3}，请写成对话。"]
        )
        yield question.format(place, host, guest, topics), text


def translations(rng: Random) -> Iterator[Pair]:
    """Chinese and English sentences, each in one direction."""
    rows = lines("pairs")
    rng.shuffle(rows)
    for zh, en in rows:
        yield rng.choice(
            [
                (f"把这句话翻译成英文：{zh}", en),
                (f"“{zh}”用英语怎么说？", en),
                (f"Translate into Chinese: {en}", zh),
                (f"英译中：{en}", zh),
                (f"Put this into natural English.\n{zh}", en),
            ]
        )


def how_to(rng: Random) -> Iterator[Pair]:
    """Advice in four points, marked in the ways that people mark points."""
    rows = [(row, True) for row in lines("howto")] + [(row, False) for row in lines("tips_en")]
    rng.shuffle(rows)
    for (title, *points), zh in rows:
        marks = rng.choice([("1. ", "2. ", "3. ", "4. "), ("- ",) * 4, ("* ",) * 4])
        if zh:
            marks = rng.choice(
                [marks, ("1）", "2）", "3）", "4）"), ("一、", "二、", "三、", "四、")]
            )
        end = rng.choice(["。", "；"] if zh else [".", ""])
        text = "\n".join(f"{m}{p}{end}" for m, p in zip(marks, points, strict=True))
        text = text.removesuffix("；") + ("。" if end == "；" else "")
        yield (
            (f"{title}？" if zh else rng.choice(["How can I {}?", "Tips to {}"]).format(title)),
            text,
        )
