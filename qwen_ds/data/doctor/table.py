"""Findings on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen_ds.terminal import one_line

NOTHING = "nothing found"


def table(findings: Sequence[dict[str, Any]]) -> list[str]:
    """A line a finding, with its first example and the advice below it."""
    if not findings:
        return [NOTHING]
    names = max(len(each["finding"]) for each in findings)
    counts = max(len(f"{each['count']:,}") for each in findings)
    lines = []
    for each in findings:
        share = f"{each['share']:.1%}" if each["share"] >= 0.001 else "<0.1%"
        lines.append(
            f"{each['severity']:<4}  {each['finding']:<{names}}  {each['count']:>{counts},}  "
            f"{share:>6}  {each['advice']}"
        )
        lines += [f"      {shown_example(example)}" for example in each["examples"]]
    return lines


def shown_example(example: dict[str, str]) -> str:
    """An example in one line, the place marked by brackets that texts rarely have."""
    text = ""
    if example["marked"]:
        text = f"{example['before']}⟦{example['marked']}⟧{example['after']}"
    detail = example.get("detail", "")
    return one_line("  ".join(part for part in (example["place"], text, detail) if part))
