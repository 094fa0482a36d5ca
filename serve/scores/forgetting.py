"""Whether a model has forgotten: the same general rows measured before and after training.

Texts: the worsening is how much perplexity rose, as a share of what it was. Questions: how much
accuracy fell. The verdict of each kind:

    forgot       the worsening is at least TOLERANCE, and chance does not explain it: of all ways
                 to swap before and after row by row, at most CHANCE show one as large (a paired
                 permutation test, one-sided, by FLIPS random swaps; where texts and questions can
                 both tell, each has half of CHANCE)
    no sign      there are LEAST_ROWS, and the upper end of the 95 % interval is below TOLERANCE
    cannot tell  otherwise: too few rows, or questions that the model only guessed before

The test is exact for two models that differ by chance alone, however few the rows. The interval is
a percentile bootstrap over rows, the same rows on both sides.

Shapes: N rows that both sides have, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from qwen_ds.errors import UserError
from qwen_ds.resampling import interval, resampled
from serve.scores.measured import Figures, divided

Verdict = Literal["forgot", "no sign", "cannot tell"]
TOLERANCE = {"texts": 0.05, "questions": 0.02}
CHANCE = 0.025
LEAST_ROWS = 20
FLIPS, RESAMPLES = 10_000, 2_000
_AT_ONCE = 2**22  # random numbers that exist at a time
Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Worsening:
    """A figure before and after, how much worse it has become, and what follows."""

    kind: Literal["texts", "questions"]
    rows: int
    before: float
    after: float
    worsening: float
    low: float  # of the worsening, 95 %
    high: float
    p: float  # share of swaps with a worsening as large
    guessed: bool = False  # before: no better than chance, so that nothing can be told
    kinds: int = 1  # that can tell, and share CHANCE

    @property
    def verdict(self) -> Verdict:
        least = TOLERANCE[self.kind]
        if self.guessed:
            return "cannot tell"
        if self.worsening >= least and self.p <= CHANCE / self.kinds:
            return "forgot"
        return "no sign" if self.rows >= LEAST_ROWS and self.high < least else "cannot tell"

    def in_words(self) -> str:
        """One sentence: what changed, within which interval, and the verdict."""
        if self.kind == "texts":
            figures = f"perplexity of {self.rows} texts: {self.before:.4g} before, "
            figures += f"{self.after:.4g} after, {_signed(self.worsening)} %"
            ends = self.low, self.high
        else:
            figures = f"accuracy on {self.rows} questions: {100 * self.before:.1f} % before, "
            figures += f"{100 * self.after:.1f} % after, {_signed(-self.worsening)} points"
            ends = -self.high, -self.low
        return f"{figures} (95 %: {' to '.join(map(_signed, ends))}): {self._told}"

    @property
    def _told(self) -> str:
        match self.verdict:
            case "forgot":
                return "forgot"
            case "no sign":
                return "no sign of forgetting"
        if self.guessed and self.rows >= LEAST_ROWS:
            return "cannot tell, since the model guessed before"
        return "too few rows to tell"

    def as_json(self) -> dict[str, Any]:
        figures = {"before": self.before, "after": self.after, "worsening": self.worsening}
        interval = {"low": self.low, "high": self.high, "p": self.p}
        told = {"verdict": self.verdict, "in_words": self.in_words()}
        return {"rows": self.rows, **figures, **interval, "guessed": self.guessed, **told}


def _signed(share: float) -> str:
    """A share in percent with its sign; 0.0, which has none, where it rounds to that."""
    told = f"{100 * share:+.1f}"
    return told if told.strip("+-0.") else "0.0"


def compare(before: Sequence[Line], after: Sequence[Line], seed: int = 0) -> dict[str, Any]:
    """The changes between two models, from the lines of their general.jsonl.

    Rows with an error on either side are left out, and counted. UserError: the models cut the texts
    into different tokens, so that their perplexities don't compare.
    """
    pairs = list(zip(before, after, strict=True))
    both = [(a, b) for a, b in pairs if "error" not in a and "error" not in b]
    texts = [(a, b) for a, b in both if "nll" in a]
    questions = [(a, b) for a, b in both if "chosen" in a]
    changes = [_of_texts(texts, seed)] if texts else []
    changes += [_of_questions(questions, seed)] if questions else []
    kinds = sum(not change.guessed for change in changes)
    changes = [replace(change, kinds=max(kinds, 1)) for change in changes]
    found: dict[str, Any] = {change.kind: change.as_json() for change in changes}
    if questions:
        right = [(a["chosen"] == a["answer"], b["chosen"] == b["answer"]) for a, b in questions]
        found["questions"]["right_to_wrong"] = right.count((True, False))
        found["questions"]["wrong_to_right"] = right.count((False, True))
    return {"verdict": overall(changes), **found, "failed": len(pairs) - len(both)}


def overall(changes: Sequence[Worsening]) -> Verdict:
    """Forgot if any kind shows it; no sign if no kind leaves a doubt."""
    verdicts = {change.verdict for change in changes}
    if "forgot" in verdicts:
        return "forgot"
    return "no sign" if verdicts == {"no sign"} else "cannot tell"


def _of_texts(pairs: Sequence[tuple[Line, Line]], seed: int) -> Worsening:
    for a, b in pairs:
        if a["tokens"] != b["tokens"]:
            raise UserError(
                f"{a['source']}: {a['tokens']} tokens before, {b['tokens']} after; expected models "
                "with one tokenizer"
            )
    nll_N2 = np.array([(a["nll"], b["nll"]) for a, b in pairs], dtype=np.float64)
    tokens_N = np.array([a["tokens"] for a, _ in pairs], dtype=np.float64)
    if not tokens_N.sum():
        raise UserError("the general texts have one token each; expected longer ones")
    before, after = np.exp(nll_N2.sum(0) / tokens_N.sum()).tolist()
    rng, rise_N = np.random.default_rng(seed), nll_N2[:, 1] - nll_N2[:, 0]
    worsening, low, high = np.expm1(mean_of(rise_N, tokens_N, rng)).tolist()
    p = share_of_swaps(rise_N, rng)
    return Worsening("texts", len(pairs), before, after, worsening, low, high, p)


def _of_questions(pairs: Sequence[tuple[Line, Line]], seed: int) -> Worsening:
    right_N2 = np.array([[x["chosen"] == x["answer"] for x in pair] for pair in pairs], np.float64)
    chance_N = np.array([1 / len(a["logprobs"]) for a, _ in pairs], dtype=np.float64)
    before, after = right_N2.mean(0).tolist()
    rng, one_N, fall_N = np.random.default_rng(seed), np.ones(len(pairs)), -np.diff(right_N2)[:, 0]
    fall, p = mean_of(fall_N, one_N, rng), share_of_swaps(fall_N, rng)
    _, low, _ = mean_of(right_N2[:, 0] - chance_N, one_N, np.random.default_rng(seed))
    return Worsening("questions", len(pairs), before, after, *fall, p, guessed=low <= 0)


def mean_of(
    values_N: Figures, weights_N: Figures, rng: np.random.Generator
) -> tuple[float, float, float]:
    """sum(values) / sum(weights), and the ends of its 95 % interval by a percentile bootstrap over
    rows."""
    sums_R2 = resampled(np.stack([values_N, weights_N], axis=1), rng, RESAMPLES)
    low_1, high_1 = interval(divided(sums_R2))  # all of a resample's texts may have one token
    return float(values_N.sum() / weights_N.sum()), float(low_1[0]), float(high_1[0])


def share_of_swaps(worse_N: Figures, rng: np.random.Generator) -> float:
    """The share of random sign changes of the rows under which their sum is as large."""
    n, rounding = len(worse_N), 1e-9 * float(np.abs(worse_N).sum())
    as_large, at_once = 0, max(1, _AT_ONCE // n)
    for begin in range(0, FLIPS, at_once):
        flipped_RN = rng.integers(0, 2, (min(at_once, FLIPS - begin), n), dtype=np.int8) == 1
        # The sum is as large as the one found where the rows that changed sign add up to 0 or less.
        as_large += int((flipped_RN @ worse_N <= rounding).sum())
    return (1 + as_large) / (1 + FLIPS)
