"""Data sets of the tests of token rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_ds.recipe.options import DataOptions

WriteRows = Callable[[str, list[dict[str, object]]], str]


def adgen(n: int, start: int = 0) -> list[dict[str, object]]:
    return [
        {"content": f"类型#裙*{i}", "summary": "好看" * (1 + i % 5) + str(i)}
        for i in range(start, start + n)
    ]


def chats(n: int) -> list[dict[str, object]]:
    roles = ("user", "assistant")
    return [
        {
            "messages": [
                {"role": roles[t % 2], "content": f"{i}.{t}"} for t in range(2 + 2 * (i % 3))
            ]
        }
        for i in range(n)
    ]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Writes rows into a file of the test's folder and gives its path."""

    def write(name: str, rows: list[dict[str, object]]) -> str:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def data(tmp_path: Path, write_rows: WriteRows) -> DataOptions:
    """Six single-turn rows and six chats, all too short to be cut."""
    train = [write_rows("a.jsonl", adgen(6)), write_rows("b.jsonl", chats(6))]
    return DataOptions(train=train, cache_dir=str(tmp_path / "cache"), max_tokens=400)
