"""Speed of all score profiles, and how often their intervals hold the truth.

    python -m tests.benchmarks.scores --data FILE.jsonl [--column summary] [--sets 2000]

speed     CPU seconds of all profiles on the file's texts, each scored against the next one, ten of
          them 60 texts long; and of all bootstrap intervals
coverage  share of simulated sets whose 95 % interval holds the mean that they were drawn from:
          skewed scores with some zeros, and a rate of 0.9; 50 and 200 rows a set
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serve.scores.intervals import bootstrap
from serve.scores.measured import means
from serve.scores.profiles import measure
from serve.scores.rows import ScoredRow

LONG_PAIRS, TEXTS_OF_A_LONG_ONE = 10, 60
SIZES = (50, 200)


def pairs(texts: Sequence[str]) -> list[ScoredRow]:
    """Each text against the next one, and the first pairs against each other at length."""
    rng = random.Random(1)

    def long() -> str:
        return "".join(rng.choices(texts, k=TEXTS_OF_A_LONG_ONE))

    others = [*texts[1:], texts[0]]
    rows = [
        ScoredRow(other, (text,), "stop", 100.0, 80)
        for other, text in zip(others, texts, strict=True)
    ]
    few = min(LONG_PAIRS, len(rows))
    return [ScoredRow(long(), (long(),), "length", 100.0, 80) for _ in range(few)] + rows[few:]


def speed(texts: Sequence[str]) -> dict[str, float]:
    """CPU seconds of the scores and of their intervals."""
    rows = pairs(texts)
    measure(rows[:1])  # jieba's dictionary
    began = time.process_time()
    found = measure(rows, set(texts))
    scored = time.process_time()
    for one in found:
        bootstrap(one)
    return {
        "rows": len(rows),
        "scores_cpu_seconds": scored - began,
        "intervals_cpu_seconds": time.process_time() - scored,
    }


def coverage(kind: str, size: int, sets: int) -> float:
    """Share of sets of `size` rows whose interval holds the true mean."""
    rng, held = np.random.default_rng(9), 0
    for seed in range(sets):
        if kind == "rate":
            values, true = (rng.random(size) < 0.9).astype(float), 0.9
        else:
            values, true = rng.beta(2, 5, size) * (rng.random(size) < 0.9), 0.9 * 2 / 7
        low, high = bootstrap(means("", "", ["x"], values[:, None]), seed=seed)
        held += bool(low[0] <= true <= high[0])
    return held / sets


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with texts")
    parser.add_argument("--column", default="summary", help="of the texts")
    parser.add_argument("--sets", type=int, default=2000)
    options = parser.parse_args(argv)
    lines = options.data.read_text(encoding="utf-8").splitlines()
    found: dict[str, Any] = speed([json.loads(line)[options.column] for line in lines])
    for kind in ("skewed", "rate"):
        for size in SIZES:
            found[f"coverage_{kind}_{size}"] = coverage(kind, size, options.sets)
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
