"""MLflow as a writer of a run's numbers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import mlflow
import numpy as np
from mlflow.entities import Metric, Param
from mlflow.environment_variables import MLFLOW_ALLOW_FILE_STORE, MLFLOW_EXPERIMENT_NAME

from qwen_ds.train.observe.evaluation import Sample
from qwen_ds.train.observe.writers import PROJECT, Ending, TrackedRun

_STATES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowRun:
    """A Writer into an MLflow run, by the library's own variables.

    Without MLFLOW_TRACKING_URI it writes into the run folder's mlruns/. A resumed run continues the
    run of the same id, with the settings that it began with: MLflow lets none change.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._run, self.run_id = run, run.known_as.get("mlflow")

    def start(self) -> str:
        if not MLFLOW_ALLOW_FILE_STORE.is_set():
            # MLflow refuses its plain files unless they are asked for, as they are here; its other
            # local store needs SQLAlchemy, which mlflow-skinny does not bring.
            MLFLOW_ALLOW_FILE_STORE.set(True)
        uri = mlflow.get_tracking_uri()
        if not mlflow.is_tracking_uri_set():
            uri = (self._run.folder / "mlruns").resolve().as_uri()
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        if self.run_id is not None:
            self._client.update_run(self.run_id, status="RUNNING")
            return f"{uri}, run {self.run_id}"
        name = self._run.project or MLFLOW_EXPERIMENT_NAME.get() or PROJECT
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        created = self._client.create_run(experiment, run_name=self._run.name)
        self.run_id = created.info.run_id
        settings = [Param(key, str(value)) for key, value in self._run.settings.items()]
        self._client.log_batch(self.run_id, params=settings)
        return f"{uri}, run {self.run_id}"

    def lengths(self, values: Mapping[str, np.ndarray]) -> None:
        """It has no histograms."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        assert self.run_id is not None
        now = int(time.time() * 1000)
        points = [Metric(tag, value, now, step) for tag, value in values.items()]
        self._client.log_batch(self.run_id, metrics=points)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Not sent: texts would be artifacts, whose store may need packages of its own."""

    def close(self, ending: Ending) -> None:
        assert self.run_id is not None
        self._client.set_terminated(self.run_id, _STATES[ending])
