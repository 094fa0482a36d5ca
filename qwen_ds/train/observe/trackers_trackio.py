"""trackio as a writer of a run's numbers.

Shapes: N rows.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

import numpy as np
import trackio

from qwen_ds.train.observe.evaluation import Sample
from qwen_ds.train.observe.writers import PROJECT, Ending, TrackedRun


class TrackioRun:
    """A Writer into a trackio run, by the library's own variables.

    It is local unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says otherwise. trackio knows a run by
    its name alone, so the name gets an ending that no other run has.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self.run_id = run.known_as.get("trackio") or f"{run.name}-{secrets.token_hex(3)}"

    def start(self) -> str:
        self._trackio = trackio.init(
            project=self._run.project or PROJECT,
            name=self.run_id,
            resume="allow",
            config=dict(self._run.settings),
            embed=False,
        )
        return ""  # it says by itself where the run is

    def lengths(self, values: Mapping[str, np.ndarray]) -> None:
        found = {tag: trackio.Histogram(lengths_N.tolist()) for tag, lengths_N in values.items()}
        self._trackio.log(found, step=0)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        values = {
            f"samples/{i + 1}": trackio.Markdown(sample.as_markdown())
            for i, sample in enumerate(samples)
        }
        self._trackio.log(values, step=step)

    def close(self, ending: Ending) -> None:
        self._trackio.finish()
