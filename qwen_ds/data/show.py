"""Token rows on a terminal: the text that the model reads, its target tokens, and row lengths."""

from __future__ import annotations

from itertools import cycle

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from qwen_ds.data.rows.token_rows import TokenRows
from qwen_ds.model.chatml import IGNORE
from qwen_ds.model.tokenizer import Encoding
from qwen_ds.terminal import one_line, visible

_LEARNT, _UNLEARNT, _SPECIAL = "green", "bright_black", "bold"
_BINS, _BAR_CELLS = 12, 40


def show_row(rows: TokenRows, row: int, encoding: Encoding, console: Console) -> None:
    """Print a row: target tokens green (without colour in ⟦ ⟧), others grey, control ones bold."""
    ids, labels = rows[row]
    title = f"{one_line(rows.source(row))}   {len(ids)} tokens, {int(rows.learnt[row])} learnt"
    # rich's rule cuts off what is wider than the terminal: of a place, the number of its row.
    rule = "─" * (console.width - cell_len(title) - 1)
    console.print(Text(f"{title} {rule}"), soft_wrap=True)
    learnt = labels != IGNORE
    edges = [0, *(np.flatnonzero(learnt[1:] != learnt[:-1]) + 1).tolist(), len(ids)]
    shown = Text()
    for start, end in zip(edges, edges[1:], strict=False):
        is_learnt = bool(learnt[start])
        in_marks = is_learnt and console.color_system is None
        shown.append("⟦" if in_marks else "")
        _append(shown, ids[start:end].tolist(), encoding, _LEARNT if is_learnt else _UNLEARNT)
        shown.append("⟧" if in_marks else "")
    console.print(shown, soft_wrap=True)


def _append(shown: Text, ids: list[int], encoding: Encoding, style: str) -> None:
    """Append tokens. Those between two control tokens are decoded together, since a character may
    span several."""
    specials = set(encoding.special.values())
    start = 0
    for place in range(len(ids) + 1):
        if place == len(ids) or ids[place] in specials:
            shown.append(visible(encoding.decode(ids[start:place])), style)
            shown.append(encoding.decode(ids[place : place + 1]), f"{_SPECIAL} {style}")
            start = place + 1


def show_lengths(lens: np.ndarray, console: Console) -> None:
    """Print a histogram of row lengths in tokens."""
    console.rule("row lengths in tokens", align="left")
    shortest, longest = int(lens.min()), int(lens.max())
    width = _bin_width(longest - shortest + 1)
    first = shortest // width * width
    counts = np.bincount((lens - first) // width)
    columns = [len(f"{longest + width:,}"), len(f"{counts.max():,}")]
    for number, count in enumerate(counts.tolist()):
        start = first + number * width
        bar = "█" * round(_BAR_CELLS * count / counts.max()) or ("▏" if count else "")
        span = f"{start:>{columns[0]},} - {start + width - 1:<{columns[0]},}"
        line = f"{span} {count:>{columns[1]},}  {bar}".rstrip()
        console.print(line, highlight=False, soft_wrap=True)
    low, median, high = np.percentile(lens, [5, 50, 95])
    line = (
        f"shortest {shortest:,}, 5 % {low:,.0f}, median {median:,.0f}, mean {lens.mean():,.1f}, "
        f"95 % {high:,.0f}, longest {longest:,}"
    )
    console.print(line, highlight=False, soft_wrap=True)


def _bin_width(spread: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 .. that covers the spread in _BINS bins."""
    width, factors = 1, cycle((2, 2.5, 2))
    while width * _BINS < spread:
        width = int(width * next(factors))
    return width
