"""TensorBoard's files of a run: curves, samples as text, lengths as histograms, the HParams tab.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from qwen_ds.train.observe.evaluation import Sample
from qwen_ds.train.observe.writers import Ending, TrackedRun

# Sorts before the file of the curves, which is made later: TensorBoard reads a folder's files in
# the order of their names and never goes back.
_SETTINGS_SUFFIX = ".hparams"


class Board:
    """A Writer into the run folder's tensorboard/.

    A resumed run takes back the points after its checkpoint. The settings have a file of their own,
    which each start replaces: TensorBoard keeps the first settings that it reads of a run, and
    those of a resumed run may be others.
    """

    run_id = None  # the folder is enough

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._folder = run.folder / "tensorboard"

    def start(self) -> str:
        self._folder.mkdir(exist_ok=True)
        for old in self._folder.glob(f"*{_SETTINGS_SUFFIX}"):
            old.unlink()
        # TensorBoard shows the last points of these curves beside the settings.
        shown = dict.fromkeys(("train/loss", "eval/loss"), 0.0)
        experiment, session, self._session_end = hparams(self._run.settings, shown)
        with SummaryWriter(str(self._folder), filename_suffix=_SETTINGS_SUFFIX) as settings:
            for part in (experiment, session):
                settings.file_writer.add_summary(part)
        first = self._run.first_step
        # Points from this step on are taken back. A fresh run takes back all of a start that was
        # killed before its first checkpoint.
        self._board = SummaryWriter(str(self._folder), purge_step=first + 1 if first else 0)
        return ""

    def lengths(self, values: Mapping[str, np.ndarray]) -> None:
        for tag, lengths_N in values.items():
            self._board.add_histogram(tag, lengths_N, 0)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)
        self._board.flush()

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        for i, sample in enumerate(samples):
            self._board.add_text(f"samples/{i + 1}", sample.as_markdown(), step)

    def close(self, ending: Ending) -> None:
        if ending == "finished" and (file := self._board.file_writer):
            file.add_summary(self._session_end)
        self._board.close()
