"""Answers without a full stop: whether they are cut, judged by how the data set's sentences end.

In Chinese nothing but the words tells a cut sentence from one whose full stop was forgotten. A
word that the data set has before punctuation ends a sentence; one that it never has there, and
whose last character is rarely seen there, does not. This costs no dictionary and no segmentation.

Shapes: 65,536 characters of the basic plane.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

_FINAL = re.compile(r"([\w”》）)]{2})[。！？!?；;…~～]")
_PARTICLES = "吗呢吧啊呀哦啦哟嘛哈哇"
# Words that end a sentence, though their last characters mostly stand within one.
_COMPLETE = tuple(
    "可以 即可 而已 出来 起来 下来 上去 过来 回来 之一 罢了 为止 使用 适用 在内 一起 为主".split()
)
RARELY = 0.15  # the share of a character's places that are before punctuation
_PLANE = 1 << 16
_ENDS_CLAUSE = np.isin(np.arange(_PLANE), [ord(char) for char in "，。！？!?；;…~～：:\n"])


@dataclass(slots=True)
class Endings:
    """The ends of the sentences in some texts."""

    finals: set[str] = field(default_factory=set)
    ends: np.ndarray = field(default_factory=lambda: np.zeros(_PLANE, np.int64))
    all: np.ndarray = field(default_factory=lambda: np.zeros(_PLANE, np.int64))

    def see(self, answers: Iterable[str]) -> None:
        """Count the ends of sentences in answers."""
        text = "\n".join(answers)
        self.finals.update(_FINAL.findall(text))
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        points = np.where(points < _PLANE, points, 0)
        self.ends += np.bincount(points[:-1][_ENDS_CLAUSE[points[1:]]], minlength=_PLANE)
        self.all += np.bincount(points, minlength=_PLANE)

    def add(self, other: Endings) -> None:
        self.finals |= other.finals
        self.ends += other.ends
        self.all += other.all

    def is_cut(self, ending: str) -> bool:
        """Whether a text that ends so, without punctuation, was cut."""
        if ending[-1:] in _PARTICLES or ending[-2:] in self.finals:
            return False
        if ending.endswith(_COMPLETE):
            return False
        point = ord(ending[-1])
        return bool(self.ends[point] <= RARELY * max(self.all[point], 1))
