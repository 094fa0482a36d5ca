"""SwanLab as a writer of a run's numbers."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import swanlab

from qwen_ds.train.observe.evaluation import Sample
from qwen_ds.train.observe.writers import PROJECT, Ending, TrackedRun

_ALPHABET = string.ascii_lowercase + string.digits
_STATES = {"finished": "success", "stopped": "aborted", "failed": "crashed"}


class SwanlabRun:
    """A Writer into a SwanLab run, by the library's own login, variables and files.

    Without a login it writes into the run folder, as SWANLAB_MODE=offline does; `swanlab sync`
    uploads that. A resumed run continues the run of the same id.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        fresh = "".join(secrets.choice(_ALPHABET) for _ in range(21))
        self.run_id = run.known_as.get("swanlab") or fresh

    def start(self) -> str:
        asked = swanlab.Settings()
        logged_in = asked.mode != "online" or asked.api_key is not None
        is_default = asked.log_dir.resolve() == Path("swanlog").resolve()
        # In a thread other than the main one it leaves Ctrl-C to us (InBackground).
        self._swanlab = swanlab.init(
            project=self._run.project or asked.project.name or PROJECT,
            name=asked.experiment.name or self._run.name,
            id=self.run_id,
            resume="allow",
            log_dir=str(self._run.folder / "swanlog") if is_default else None,
            config=dict(self._run.settings),
            mode=None if logged_in else "offline",
            # The terminal stays ours.
            settings=swanlab.Settings(interactive=False, terminal={"proxy_type": "none"}),
        )
        return ""  # it says by itself where the run is

    def lengths(self, values: Mapping[str, np.ndarray]) -> None:
        """It has no histograms."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._swanlab.log(dict(values), step=step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        texts = [f"{s.prompt}\n\n{s.answer}\n\n({s.reference})" for s in samples]
        self._swanlab.log({"samples": [swanlab.Text(text) for text in texts]}, step=step)

    def close(self, ending: Ending) -> None:
        state = _STATES[ending]
        error = "see the run's logs/" if state == "crashed" else None
        self._swanlab.finish(state=state, error=error)
