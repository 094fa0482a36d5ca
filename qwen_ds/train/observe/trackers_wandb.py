"""Weights & Biases as a writer of a run's numbers.

Shapes: N rows.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

import numpy as np
import wandb

from qwen_ds.train.observe.evaluation import Sample
from qwen_ds.train.observe.writers import PROJECT, Ending, TrackedRun

# By itself it waits for ever for a network that is gone, also at the end of the process.
_SECONDS_AT_END = 45.0


class WandbRun:
    """A Writer into a W&B run, by the library's own login, variables and files.

    Without a login it writes into the run folder, as WANDB_MODE=offline does; `wandb sync` uploads
    that. A resumed run continues the run of the same id.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self.run_id = run.known_as.get("wandb") or secrets.token_hex(4)

    def start(self) -> str:
        # Its lines would come between ours: `start` returns the one that matters.
        quiet = wandb.Settings(silent=True, console="off")
        asked = wandb.setup(settings=quiet).settings
        quiet.finish_timeout = asked.finish_timeout or _SECONDS_AT_END
        quiet.finish_timeout_raises = True
        logged_in = asked.mode != "online" or wandb.login(prompt=False)
        # Of the library's own choice where the user has made one.
        elsewhere = asked.root_dir != wandb.Settings().root_dir
        self._wandb = wandb.init(
            project=self._run.project or asked.project or PROJECT,
            name=asked.run_name or self._run.name,
            id=self.run_id,
            resume="allow",
            # DeepSpeed's own monitor may have a run of its own in this process.
            reinit="create_new",
            dir=None if elsewhere else str(self._run.folder),
            config=dict(self._run.settings),
            mode=None if logged_in else "offline",
            settings=quiet,
        )
        if self._wandb.offline:
            why = "" if logged_in else "not logged in; "
            return f"{self._wandb.settings.sync_dir} ({why}`wandb sync` uploads it)"
        return self._wandb.url or ""

    def lengths(self, values: Mapping[str, np.ndarray]) -> None:
        found = {tag: wandb.Histogram(lengths_N.tolist()) for tag, lengths_N in values.items()}
        self._wandb.log(found, step=0)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._wandb.log(dict(values), step=step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        rows = [[sample.prompt, sample.answer, sample.reference] for sample in samples]
        table = wandb.Table(columns=["prompt", "answer", "reference"], data=rows)
        self._wandb.log({"samples": table}, step=step)

    def close(self, ending: Ending) -> None:
        self._wandb.finish(exit_code=0 if ending == "finished" else 1)
