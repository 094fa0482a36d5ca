"""The scores that a model card tells: those of this very model, known by the checksums of weights,
and those of its base beside them where both are of the same rows.

A run's folder may hold scores of its base, of other checkpoints and of models of the same name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ds.disk.adapter_folder import WEIGHTS_NAME
from qwen_ds.disk.digest import model_sha256, sha256_once
from qwen_ds.disk.read import read_json
from qwen_ds.errors import UserError

_OF_DRAWING = ("temperature", "top_p", "top_k")
_TOLD = ("do_sample", *_OF_DRAWING, "min_p", "seed", "max_new_tokens", "num_beams", "json_schema")
_NO_CHANGE = {"repetition_penalty": 1.0}


@dataclass(frozen=True, slots=True)
class VeryModel:
    """A model and its origin, by their checksums."""

    base: Path
    adapters: Sequence[Path]
    is_plain: bool  # at most one adapter, with no weight of its own, and no dtype changed
    own_sha256: str | None = None  # of the output; None: it has no weights of a model
    base_sha256: str | None = None  # None: it is found when it is needed

    def is_shown_by(self, report: Mapping[str, Any]) -> bool:
        """Whether an evaluation was of this model, merged or as base and adapter."""
        told = report.get("model_sha256")
        if told is None:
            return False
        if not report.get("adapter"):
            return told == self.own_sha256 or (not self.adapters and told == self._base())
        if not self.is_plain or not self.adapters:
            return False
        weights = self.adapters[0] / WEIGHTS_NAME
        is_adapter = weights.is_file() and report.get("adapter_sha256") == sha256_once(weights)
        return is_adapter and told == self._base()

    def is_before(self, report: Mapping[str, Any]) -> bool:
        """Whether an evaluation was of the base, before the adapters."""
        told, is_bare = report.get("model_sha256"), not report.get("adapter")
        return told is not None and is_bare and bool(self.adapters) and told == self._base()

    def _base(self) -> str | None:
        return self.base_sha256 or model_sha256(self.base)


def evaluations_of(run: Path, model: VeryModel, by: str) -> list[dict[str, Any]]:
    """The evaluations in a run's folder that are of this model, as the card's template has them.

    Args:
        by: name of the model in words.
    """
    found = {
        file: report for file in sorted(run.glob("**/metrics.json")) if (report := _read(file))
    }
    before = [report for report in found.values() if model.is_before(report)]
    return [
        _told(file.relative_to(run).as_posix(), report, _same_rows(before, report), by)
        for file, report in found.items()
        if model.is_shown_by(report)
    ]


def _read(file: Path) -> dict[str, Any] | None:
    """A report with scores; None for any other file of the name."""
    try:
        report = read_json(file)
    except UserError:
        return None
    return report if isinstance(report.get("signatures"), dict) and _scores(report) else None


def _same_rows(before: Sequence[dict[str, Any]], report: dict[str, Any]) -> dict[str, Any] | None:
    keys = ("data", "rows", "sampling")
    return next((one for one in before if all(one.get(k) == report.get(k) for k in keys)), None)


def _told(
    place: str, report: dict[str, Any], before: dict[str, Any] | None, by: str
) -> dict[str, Any]:
    after, sampling = _scores(report), report.get("sampling")
    old = {} if before is None else _scores(before, report["signatures"])
    data = ", ".join(Path(str(path)).name for path in report.get("data") or [])
    return {
        "what": f"{place}: {report.get('rows')} rows{f' of {data}' if data else ''} by {by}",
        "sampling": sampling_in_words(sampling if isinstance(sampling, dict) else {}),
        "has_before": before is not None,
        "rows": [
            (name, old.get(name), value, _interval(report, name)) for name, value in after.items()
        ],
    }


def sampling_in_words(sampling: Mapping[str, Any]) -> str:
    """How the answers were made: what metrics.json tells, less the options that changed nothing."""
    beams = sampling.get("num_beams", 1)
    if sampling.get("do_sample"):
        names = [name for name in _OF_DRAWING if name in sampling]
        if sampling.get("min_p"):  # 0 drops nothing
            names.append("min_p")
        told = [f"drawn with {name} {sampling[name]}" for name in names[:1]] or ["drawn"]
        told += [f"{name} {sampling[name]}" for name in (*names[1:], "seed") if name in sampling]
    else:
        told = ["greedy" if beams == 1 else f"the best of {beams} beams"]
    if "max_new_tokens" in sampling:
        told.append(f"at most {sampling['max_new_tokens']} new tokens")
    for name, value in sampling.items():
        if name == "json_schema" and value:
            told.append("held to a JSON schema")  # the value may be a place on someone's disk
        elif name not in _TOLD and value and value != _NO_CHANGE.get(name):
            told.append(f"{name} {json.dumps(value, ensure_ascii=False)}")
    return ", ".join(told)


def _interval(report: Mapping[str, Any], name: str) -> str:
    found = (report.get("intervals") or {}).get(name)
    return f"{found[0]:.4f} to {found[1]:.4f}" if isinstance(found, list) else ""


def _scores(
    report: Mapping[str, Any], signatures: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Scores by full name, of precision, recall and F the last; where `signatures` are given, those
    that were computed in the same way."""
    found: dict[str, float] = {}
    for name, told in report["signatures"].items():
        if signatures is not None and signatures.get(name) != told:
            continue
        value = report.get(name)
        inner = value if isinstance(value, dict) else {"": value}
        for key, one in inner.items():
            number = one.get("f") if isinstance(one, dict) else one
            if isinstance(number, int | float):
                found[f"{name}.{key}".rstrip(".")] = float(number)
    return found
