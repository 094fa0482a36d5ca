"""Pairs of texts to score, made from words of our own: Chinese, English and both, with digits and
punctuation; equal, changed, unlike, repeated and empty ones."""

from __future__ import annotations

import random

CHINESE = (
    "这款 那条 连衣裙 半身裙 针织衫 牛仔裤 外套 采用 选用 柔软 的 面料 棉质 蕾丝 简约 大方 百搭 "
    "显瘦 领口 袖口 腰间 设计 独特 时尚 气质 穿着 舒适 透气 非常 适合 春天 出门 约会 一双 小白鞋"
).split()
ENGLISH = (
    "the a light coat dress with long sleeves looks good on Monday It's state-of-the-art".split()
)
DIGITS = "3.5 2024 100% 50cm XL T恤 A.B v2.0 ¥199".split()
MARKS = "， 。 ！ ？ 、 ； ： “ ” …… ...... … , . ! ? ; : ( ) ?” 。” _ # 😀 <br>".split()
SPACES = [" ", "  ", "\n", "\t", "\u3000", "\n \n"]
ODD = ["", " ", "\n", "...", ".", "。", "？", " . ", "a.", "......x", "好......的", "\u3000", "_"]


def _sentence(rng: random.Random) -> list[str]:
    """Pieces of one sentence."""
    kind = rng.random()
    if kind < 0.6:
        pieces = rng.choices(CHINESE, k=rng.randint(1, 14))
    elif kind < 0.85:
        words = rng.choices(ENGLISH, k=rng.randint(1, 10))
        pieces = [piece for word in words for piece in (word, " ")]
    else:
        pieces = rng.choices(CHINESE + ENGLISH, k=rng.randint(1, 8))
    if rng.random() < 0.4:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(DIGITS))
    return [*pieces, rng.choice([*MARKS, *SPACES]) if rng.random() < 0.8 else ""]


def _changed(pieces: list[str], rng: random.Random) -> list[str]:
    """The pieces with some left out, replaced, repeated, in other case, or moved."""
    out: list[str] = []
    for piece in pieces:
        kind = rng.random()
        if kind < 0.1:
            continue
        if kind < 0.2:
            piece = rng.choice(CHINESE + ENGLISH + MARKS)
        elif kind < 0.25:
            piece = piece.upper()
        out += [piece] * (2 if kind > 0.95 else 1)
    if len(out) > 4 and rng.random() < 0.3:
        cut = rng.randrange(len(out))
        out = out[cut:] + out[:cut]
    return out


def text_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """(prediction, reference), the same for the same seed. Every tenth has an odd or empty side."""
    rng = random.Random(seed)
    pairs = []
    for k in range(count):
        expected = [piece for _ in range(rng.randint(1, 4)) for piece in _sentence(rng)]
        kind = rng.random()
        if kind < 0.65:
            predicted = _changed(expected, rng)
        elif kind < 0.8:
            predicted = [piece for _ in range(rng.randint(1, 4)) for piece in _sentence(rng)]
        elif kind < 0.9:
            predicted = expected
        else:
            predicted = _sentence(rng) * rng.randint(2, 5)
        sides = ["".join(predicted), "".join(expected)]
        if k % 10 == 0:
            sides[rng.randrange(2)] = rng.choice(ODD)
        pairs.append((sides[0], sides[1]))
    return pairs
