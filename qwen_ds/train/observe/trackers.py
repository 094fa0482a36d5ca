"""The writers that a run asks for by name: each library is imported only when it is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwen_ds.train.observe.tensorboard import Board
from qwen_ds.train.observe.writers import Guarded, InBackground, TrackedRun, Writer, Writers


def open_writers(run: TrackedRun, trackers: Sequence[str]) -> Writers:
    """TensorBoard's files, and a run of each tracker of log.trackers, which begins in the
    background. None of them raises."""
    writers = [Guarded("TensorBoard", lambda: Board(run))]
    for name in dict.fromkeys(trackers):
        writers.append(InBackground(name, _maker(name, run), run.known_as.get(name)))
    return Writers(writers)


def _maker(name: str, run: TrackedRun) -> Callable[[], Writer]:
    def make() -> Writer:
        if name == "wandb":
            from qwen_ds.train.observe.trackers_wandb import WandbRun

            return WandbRun(run)
        if name == "swanlab":
            from qwen_ds.train.observe.trackers_swanlab import SwanlabRun

            return SwanlabRun(run)
        if name == "mlflow":
            from qwen_ds.train.observe.trackers_mlflow import MlflowRun

            return MlflowRun(run)
        assert name == "trackio", name
        from qwen_ds.train.observe.trackers_trackio import TrackioRun

        return TrackioRun(run)

    return make
