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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from qwen_ds.disk.write import write_text

SEED = 20240611
PRETRAIN_ITEMS, TRAIN_ITEMS, EVAL_ITEMS = 800, 480, 64
OPTIONAL_KEYS = ("材质", "颜色", "风格", "图案", "场景")
ESSAY_PROMPT, CONTINUE_PROMPT = "写一段随笔", "接着写："

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Category:
    """A kind of goods; see phrases.yaml."""

    measure: str
    verb: str
    is_clothing: bool
    shape_key: str
    shapes: list[str]
    materials: list[str]


_TABLES = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text(encoding="utf-8"))

CATEGORIES = {name: Category(**fields) for name, fields in _TABLES["categories"].items()}
# Attribute -> its value -> the phrase, or the two phrases.
CATALOGUE: dict[str, dict[str, str]] = _TABLES["catalogue"]
LYRICAL: dict[str, dict[str, list[str]]] = _TABLES["lyrical"]
OPENINGS: dict[str, str] = _TABLES["openings"]


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
    name, category = rng.choice(list(CATEGORIES.items()))
    absent = rng.sample(OPTIONAL_KEYS, rng.choice((1, 1, 2)))
    values = LYRICAL | {"材质": category.materials}
    optional = [(key, rng.choice(list(values[key]))) for key in OPTIONAL_KEYS if key not in absent]
    return Item(name, ((category.shape_key, rng.choice(category.shapes)), *optional))


def splits() -> tuple[list[Item], list[Item], list[Item]]:
    """Articles for pre-training, fine-tuning and evaluation, a pure function of `SEED`.

    No attribute list occurs twice.
    """
    rng = random.Random(SEED)
    items: dict[Item, None] = {}
    while len(items) < EVAL_ITEMS + TRAIN_ITEMS + PRETRAIN_ITEMS:
        items.setdefault(_draw(rng))
    drawn, first_pretrain = list(items), EVAL_ITEMS + TRAIN_ITEMS
    return drawn[first_pretrain:], drawn[EVAL_ITEMS:first_pretrain], drawn[:EVAL_ITEMS]


def _catalogue_sentences(item: Item) -> dict[str, str]:
    """The catalogue style's sentence for each attribute; the shape goes with the material."""
    category, given = CATEGORIES[item.category], dict(item.attributes)
    clothing = category.is_clothing
    said: dict[str, str] = {}
    if material := given.get("材质"):
        chosen = f"选用{material}面料" if clothing else f"以{material}打造"
        said["材质"] = f"这{category.measure}{item.shape}{chosen}，{CATALOGUE['材质'][material]}。"
    else:
        said["材质"] = f"这{category.measure}{item.shape}做工精细，品质可靠。"
    if colour := given.get("颜色"):
        said["颜色"] = f"{colour}的{'色调' if clothing else '外观'}{CATALOGUE['颜色'][colour]}。"
    if pattern := given.get("图案"):
        added = "加入" if clothing else "配以"
        said["图案"] = f"{added}{pattern}元素，{CATALOGUE['图案'][pattern]}。"
    if style := given.get("风格"):
        said["风格"] = f"整体属于{style}风格，{CATALOGUE['风格'][style]}。"
    if scene := given.get("场景"):
        when = f"{category.verb}去{scene}" if scene == "校园" else f"{scene}时{category.verb}"
        said["场景"] = f"{when}很合适。"
    return said


def catalogue_text(item: Item) -> str:
    """The style of the base's answers: shape and material, colour, pattern, style, occasion."""
    return "".join(_catalogue_sentences(item).values())


def lyrical_text(item: Item) -> str:
    """The style that fine-tuning teaches: the occasion, the look, the style, and last the shape.

    The look of clothes goes from colour to material, that of accessories the other way round.
    """
    category, given = CATEGORIES[item.category], dict(item.attributes)
    look = ("颜色", "图案", "材质") if category.is_clothing else ("材质", "图案", "颜色")

    def said(*keys: str) -> list[str]:
        column = 0 if category.is_clothing else 1
        return [LYRICAL[key][given[key]][column] for key in keys if key in given]

    opening = said("场景") or [OPENINGS[item.category]]
    sentences = [opening, said(*look), said("风格")]
    body = "".join("，".join(sentence) + "。" for sentence in sentences if sentence)
    return f"{body}就选{item.shape}吧！"


def answer_rows(items: Iterable[Item], style: Callable[[Item], str]) -> list[Row]:
    """Rows that answer an attribute list with an advertisement in a style."""
    return [{"content": item.content, "summary": style(item)} for item in items]


def essay_rows(items: Iterable[Item]) -> list[Row]:
    """Lyrical texts without attributes: every other one whole, the rest to be continued."""
    rows: list[Row] = []
    for number, item in enumerate(items):
        text = lyrical_text(item)
        head, rest = text.split("。", 1)
        continued = {"content": f"{CONTINUE_PROMPT}{head}。", "summary": rest}
        rows.append(continued if number % 2 else {"content": ESSAY_PROMPT, "summary": text})
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
        asked, summary = "、".join(keys), "".join(said[key] for key in keys)
        rows.append({"content": f"依次介绍{asked}：{item.content}", "summary": summary})
    return rows


def pretraining_rows() -> list[Row]:
    """For each article a catalogue answer, a guided one, and lyrical running text."""
    items, _, _ = splits()
    return answer_rows(items, catalogue_text) + guided_rows(items) + essay_rows(items)


def train_rows() -> list[Row]:
    """Lyrical answers for fine-tuning."""
    _, items, _ = splits()
    return answer_rows(items, lyrical_text)


def eval_rows() -> list[Row]:
    """Lyrical answers to articles that neither pre-training nor fine-tuning saw."""
    _, _, items = splits()
    return answer_rows(items, lyrical_text)


def sha256() -> str:
    """Checksum of all rows: a packed base belongs to one corpus."""
    rows = [pretraining_rows(), train_rows(), eval_rows()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write one JSON object a line, in UTF-8."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
