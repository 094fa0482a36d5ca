"""The phrase tables of the demo corpus, from phrases.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml


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
