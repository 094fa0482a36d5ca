"""The verdict on a run in words: a list of sentences, each by a rule that docs/report.md states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from qwen_ds.page.html import count
from qwen_ds.report.evaluations import Evaluation, ScoreTable, is_better
from qwen_ds.report.folder import RunFiles, number, series

Severity = Literal["good", "note", "warn", "stop"]
SEVERITIES: tuple[Severity, ...] = ("good", "note", "warn", "stop")

ENDS = 0.1  # share of the logged steps that counts as a run's start or end
LEVEL = 0.01  # a smaller relative change is none
OVERFITTING = 0.02  # relative rise above the best evaluation loss
BY_HEART = 0.02  # nats a token
CUT = 0.01  # share of rows
CLIPPED = 0.5  # share of logged steps
STOPS = 0.99  # share of answers


class Sentence(NamedTuple):
    """One sentence of the verdict."""

    text: str
    severity: Severity


def verdict(run: RunFiles, tables: Sequence[ScoreTable] = ()) -> list[Sentence]:
    """The sentences on a run, the one on its loss first."""
    listed = run.reader.listed
    return [
        *([] if run.is_finished else [Sentence(_unfinished(run), "warn")]),
        *listed("metrics.jsonl", lambda: _loss(run)),
        *listed("data_report.json", lambda: _data(run)),
        *listed("data_report.json", lambda: _findings(run)),
        *listed("metrics.jsonl", lambda: _steps(run)),
        *(sentence for table in tables for sentence in _scores(table)),
    ]


def worst(sentences: Sequence[Sentence]) -> Severity:
    return max((each.severity for each in sentences), key=SEVERITIES.index, default="note")


def short(value: float) -> str:
    """A loss or a score in three digits: 2.31, 0.124, 12.3."""
    return f"{value:.3g}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _unfinished(run: RunFiles) -> str:
    last = int(run.steps[-1]["step"]) if run.steps else 0
    return f"The run is not finished: {count(last, 'step')} so far."


def _loss(run: RunFiles) -> list[Sentence]:
    _, losses = series(run.steps, "loss")
    if not losses:
        return [Sentence("No step with a loss is on record.", "warn")]
    edge = max(1, round(len(losses) * ENDS))
    first, last = sum(losses[:edge]) / edge, sum(losses[-edge:]) / edge
    steps, evals = series(run.evals, "eval_loss")
    found = [_evaluated(steps, evals)] if len(evals) > 1 else []
    trained = f"from {short(first)} to {short(last)}"
    if len(losses) > 1 and last > first * (1 - LEVEL):
        found.append(
            Sentence(
                f"Training loss did not fall ({trained}): look at the learning rate and the data.",
                "warn",
            )
        )
    elif len(evals) > 1:
        found.append(Sentence(f"Training loss fell {trained}.", "good"))
    elif evals:
        found.append(
            Sentence(
                f"Training loss fell {trained}; the one evaluation, after step {steps[0]:g}, gave "
                f"{short(evals[0])}: eval.every_steps makes a curve of it.",
                "note",
            )
        )
    else:
        found.append(
            Sentence(
                f"Training loss fell {trained}. No rows were set aside for evaluation, so nothing "
                "tells whether that holds for new text: data.eval or data.eval_fraction.",
                "note",
            )
        )
    if last < BY_HEART:
        text = f"Training loss is near 0 ({short(last)}): the rows are known by heart."
        found.append(Sentence(text, "note"))
    unknown = len(run.evals) - len(evals)
    if unknown:
        text = f"{count(unknown, 'evaluation')} gave a loss that is not finite."
        found.append(Sentence(text, "stop"))
    return found


def _evaluated(steps: Sequence[float], losses: Sequence[float]) -> Sentence:
    """The sentence on two or more evaluation losses."""
    best = min(range(len(losses)), key=losses.__getitem__)
    first, last = losses[0], losses[-1]
    at = f"at step {steps[best]:g}"
    rise = (last - losses[best]) / losses[best] if losses[best] else 0.0
    what = "Loss on the evaluation rows"
    risen = f"it has risen by {percent(rise)} since, to {short(last)}: overfitting"
    if best == 0:
        if rise <= OVERFITTING:
            return Sentence(f"{what} stayed level, at {short(first)}.", "warn")
        return Sentence(
            f"{what} was best at its first value, {short(first)} {at}; {risen}.", "warn"
        )
    fell = f"{what} fell from {short(first)} to {short(losses[best])}, best {at}"
    if rise > OVERFITTING:
        return Sentence(
            f"{fell}; {risen}. The checkpoint named in the file “best” is the better one.", "warn"
        )
    if best < len(losses) - 1:
        return Sentence(f"{fell}, and has been level since.", "good")
    drop = (losses[-2] - last) / losses[-2]
    if drop > LEVEL:
        return Sentence(f"{fell}; still falling at the end: more steps may help.", "good")
    return Sentence(f"{fell}; level at the end.", "good")


def _data(run: RunFiles) -> list[Sentence]:
    total = run.data.get("total")
    if not isinstance(total, dict):
        return []
    read, found = total["read"], []
    words = {"truncated": "cut", "dropped": "dropped", "skipped": "not readable and skipped"}
    for key, word in words.items():
        reasons = total[key]
        rows = sum(tally["rows"] for tally in reasons.values())
        if not rows:
            continue
        why = ", ".join(f"{reason}: {tally['rows']:,}" for reason, tally in reasons.items())
        share = f"{count(rows, 'row')} of {read:,} ({percent(rows / read)})"
        text = f"{share} {_were(rows)} {word} ({why})."
        found.append(Sentence(text, "warn" if rows > CUT * read else "note"))
    duplicates = run.data.get("duplicates") or 0
    if duplicates and not run.data.get("findings"):  # the data check names them, too
        verb = "duplicates" if duplicates == 1 else "duplicate"
        text = f"{count(duplicates, 'row')} {verb} an earlier one."
        found.append(Sentence(text, "warn" if duplicates > CUT * read else "note"))
    return found


def _were(things: int) -> str:
    return "was" if things == 1 else "were"


def _findings(run: RunFiles) -> list[Sentence]:
    found = run.data.get("findings") or []
    words: dict[Severity, str] = {"warn": "defects", "stop": "grave defects"}
    sentences = []
    for severity, word in words.items():
        named = [
            f"{each['finding']} ({each['count']:,})"
            for each in found
            if each["severity"] == severity
        ]
        if named:
            text = f"The data check found {word}: {', '.join(named)}."
            sentences.append(Sentence(text, severity))
    return sentences


def _steps(run: RunFiles) -> list[Sentence]:
    found = []
    skipped = number(run.outcome, "skipped") or 0
    if skipped:
        text = f"{count(int(skipped), 'step')} had nothing to learn and left the weights alone."
        found.append(Sentence(text, "warn"))
    overflows = [n for row in run.steps if (n := number(row, "fp16_overflows")) is not None]
    if overflows:
        steps = int(overflows[-1])
        text = f"{count(steps, 'step')} overflowed in fp16 and {_were(steps)} left out."
        found.append(Sentence(text, "note"))
    bound = number(_section(run, "optim"), "max_grad_norm")
    _, norms = series(run.steps, "grad_norm")
    clipped = sum(norm > bound for norm in norms) / len(norms) if bound and norms else 0.0
    if clipped > CLIPPED:
        where = f"In {percent(clipped)} of the logged steps"
        text = f"{where} the gradient was clipped (optim.max_grad_norm {bound:g})."
        found.append(Sentence(text, "note"))
    patience = number(_section(run, "eval"), "patience")
    _, losses = series(run.evals, "eval_loss")
    if patience and losses and len(losses) - 1 - losses.index(min(losses)) >= patience:
        times = count(int(patience), "evaluation")
        text = f"It stopped early, after {times} without a better loss (eval.patience)."
        found.append(Sentence(text, "note"))
    return found


def _section(run: RunFiles, name: str) -> dict[str, object]:
    section = run.recipe.get(name)
    return section if isinstance(section, dict) else {}


def _scores(table: ScoreTable) -> list[Sentence]:
    """On each evaluation after the first whether it differs from the first, and who never stops."""
    first, found = table.evaluations[0], []
    for other, paired in zip(table.evaluations[1:], table.verdicts, strict=True):
        name = other.main
        before, after = first.scores.get(name), other.scores[name]
        if before is None or before.value is None or after.value is None:
            continue
        change = f"{name} {short(before.value)} ({first.model}) against"
        change += f" {short(after.value)} ({other.model})"
        where = f" on {table.data}" if table.data else ""
        told = paired.get(name)
        if told is None:
            found.append(Sentence(f"Scores{where}: {change}; not compared row by row.", "note"))
        elif not told.is_significant:
            found.append(Sentence(f"Scores{where}: {change}, no significant difference.", "note"))
        else:
            better = is_better(name, told.difference)
            text = (
                f"Scores{where}: {change}, {'better' if better else 'worse'} (p {p_value(told.p)})."
            )
            found.append(Sentence(text, "good" if better else "warn"))
    return found + [each for e in table.evaluations if not e.is_base for each in _answers(e)]


def p_value(p: float) -> str:
    return "≤ 0.001" if p <= 0.001 else f"= {p:.2g}"


def _answers(evaluation: Evaluation) -> list[Sentence]:
    found = []
    stops = evaluation.scores.get("stop_rate")
    if stops is not None and stops.value is not None and stops.value < STOPS:
        share = percent(1 - stops.value)
        text = f"{share} of the answers of {evaluation.model} do not stop by themselves."
        found.append(Sentence(text, "warn"))
    empty = int(number(evaluation.report, "empty_predictions") or 0)
    if empty:
        text = (
            f"{count(empty, 'answer')} of {evaluation.model} {'is' if empty == 1 else 'are'} empty."
        )
        found.append(Sentence(text, "warn"))
    return found


def speed(run: RunFiles) -> float | None:
    """Tokens per second over all logged steps."""
    tokens = seconds = 0.0
    for row in run.steps:
        rate, took = number(row, "tokens_per_second"), number(row, "seconds")
        if rate is not None and took is not None:
            tokens, seconds = tokens + rate * took, seconds + took
    return tokens / seconds if seconds else None
