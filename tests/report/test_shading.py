"""Rows whose target tokens are shaded by their loss."""

from __future__ import annotations

import re

import pytest

from qwen_ds.report.shading import CONTEXT_LETTERS, MAX_TARGETS, SHADES, shade, shaded, tokens
from tests.report.runs import token_losses


def test_a_token_is_shaded_by_its_loss_and_says_it() -> None:
    found = tokens(["问", "春", "天\n", "<b>"], [None, 0.05, 2.25, 9.0])
    assert found == (
        '<span class="context">问</span><b class="s0" title="0.05">春</b>'
        '<b class="s4" title="2.25">天↵\n</b><b class="s6" title="9.00">&lt;b&gt;</b>'
    )
    assert [shade(bound) for bound in SHADES] == [1, 2, 3, 4, 5, 6] and shade(0.0) == 0


def test_the_same_rows_stand_at_the_start_and_at_the_end() -> None:
    rows = shaded(token_losses())
    assert [row.source for row in rows] == [f"eval.jsonl:{n}" for n in range(1, 6)]
    for row in rows:
        (first, start), (second, end) = row.moments
        assert (first, start.step, second, end.step) == ("start", 0, "end", 30)
        assert end.mean == pytest.approx(0.15 * start.mean)


def test_of_lines_that_a_resumed_run_repeats_the_last_counts() -> None:
    lines = token_losses(rows=1)
    again = {**lines[1], "step": 99}
    (row,) = shaded([*lines, again])
    assert [moment.step for _, moment in row.moments] == [0, 99]


def test_long_rows_are_cut_and_say_so() -> None:
    many = MAX_TARGETS + 10
    found = tokens(["问" * 500, *"答" * many], [None, *[1.0] * many])
    assert found.count("<b ") == MAX_TARGETS and found.endswith("… (10 more tokens)")
    assert len(re.findall("问", found)) == CONTEXT_LETTERS


def test_pieces_without_losses_are_refused() -> None:
    line = {"when": "start", "step": 0, "source": "a:1", "pieces": ["a", "b"], "losses": [1.0]}
    with pytest.raises(ValueError, match="2 pieces with 1 losses"):
        shaded([line])
