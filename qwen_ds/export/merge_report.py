"""What a merge says of itself: `merge_report.json` in the output, and a few lines for the screen."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_ds.export.base_check import doubts
from qwen_ds.export.merge_plan import Plan
from qwen_ds.export.proof.verify import Verification
from qwen_ds.export.qwen2.tokenizer_check import TokenizerCheck
from qwen_ds.export.stream.shard import ChangedTensor

REPORT_NAME = "merge_report.json"


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was done; `merge_report.json` in the output holds the same.

    Attributes:
        changed: tensor of the base -> kind ("lora", "dora", "saved", "rows", and how several adapters combine), and the
            Frobenius norms of the base's tensor and of its change, both of the values as stored.
        untouched: number of the base's tensors whose bytes are in the output as they were.
        converted: number of the base's tensors that only changed their dtype.
        left_out: the base's tensors that the output's format has no place for.
        taken_over: weight files that a killed merge had finished.
        edits: small file -> what was changed in it.
        inputs, outputs: file name -> bytes and sha256, of weights as they passed by.
        seconds: what the output took, without its proof.
        warnings: what may be a mistake, a line each.
        tokenizer: whether the converted tokenizer agrees with the base's; None when it was not converted.
        verification: None when it was not asked for.
    """

    base: str
    adapters: list[str]
    weights: list[float] | None
    output: str
    format: str
    dtype: str
    changed: dict[str, ChangedTensor]
    untouched: int
    converted: int
    left_out: list[str]
    taken_over: list[str]
    edits: dict[str, str]
    inputs: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Any]]
    seconds: float
    warnings: list[str]
    tokenizer: TokenizerCheck | None = None
    verification: Verification | None = None

    @property
    def rejected(self) -> bool:
        disproved = self.verification is not None and self.verification.status == "failed"
        return disproved or (self.tokenizer is not None and not self.tokenizer.passed)

    @property
    def folder(self) -> Path:
        """Where the merged model lies."""
        return rejected_name(Path(self.output)) if self.rejected else Path(self.output)

    def as_json(self) -> dict[str, Any]:
        """As JSON, which has no word for a figure that is not a number (of a proof that failed on it): null."""
        return dict(_without_nan(asdict(self)))

    def in_words(self) -> list[str]:
        """A few lines for the screen."""
        size = sum(facts["bytes"] for facts in self.outputs.values())
        lines = [
            f"{self.folder}: {size / 1e9:.2f} GB in {self.seconds:.1f} s; {len(self.changed)} tensors changed,"
            f" {self.converted} converted, {self.untouched} untouched"
        ]
        if self.taken_over:
            lines.append(
                f"  {len(self.taken_over)} files were there already, from a merge that had been stopped"
            )
        if self.left_out:
            lines.append(f"  left out: {len(self.left_out)} tensors, {self.left_out[0]} first")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        lines += [f"  {name}: {what}" for name, what in self.edits.items()]
        lines += [
            f"  {line}"
            for line in (self.tokenizer.in_words() if self.tokenizer is not None else ())
        ]
        return [
            *lines,
            *(
                self.verification.in_words()
                if self.verification is not None
                else ["  not verified"]
            ),
        ]


def describe(
    plan: Plan,
    output: Path,
    changed: dict[str, ChangedTensor],
    taken_over: list[str],
    edits: dict[str, str],
    inputs: dict[str, dict[str, Any]],
    outputs: dict[str, dict[str, Any]],
    seconds: float,
) -> MergeReport:
    """The report of a merge before its proof."""
    stored, kept = (
        plan.base.tensors,
        {rows.tensor for blocks in plan.layout.values() for rows in blocks},
    )
    converted = {
        rows.tensor
        for name, spec in plan.tensors.items()
        for rows in plan.layout[name]
        if spec.dtype != stored[rows.tensor].dtype and rows.tensor not in changed
    }
    return MergeReport(
        base=str(plan.base.folder),
        adapters=[str(adapter.folder) for adapter in plan.adapters.members],
        weights=None if plan.adapters.weights is None else list(plan.adapters.weights),
        output=str(output),
        format=plan.format.name,
        dtype=plan.dtype,
        changed=changed,
        untouched=len(kept) - len(changed) - len(converted),
        converted=len(converted),
        left_out=sorted(stored.keys() - kept),
        taken_over=taken_over,
        edits=edits,
        inputs=inputs,
        outputs=outputs,
        seconds=seconds,
        warnings=doubts(plan.base.folder, plan.adapters.members),
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rejected_name(output: Path) -> Path:
    """Where an output lies that failed its proof."""
    return output.with_name(output.name + ".rejected")
