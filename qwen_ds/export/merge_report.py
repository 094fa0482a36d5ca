"""The report of a merge: `merge_report.json` in the output, and a few lines for the screen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_ds.disk.digest import REPORT_NAME
from qwen_ds.disk.write import write_json
from qwen_ds.export.output_place import rejected_name
from qwen_ds.export.proof.verify import Verification
from qwen_ds.export.qwen2.tokenizer_check import TokenizerCheck
from qwen_ds.export.stream.shard import ChangedTensor


@dataclass(frozen=True, slots=True)
class MergeReport:
    """The fields of `merge_report.json`."""

    base: str
    adapters: list[str]
    weights: Sequence[float] | None
    output: str
    format: str
    dtype: str
    changed: dict[str, ChangedTensor]
    """Tensor of the base -> kind ("lora", "dora", "saved", "rows", and how several adapters
    combine), and the Frobenius norms of the base's tensor and of its change, as stored."""
    untouched: int  # number of the base's tensors whose bytes are in the output as they were
    converted: int  # number of the base's tensors that only changed their dtype
    left_out: list[str]  # the base's tensors that the output's format has no place for
    edits: dict[str, str]  # small file -> what was changed in it
    inputs: dict[str, dict[str, Any]]  # file name -> bytes and sha256, of weights as they passed by
    outputs: dict[str, dict[str, Any]]  # file name -> bytes and sha256
    seconds: float  # time that the output took, without its proof
    warnings: list[str]  # possible mistakes, a line each
    tokenizer: TokenizerCheck | None = None
    """Whether the converted tokenizer agrees with the base's; None when it was not converted."""
    verification: Verification | None = None  # None when it was not asked for

    @property
    def rejected(self) -> bool:
        disproved = self.verification is not None and self.verification.status == "failed"
        return disproved or (self.tokenizer is not None and not self.tokenizer.passed)

    @property
    def folder(self) -> Path:
        """The folder of the merged model."""
        return rejected_name(Path(self.output)) if self.rejected else Path(self.output)

    def write(self, folder: Path) -> None:
        """Write the report, with null for a figure that is not a number, as in a failed proof."""
        found = json.loads(json.dumps(asdict(self)), parse_constant=lambda constant: None)
        write_json(folder / REPORT_NAME, found)

    def in_words(self) -> list[str]:
        """A few lines for the screen."""
        size = sum(facts["bytes"] for facts in self.outputs.values())
        lines = [
            f"{self.folder}: {size / 1e9:.2f} GB in {self.seconds:.1f} s; {len(self.changed)}"
            f" tensors changed, {self.converted} converted, {self.untouched} untouched"
        ]
        if self.left_out:
            lines.append(f"  left out: {len(self.left_out)} tensors, {self.left_out[0]} first")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        lines += [f"  {name}: {what}" for name, what in self.edits.items()]
        if self.tokenizer is not None:
            lines += [f"  {line}" for line in self.tokenizer.in_words()]
        proof = ["  not verified"] if self.verification is None else self.verification.in_words()
        return lines + proof
