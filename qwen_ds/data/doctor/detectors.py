"""All detectors that look at one conversation; a new one is a line here."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_ds.data.doctor.answers import NO_FULL_STOP, cut_midway, echoes, loops, too_short
from qwen_ds.data.doctor.columns import swapped
from qwen_ds.data.doctor.identity import identity
from qwen_ds.data.doctor.languages import languages
from qwen_ds.data.doctor.marks import leftovers
from qwen_ds.data.doctor.markup import blanks, markup
from qwen_ds.data.doctor.personal import personal_data
from qwen_ds.data.doctor.scripts import damage, intruders, traditional
from qwen_ds.data.doctor.spans import Span, Talk, TalkFinder
from qwen_ds.data.doctor.unclosed import unclosed

DETECTORS: tuple[TalkFinder, ...] = (
    damage, intruders, traditional, leftovers, markup, blanks, unclosed,
    echoes, cut_midway, loops, too_short, identity, languages, swapped, personal_data,
)  # fmt: skip
# Kinds that explain others: damaged text has strange scripts and open brackets, too.
_EXPLAINS = {
    "mojibake-gbk": ("kana", "hangul", "cyrillic", "traditional-among-simplified", "kun-kao"),
    "mojibake-latin1": ("control-character", "zero-width-character", "language-mismatch"),
    "unclosed-code-fence": ("answer-cut-midway", NO_FULL_STOP),
    "answer-equals-question": ("swapped-columns",),
    "placeholder": ("answer-cut-midway", "language-mismatch"),
}


def found_in(talk: Talk) -> Iterator[Span]:
    """Every finding in a conversation, less those that another one explains."""
    spans = [span for find in DETECTORS for span in find(talk)]
    if len(spans) > 1:
        kinds = {span.kind for span in spans}
        explained = {kind for by, list_ in _EXPLAINS.items() if by in kinds for kind in list_}
        spans = [span for span in spans if span.kind not in explained]
    yield from spans
