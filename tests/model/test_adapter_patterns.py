"""Patterns of an adapter's configuration: `re`'s answers, in bounded time, in any thread."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from qwen_ds.model.adapter_patterns import MAX_LENGTH, MAX_SECONDS, Patterns

FOLDER = Path("adapter")
MODULES = [
    "transformer.wte", "transformer.h.0.attn.c_attn", "transformer.h.11.attn.c_attn",
    "transformer.h.1.mlp.c_proj", "lm_head",
]  # fmt: skip
RIGHT = [
    "c_attn", r"h\.1\..*", r".*\.(c_attn|w1)", r"^(?!.*(?:visual|h\.0)).*(?:c_attn|c_proj).*",
    r"(?i).*C_ATTN", r"h\.\d{1,2}\.(attn|mlp)\.\w+", r"(?P<n>h)\.1.*", r".*[._]head$", "",
    r"transformer\.h\.([0-9]|1[0-5])\..*", r"(a)?(?(1)x|lm_head)", r"\w+\{?",
]  # fmt: skip
SLOW = [
    r"(\w|\w\w|.)*[^\w.]", r"(.|\w)*(?<!\w)", r"(?:(?:\w?.?){20}){20}[!-']",
    r"(t)(\w|\w\w|.)*(?!\1)[!-']",
]  # fmt: skip
BROKEN = [
    "(", "c_attn)|(x", "*", "a{1,", "h{e<=2}", "[[:alpha:]]", r"\p{L}", "(?R)",
    "a" * (MAX_LENGTH + 1),
    "((.?){1000}){1000}", "a{99999999999}", "(" * 900 + ")" * 900, r"(?<=a+)b",
]  # fmt: skip


@pytest.mark.parametrize("pattern", RIGHT)
@pytest.mark.parametrize("module", MODULES)
def test_the_answers_are_those_of_re(pattern: str, module: str) -> None:
    patterns = Patterns(FOLDER)
    assert patterns.whole(pattern, module) == (re.fullmatch(pattern, module) is not None)
    if not pattern.startswith("(?i)"):  # which stands at the beginning only
        named = re.match(rf"(.*\.)?({pattern})$", module) is not None
        if "(?(1)" not in pattern:
            assert patterns.names(pattern, module) == named


def test_the_first_key_that_names_a_module_gives_its_value() -> None:
    keys = {"c_attn": 4, r"h\.1\..*": 2}
    value = Patterns(FOLDER).value
    assert value(keys, "transformer.h.1.attn.c_attn", 8) == 4
    assert value(keys, "transformer.h.1.mlp.w1", 8) == 2
    assert value(keys, "transformer.h.0.mlp.w1", 8) == value(None, "x", 8) == 8


@pytest.mark.parametrize("pattern", SLOW)
def test_a_catastrophic_pattern_is_stopped_in_any_thread(pattern: str) -> None:
    def run() -> None:
        patterns = Patterns(FOLDER, left=0.1)
        with pytest.raises(UserError, match=f"takes more than {MAX_SECONDS:g} s") as caught:
            for module in [*MODULES, "transformer.h.11.attn.c_attn" * 2]:
                patterns.whole(pattern, module)
        assert "\n" not in str(caught.value)

    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(run).result()


@pytest.mark.parametrize("pattern", BROKEN, ids=lambda pattern: pattern[:20])
def test_a_pattern_that_is_broken_or_could_grow_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="expected a simple regular expression") as caught:
        Patterns(FOLDER).names(pattern, MODULES[1])
    assert len(str(caught.value)) < 400


def test_the_time_of_all_matches_counts_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 1))
    monkeypatch.setattr(time, "thread_time", lambda: float(next(clock)))
    patterns = Patterns(FOLDER, left=5.0)
    for _ in range(4):
        patterns.whole("x", "y")  # compiled once, within the first
    assert patterns.left == 1.0


def test_compiling_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 1))
    monkeypatch.setattr(time, "thread_time", lambda: float(next(clock)))
    patterns = Patterns(FOLDER, left=3.0)
    with pytest.raises(UserError, match=rf"takes more than {MAX_SECONDS:g} s .* all 4 that were"):
        for i in range(100):
            patterns.whole(f"x{i}", "y")
    assert next(clock) == 10
