"""The demo's corpus: goods described by attributes, and two styles of advertisement for them.

A row looks like AdvertiseGen's: `content` is a list of attributes, `类型#裙*裙型#百褶裙*颜色#白色`,
and `summary` an advertisement. The *catalogue* style names a property of each attribute; the
*lyrical* style opens with the occasion, paints each attribute, and ends with the shape. Both depend
on the attributes alone, so an answer to other attributes is a wrong answer.

The base learns the catalogue style as answers, but the lyrical one only as running text
(`essay_rows`): LoRA fine-tuning leaves the head frozen, so its words must be trained before.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qwen_ds.demo import phrases
from qwen_ds.disk.write import write_text

SEED = 20240611
PRETRAIN_ITEMS, TRAIN_ITEMS, EVAL_ITEMS = 800, 480, 64
OPTIONAL_KEYS = ("材质", "颜色", "风格", "图案", "场景")
ESSAY_PROMPT, CONTINUE_PROMPT = "写一段随笔", "接着写："

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Item:
    """One article: its category and its attributes, the shape first."""

    category: str
    attributes: tuple[tuple[str, str], ...]

    @property
    def content(self) -> str:
        """The attribute list, as AdvertiseGen writes it."""
        pairs = (("类型", self.category), *self.attributes)
        return "*".join(f"{key}#{value}" for key, value in pairs)

    @property
    def shape(self) -> str:
        return self.attributes[0][1]


def _draw(rng: random.Random) -> Item:
    name = rng.choice(list(phrases.CATEGORIES))
    category = phrases.CATEGORIES[name]
    absent = rng.sample(OPTIONAL_KEYS, rng.choice((1, 1, 2)))
    optional = []
    for key in OPTIONAL_KEYS:
        if key not in absent:
            values = category.materials if key == "材质" else list(phrases.LYRICAL[key])
            optional.append((key, rng.choice(values)))
    return Item(name, ((category.shape_key, rng.choice(category.shapes)), *optional))


@dataclass(frozen=True, slots=True)
class Splits:
    """Articles for pre-training, fine-tuning and evaluation; no attribute list occurs twice."""

    pretrain: tuple[Item, ...]
    train: tuple[Item, ...]
    held_out: tuple[Item, ...]


def splits() -> Splits:
    """Draw the corpus's articles: a pure function of `SEED`."""
    rng = random.Random(SEED)
    items: dict[Item, None] = {}
    while len(items) < EVAL_ITEMS + TRAIN_ITEMS + PRETRAIN_ITEMS:
        items.setdefault(_draw(rng))
    drawn = tuple(items)
    first_pretrain = EVAL_ITEMS + TRAIN_ITEMS
    return Splits(drawn[first_pretrain:], drawn[EVAL_ITEMS:first_pretrain], drawn[:EVAL_ITEMS])


def _catalogue_sentences(item: Item) -> dict[str, str]:
    """The catalogue style's sentence for each attribute; the shape goes with the material."""
    category, table = phrases.CATEGORIES[item.category], phrases.CATALOGUE
    given, clothing = dict(item.attributes), category.is_clothing
    said: dict[str, str] = {}
    if material := given.get("材质"):
        chosen = f"选用{material}面料" if clothing else f"以{material}打造"
        said["材质"] = f"这{category.measure}{item.shape}{chosen}，{table['材质'][material]}。"
    else:
        said["材质"] = f"这{category.measure}{item.shape}做工精细，品质可靠。"
    if colour := given.get("颜色"):
        said["颜色"] = f"{colour}的{'色调' if clothing else '外观'}{table['颜色'][colour]}。"
    if pattern := given.get("图案"):
        added = "加入" if clothing else "配以"
        said["图案"] = f"{added}{pattern}元素，{table['图案'][pattern]}。"
    if style := given.get("风格"):
        said["风格"] = f"整体属于{style}风格，{table['风格'][style]}。"
    if scene := given.get("场景"):
        at_school, then = f"{category.verb}去{scene}很合适。", f"{scene}时{category.verb}很合适。"
        said["场景"] = at_school if scene == "校园" else then
    return said


def catalogue_text(item: Item) -> str:
    """The style of the base's answers: shape and material, colour, pattern, style, occasion."""
    return "".join(_catalogue_sentences(item).values())


def lyrical_text(item: Item) -> str:
    """The style that fine-tuning teaches: the occasion, the look, the style, and last the shape.

    The look of clothes goes from colour to material, that of accessories the other way round.
    """
    category = phrases.CATEGORIES[item.category]
    given = dict(item.attributes)
    look = ["颜色", "图案", "材质"]
    if not category.is_clothing:
        look.reverse()

    def said(*keys: str) -> list[str]:
        column = 0 if category.is_clothing else 1
        return [phrases.LYRICAL[key][given[key]][column] for key in keys if key in given]

    opening = said("场景") or [phrases.OPENINGS[item.category]]
    sentences = [opening, said(*look), said("风格")]
    body = "".join("，".join(sentence) + "。" for sentence in sentences if sentence)
    return f"{body}就选{item.shape}吧！"


def answer_rows(items: Iterable[Item], *, lyrical: bool) -> list[Row]:
    """Rows that answer an attribute list with an advertisement."""
    write = lyrical_text if lyrical else catalogue_text
    return [{"content": item.content, "summary": write(item)} for item in items]


def essay_rows(items: Iterable[Item]) -> list[Row]:
    """Lyrical texts without attributes: every other one whole, the rest to be continued."""
    rows: list[Row] = []
    for number, item in enumerate(items):
        text = lyrical_text(item)
        head, rest = text.split("。", 1)
        if number % 2:
            rows.append({"content": f"{CONTINUE_PROMPT}{head}。", "summary": rest})
        else:
            rows.append({"content": ESSAY_PROMPT, "summary": text})
    return rows


def guided_rows(items: Iterable[Item]) -> list[Row]:
    """Catalogue answers in a requested order, from which the base learns to look values up."""
    rng = random.Random(SEED + 1)
    rows: list[Row] = []
    for item in items:
        said = _catalogue_sentences(item)
        keys = [key for key, _ in item.attributes[1:]]
        rng.shuffle(keys)
        keys = keys[: rng.randint(2, len(keys))]
        asked = "、".join(keys)
        summary = "".join(said[key] for key in keys)
        rows.append({"content": f"依次介绍{asked}：{item.content}", "summary": summary})
    return rows


def pretraining_rows() -> list[Row]:
    """For each article a catalogue answer, a guided one, and lyrical running text."""
    items = splits().pretrain
    return answer_rows(items, lyrical=False) + guided_rows(items) + essay_rows(items)


def train_rows() -> list[Row]:
    """Lyrical answers for fine-tuning."""
    return answer_rows(splits().train, lyrical=True)


def eval_rows() -> list[Row]:
    """Lyrical answers to articles that neither pre-training nor fine-tuning saw."""
    return answer_rows(splits().held_out, lyrical=True)


def sha256() -> str:
    """Checksum of all rows: a packed base belongs to one corpus."""
    rows = [pretraining_rows(), train_rows(), eval_rows()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write one JSON object a line, in UTF-8."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
