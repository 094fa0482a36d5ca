"""The answers that a row's prediction is compared with, where a row has several."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from qwen_ds.errors import UserError


def references_of(
    own: str | None, seen: Sequence[object], columns: Sequence[str], source: str
) -> tuple[str, ...]:
    """The row's own answer, then those of its columns, each once and none blank.

    Args:
        own: the answer as its reader has it.
        seen: the row, as its only element; none if the answer came from several.
        columns: of the row, each a text, a list of texts, or nothing.

    UserError: anything else in such a column.
    """
    row = seen[0] if seen and isinstance(seen[0], Mapping) else {}
    texts = [own] if own is not None else []
    for column in columns:
        value = row.get(column)
        found = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(isinstance(text, str) for text in found):
            raise UserError(
                f"{source}: {column} holds no texts; expected a text, or a list of them"
            )
        texts += found
    return tuple(dict.fromkeys(text for text in texts if text.strip()))


def require_columns(known: Container[str], columns: Sequence[str]) -> None:
    """Raise UserError for a column that no row has."""
    for name in columns:
        if name not in known:
            raise UserError(
                f"--references {name}: no row has it; expected the name of a column, spelled as in "
                "the input"
            )
