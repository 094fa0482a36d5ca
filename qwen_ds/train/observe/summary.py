"""A whole run in one line."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class RunSummary:
    """Totals of a run, over all its starts. Checkpoints hold it, so a resumed run adds to it."""

    steps: int = 0
    first_loss: float | None = None  # nats per target token, as the two below
    last_loss: float | None = None
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    skipped: int = 0
    overflows: int = 0
    stopped_by: str | None = None
    """Why the run ended before its last step; the same command resumes it."""
    out_of_patience: bool = False

    def __str__(self) -> str:
        rate = self.tokens / max(self.seconds, 1e-9)
        text = f"{self.steps} steps in {self.seconds:.0f} s, {rate:,.0f} tokens/s; "
        if self.first_loss is not None and self.last_loss is not None:
            text += f"loss {self.first_loss:.3f} -> {self.last_loss:.3f}"
        if self.eval_losses:
            first, last = self.eval_losses[0][1], self.eval_losses[-1][1]
            text += f"; evaluation loss {first:.3f} -> {last:.3f}"
        if self.out_of_patience:
            text += " (stopped early: eval.patience)"
        if self.skipped:
            text += f"; {self.skipped} steps had nothing to learn"
        if self.overflows:
            text += f"; {self.overflows} fp16 overflows"
        return text
