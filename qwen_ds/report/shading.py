"""Rows whose target tokens are shaded by their loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from qwen_ds.page.html import shown
from qwen_ds.report.folder import Row

MAX_ROWS = 5
MAX_TARGETS = 250
CONTEXT_LETTERS = 160  # of a text between targets: its end is shown
# Loss in nats from which a token has each shade; e^-5 is a probability of 0.7 %.
SHADES = (0.1, 0.5, 1.0, 2.0, 3.5, 5.0)


class Moment(NamedTuple):
    """A row at one moment: the step, the mean loss of its targets, and its tokens as HTML."""

    step: object
    mean: float
    tokens: Markup


class ShadedRow(NamedTuple):
    """A row at the start and at the end, by where it comes from."""

    source: str
    moments: list[tuple[str, Moment]]


def shaded(lines: Sequence[Row]) -> list[ShadedRow]:
    """The rows of token_losses.jsonl, the start of each before its end. Of a resumed run the last
    line of each row and moment counts."""
    rows: dict[str, dict[str, Moment]] = {}
    for line in lines:
        pieces, losses = line["pieces"], line["losses"]
        if len(pieces) != len(losses):
            raise ValueError(f"{len(pieces)} pieces with {len(losses)} losses")
        targets = [float(loss) for loss in losses if loss is not None]
        mean = sum(targets) / len(targets) if targets else 0.0
        moment = Moment(line.get("step"), mean, tokens(pieces, losses))
        rows.setdefault(str(line["source"]), {})[str(line["when"])] = moment
    return [
        ShadedRow(source, [(when, found[when]) for when in ("start", "end") if when in found])
        for source, found in itertools.islice(rows.items(), MAX_ROWS)
    ]


def shade(loss: float) -> int:
    """The number of a loss's shade: 0 (as good as certain) to len(SHADES)."""
    return sum(loss >= bound for bound in SHADES)


def tokens(pieces: Sequence[str], losses: Sequence[float | None]) -> Markup:
    """The text of a row with a shade and its loss, on pointing at it, for each target token. Of
    text between targets the end is shown, of very many targets the first."""
    out: list[Markup] = []
    left = MAX_TARGETS
    grouped = itertools.groupby(zip(pieces, losses, strict=True), key=lambda pair: pair[1] is None)
    for is_context, group in grouped:
        pairs = list(group)
        if is_context:
            text = "".join(str(piece) for piece, _ in pairs)
            if len(text) > CONTEXT_LETTERS:
                text = f"… {text[-CONTEXT_LETTERS:]}"
            out.append(Markup('<span class="context">{}</span>').format(shown(text)))
            continue
        out += [_token(str(piece), float(loss or 0.0)) for piece, loss in pairs[:left]]
        if len(pairs) > left:
            out.append(Markup("… ({} more tokens)").format(len(pairs) - left))
            break
        left -= len(pairs)
    return Markup("").join(out)


def _token(piece: str, loss: float) -> Markup:
    text = str(shown(piece)).replace("\n", "\u21b5\n")
    return Markup('<b class="s{}" title="{}">{}</b>').format(shade(loss), f"{loss:.2f}", text)
