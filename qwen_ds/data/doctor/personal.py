"""Personal data and secrets. The checks are the numbers' own: checksums, dates, prefixes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwen_ds.data.doctor import characters as of
from qwen_ds.data.doctor.spans import Span, Talk

_MAIL = re.compile(
    r"(?<![\w.+%-])(?!git@)[A-Za-z0-9](?:[\w.+%-]{0,63})@(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+"
    r"[A-Za-z]{2,24}(?![\w@])",
    re.ASCII,
)
# What nobody has: RFC 2606 keeps these domains for examples.
_NOBODY = re.compile(
    r"(?:your?|user|name|someone|somebody|me|example|test|abc|xxx)[\w.]*@(?:\w+\.)?example\.\w+\Z",
    re.IGNORECASE,
)
_LONG_NUMBER = re.compile(r"\d[\d() .-]{6,}\d")  # all numbers below hold one
_PHONE = re.compile(
    r"(?<![\d.+*/-])(?:[(（]?(?:\+|00)?86[)）]?[- ]?)?(?:1[3-9]\d[-. ]?\d{4}[-. ]?\d{4}"
    r"|1[3-9]\d([- ])\d{3}\1\d{5}|\(1[3-9]\d\) ?\d{4}[- ]?\d{4})(?![\d*]|/(?!1[3-9]\d)|\.\d|-\d)"
)
# Of other countries: with the country's code, or with the area's in brackets.
_PHONE_ABROAD = re.compile(
    r"(?<![A-Za-z0-9_.+*/=-])(?:\+(?!86)(?!\d+\.\d+(?!\.?\d))"
    r"[1-9]\d{0,2}(?=(?:[-. ()]{0,2}\d){7,13}(?!\d))(?=[-. (]{0,2}\d{0,3}[)]?[-. ]|\d{8})"
    r"(?:[-. ]?\(\d{1,4}\))?(?:[-. ]?\d{2,12}){1,5}"
    r"|\([2-9]\d\d\) ?[2-9]\d\d-\d{4})(?![\d*]|\.\d|-\d)"
)
# In America what begins with 555 is nobody's, and what costs nothing to call is no person's.
_IS_NOBODYS = re.compile(
    r"(?:\+1[- ]?\(?|\()8(?:00|33|44|55|66|77|88)|(?:\+1\D{0,2}|\()\d{3}\D{0,2}555"
)
# A number that a program made: the left half of a message's id.
_MADE = re.compile(r"[\d.]*\d{6}[\d.]*\.[\d.]*@")
# An amount: its unit after it, or round.
_AMOUNT = re.compile(
    r"\s?(?:[万亿][元人吨美]|[美日欧韩港台加澳]?元(?!旦)|人(?:口|次|左右|以上)?(?!\w)|吨|公里|千米|千克|公斤|[%％℃]|"
    r"平方|立方|英镑|卢布|卢比|字节|(?:US|RMB|CNY|USD|dollars|people|years|tons|bytes|km|kg)\b)"
)
_ROUND = "00000"
_ID_CARD = re.compile(
    r"(?<![\dA-Za-z])[1-9]\d{5}([ -]?)(?:18|19|20)\d{6}\1\d{3}[\dXx](?![\dA-Za-z])"
)
_CARD = re.compile(
    r"(?<![\d.-])(?:(?:\d{4}[ -]){3,4}\d{1,7}|\d{6} \d{10,13}|3[47]\d\d([ -])\d{6}\1\d{5})(?![\d-])"
    r"|(?<![\d.-])\d{15,19}(?![\d-]|\.\d)"
)
# UnionPay, Visa, MasterCard, American Express, JCB, Discover, ICBC.
_CARD_BEGINS = re.compile(r"62|4|5[1-5]|2[2-7]|3[47]|35|60|65|9558")
# No search for a word: `key=apple` and `key=%E5%91%A8` are none.
_SECRET = (
    r"(?:[\w-]*(?:key|token|secret|passwd|password|pass|pwd|signature|credential|auth|jwt)|sig|ak|sk|"
    r"session_?id)=(?!%[Ee])(?=[!-~]*?\d|[!-~]{12})[^\s&'\"<>，。]{6,}"
)
_URL_KEY = re.compile(
    r"(?:https?|wss?|ftp|mysql|postgres(?:ql)?|mongodb(?:\+srv)?|rediss?|amqps?|ssh|smtp)://"
    r"(?:[^\s/@:'\"<>]*:[^\s/@'\"<>]{3,}@\S+"
    rf"|[^\s'\"<>]*?[?&#;][^\s'\"<>]*?{_SECRET}"
    r"|hooks\.slack\.com/services/\w+/\w+/\w{16,}|api\.telegram\.org/bot\d{6,}:[\w-]{20,}"
    r"|discord(?:app)?\.com/api/webhooks/\d+/[\w-]{16,}|[\w.-]+/open-apis/bot/v\d/hook/[\w-]{16,})",
    re.IGNORECASE,
)
# An address that is written without its scheme.
_BARE_URL_KEY = re.compile(rf"(?<=[\w/])[?&]{_SECRET}", re.IGNORECASE)
_BARE_URL = re.compile(r"(?:[\w-]+\.)+[A-Za-z]{2,}(?:[:/?][\w./?=&%:-]*)?\Z", re.ASCII)
_LONGEST_URL = 300
_WIDE = {0xFF01 + at: 0x21 + at for at in range(94)}  # full-width ASCII, to what it stands for
_ACCESS_KEY = re.compile(
    r"(?<![\w-])(?:sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|LTAI[0-9A-Za-z]{12,26}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|hf_[A-Za-z0-9]{30,}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,})(?![\w-])"
)
_BEGINS_KEY = ("sk-", "AKIA", "LTAI", "gh", "hf_", "AIza", "xox")
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def is_id_card(text: str) -> bool:
    """Whether 18 characters are a resident identity number (GB 11643): date and check digit."""
    month, day = int(text[10:12]), int(text[12:14])
    total = sum(int(digit) * weight for digit, weight in zip(text, _WEIGHTS, strict=False))
    return 1 <= month <= 12 and 1 <= day <= 31 and "10X98765432"[total % 11] == text[17].upper()


def is_card(digits: str) -> bool:
    """Whether digits are a payment card's number: a known beginning, and Luhn's check digit."""
    if not 15 <= len(digits) <= 19 or not _CARD_BEGINS.match(digits):
        return False
    if len(digits) == 15 and digits[:2] not in ("34", "37"):
        return False
    doubled = [int(d) * (1 + place % 2) for place, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0 and len(set(digits)) > 1


def personal_data(talk: Talk) -> Iterator[Span]:
    """Personal data and secrets in any turn, and in the system text."""
    for turn, text, classes in talk.texts:
        for kind, start, end in places(text, classes):
            yield Span(kind, turn, start, end)


def places(text: str, classes: int = of.EVERY) -> Iterator[tuple[str, int, int]]:
    """(kind, start, end) of each piece of personal data in a text."""
    if classes & of.FULL_WIDTH or "＠" in text:
        text, classes = text.translate(_WIDE), of.EVERY
    if classes & of.AT and "@" in text:
        for match in _MAIL.finditer(text):
            if not (_NOBODY.match(match[0]) or _MADE.match(match[0])):
                yield "mail", *match.span()
    if classes & of.DIGIT and _LONG_NUMBER.search(text):
        for match in _ID_CARD.finditer(text):
            if is_id_card(re.sub("[ -]", "", match[0])):
                yield "id-card", *match.span()
        for match in _PHONE.finditer(text):
            if not (match[0].endswith(_ROUND) or _AMOUNT.match(text, match.end())):
                yield "phone", *match.span()
        if "+" in text or "(" in text:
            for match in _PHONE_ABROAD.finditer(text):
                if not (_IS_NOBODYS.match(match[0]) or match[0].endswith(_ROUND)):
                    yield "phone", *match.span()
        for match in _CARD.finditer(text):
            if is_card(re.sub(r"\D", "", match[0])) and not is_id_card_like(match[0]):
                yield "bank-card", *match.span()
    if "://" in text:
        for match in _URL_KEY.finditer(text):
            yield "key-in-url", *match.span()
    elif "=" in text and "?" in text:
        for match in _BARE_URL_KEY.finditer(text):
            before = max(0, match.start() - _LONGEST_URL)
            if url := _BARE_URL.search(text[before : match.start()]):
                yield "key-in-url", before + url.start(), match.end()
    if classes & of.LATIN and any(word in text for word in _BEGINS_KEY):
        for match in _ACCESS_KEY.finditer(text):
            yield "access-key", *match.span()


def is_id_card_like(text: str) -> bool:
    return len(text) == 18 and text.isdigit() and is_id_card(text)


def masked(text: str) -> str:
    """A piece of personal data, of equal length, with its middle hidden: enough to find it, too
    little to use it."""
    shown, last = (8, 0) if "://" in text else (1, 2) if "@" in text else (3, 2)
    hidden = max(0, len(text) - shown - last)
    return f"{text[:shown]}{'*' * hidden}{text[len(text) - last :] if last else ''}"
