"""Words of texts by jieba, and the other ways to cut a text into tokens."""

from __future__ import annotations

import functools
import logging
import re
import warnings
from importlib.metadata import version

with warnings.catch_warnings():
    # jieba imports pkg_resources and has unescaped patterns: both warn on stderr.
    warnings.simplefilter("ignore")
    import jieba

_ALPHANUMERIC = re.compile(r"[^\W_]+")
# A Han character, or a run of other letters and digits.
_CHARACTERS = re.compile(
    r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    r"|[^\W_\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)


@functools.cache
def _segmenter() -> jieba.Tokenizer:
    """Return jieba with its stock dictionary, which takes half a second once per process.

    It is an instance of our own, filled by hand: other code may have added words to jieba's shared
    one, which also caches its dictionary in the common temporary folder, where any user may have
    left a different one.
    """
    logging.getLogger("jieba").setLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter


class Words:
    """jieba's words of texts: each text is cut once, however many profiles ask for it."""

    signature = f"jieba {version('jieba')}, its own dictionary, HMM"

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, ...]] = {}

    def of(self, text: str) -> tuple[str, ...]:
        """Words in order; joined they give the text, white space and punctuation included."""
        found = self._known.get(text)
        if found is None:
            found = self._known[text] = tuple(_segmenter().cut(text))
        return found

    def alphanumeric(self, text: str) -> list[str]:
        """Lower-cased words without punctuation. Of English text, the tokens of rouge-score."""
        return [token for word in self.of(text.lower()) for token in _ALPHANUMERIC.findall(word)]


def characters(text: str) -> list[str]:
    """Lower-cased Han characters, and whole words of other scripts, without punctuation."""
    return _CHARACTERS.findall(text.lower())
