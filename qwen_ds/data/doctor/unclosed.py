"""Code fences, brackets and quotations that open and never close."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from qwen_ds.data.doctor import characters as of
from qwen_ds.data.doctor.spans import Span, Talk, outside_code

_TICKS = re.compile(r"`{3,}")
_FENCE = re.compile(r"^[ \t]*(?:>[ \t]?)*`{3,}", re.MULTILINE)
_FENCE_IN_LINE = re.compile(r"(?<=[:： ])```[\w+#-]*[ \t]*\n")
_TILDES = re.compile(r"^~~~(\w*)[ \t]*$", re.MULTILINE)
_PAIRS = "（） () [] 〔〕 〈〉 【】 《》 「」 『』 {}".split()
# By the pair that each belongs to; of （, ( and [ one may close what another has opened.
_OPENERS = {pair[0]: "（" if pair[0] in "（([" else pair[0] for pair in _PAIRS}
_CLOSERS = {pair[1]: _OPENERS[pair[0]] for pair in _PAIRS}
_ANY_BRACKET = re.compile(f"[{re.escape(''.join(_PAIRS))}]")
# What prose about programs has not.
_CODE_SIGN = re.compile(r"[={};<>\\`$_#|&*/\[]|[A-Za-z]\(|\(\)")
_EMOTICON = re.compile(r"[:;=8xX]['\-~]?[(\[{]|[(（][・^｀´;；:T￣><*@≧╯°▽〃]|\([A-Z]?[_^]")


def unclosed(talk: Talk) -> Iterator[Span]:
    """Code fences, brackets and quotations that open and never close."""
    for turn, ((_, text), classes) in enumerate(zip(talk.turns, talk.classes, strict=True)):
        if (classes & of.BACKTICK or "~~~" in text) and (at := _open_fence(text)) is not None:
            yield Span("unclosed-code-fence", turn, at, min(len(text), at + 20))
            continue
        if classes & (of.BRACKET | of.QUOTE):
            plain = outside_code(text)
            left = _open_brackets(plain, talk) if classes & of.BRACKET else {}
            yield from (Span(kind, turn, at, at + 1) for kind, at in left.items())
            may_be_json = not left and classes & of.BRACE and talk.is_of_code
            if may_be_json and (end := _open_json(text)) is not None:
                yield Span("unclosed-bracket", turn, max(0, end - 20), end)
            if classes & of.QUOTE and (at := _open_quote(plain, talk)) is not None:
                yield Span("unclosed-quote", turn, at, at + 1)


def _open_fence(text: str) -> int | None:
    if len(_TICKS.findall(text)) % 2:
        # One within a line may be a mention of the sign.
        fences = [match.start() for match in _FENCE.finditer(text)]
        fences = fences or [match.start() for match in _FENCE_IN_LINE.finditer(text)]
        if len(fences) % 2:
            return fences[-1]
    tildes = list(_TILDES.finditer(text))
    return tildes[-1].start() if len(tildes) % 2 and tildes[-1][1] else None


def _open_brackets(text: str, talk: Talk) -> dict[str, int]:
    """By the kind of finding, the first bracket that stays open."""
    faces = {at for match in _EMOTICON.finditer(text) for at in (match.start(), match.end() - 1)}
    open_at: dict[str, list[int]] = {}
    for match in _ANY_BRACKET.finditer(text):
        if match.start() in faces:
            continue
        if kind := _OPENERS.get(match[0]):
            open_at.setdefault(kind, []).append(match.start())
        elif open_at.get(_CLOSERS[match[0]]):
            open_at[_CLOSERS[match[0]]].pop()
    left = sorted(places[0] for places in open_at.values() if places)
    if talk.is_of_code and _CODE_SIGN.search(text):
        left = [at for at in left if text[at] not in "([{"]
    found: dict[str, int] = {}
    for at in left:
        found.setdefault("unclosed-quote" if text[at] in "《「『" else "unclosed-bracket", at)
    return found


_IS_JSON = re.compile(r'\A\s*(?:\{\s*"[^"\n]{1,80}"\s*:|\[\s*(?:\{\s*"|"[^"\n]{0,80}"\s*,))')
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def _open_json(text: str) -> int | None:
    """The end of an answer that is JSON and stops before its last bracket."""
    if not _IS_JSON.match(text):
        return None
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        bare = _JSON_STRING.sub("", text)
        is_open = bare.count("{") > bare.count("}") or bare.count("[") > bare.count("]")
        return len(text.rstrip()) if is_open else None
    return None


_OPENED_TWICE = re.compile("“(?=[^“”\n]*“[^“”]*”)")
_SINGLE = re.compile(r"‘(?!\d|n\b|em\b|til\b|cause\b|tis\b|twas\b)")


def _open_quote(text: str, talk: Talk) -> int | None:
    opening, closing = text.count("“"), text.count("”")
    # A sloppy hand writes “ on both sides.
    if opening > closing and not (closing == 0 and opening % 2 == 0):
        last = text.rfind("“")
        if text.find("”", last) < 0:
            return last
        # Each paragraph of a long quotation opens it again; within one that is a fault.
        return twice.start() if (twice := _OPENED_TWICE.search(text)) else None
    singles = _SINGLE.findall(text) if "‘" in text else []
    if len(singles) > text.count("’"):
        return text.rfind("‘")
    if text.count('"') % 2 == 0 or opening != closing or talk.is_of_code:
        return None
    found = (match.start() for match in re.finditer('"', text))
    straight = [at for at in found if not _is_inch(text, at)]
    return straight[-1] if len(straight) % 2 else None


def _is_inch(text: str, at: int) -> bool:
    return at > 0 and (text[at - 1].isdigit() or text[at - 1] == "\\")
