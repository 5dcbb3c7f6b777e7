"""MLflow: parameters, metrics, data sets, checkpoints as logged models, and a registered model with an alias."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from preftune.core.events import CheckpointSaved, EvalDone, Event, Noted, StageFinished, StepDone
from preftune.tracking.base import RunFacts, Status, flat, sinks

TAG = "preftune.run"
LONGEST_PARAM = 6000  # MLflow's limit
BATCH = 100
STATUS: dict[Status, str] = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


@sinks.register("mlflow")
@dataclass(slots=True)
class Mlflow:
    """One MLflow run a preftune run; a resumed run goes on with its own.

    Parameters
        uri: of the tracking server or database, such as ``sqlite:///mlflow.db``; empty for ``MLFLOW_TRACKING_URI`` or
            MLflow's default. experiment: created where it does not exist.
        upload: which model folders are copied into MLflow's artifacts: of no stage, of its ``final`` model, or of every
            checkpoint too. A checkpoint that is not copied is a logged model with its path as a tag.
        register: name in the registry that the last stage's final model becomes a version of; none where empty.
        alias: that is moved to that version.
    """

    uri: str = ""
    experiment: str = "preftune"
    upload: Literal["none", "final", "all"] = "final"
    register: str = ""
    alias: str = "candidate"
    _run: RunFacts | None = field(default=None, init=False, repr=False)
    _client: Any = field(default=None, init=False, repr=False)
    _experiment_id: str = field(default="", init=False, repr=False)
    _run_id: str = field(default="", init=False, repr=False)
    _waiting: list[tuple[int, dict[str, float]]] = field(default_factory=list, init=False, repr=False)

    def missing(self) -> str:
        """The package."""
        return "" if find_spec("mlflow") else "the package mlflow is not installed"

    def way_out(self) -> str:
        """Its extra."""
        return "pip install 'preftune[mlflow]', or drop it from tracking"

    def begin(self, run: RunFacts) -> None:
        """Find or create the run; write parameters and data sets."""
        from mlflow import MlflowClient

        self._run = run
        self._client = MlflowClient(tracking_uri=self.uri or None)
        found = self._client.get_experiment_by_name(self.experiment)
        self._experiment_id = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
        runs = self._client.search_runs([self._experiment_id], f"tags.`{TAG}` = '{run.name}'", max_results=1)
        if runs:
            self._run_id = runs[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        tags = {TAG: run.name, "preftune.folder": str(run.folder)}
        self._run_id = self._client.create_run(self._experiment_id, tags=tags, run_name=run.name).info.run_id
        self._write_params(run)
        self._write_data(run)

    def take(self, event: Event) -> None:
        """Metrics, alerts as tags, checkpoints and final models as logged models."""
        assert self._run is not None
        if isinstance(event, StepDone | EvalDone):
            if self._waiting and self._waiting[0][0] != event.step:
                self._log_waiting()
            self._waiting.append((event.step, self._run.metrics(event)))
        elif isinstance(event, CheckpointSaved):
            self._model(event.stage, event.step, Path(event.path) / "model", is_final=False)
        elif isinstance(event, StageFinished):
            self._model(event.stage, event.step, Path(event.model), is_final=True)
        elif isinstance(event, Noted) and event.level == "warning":
            self._client.set_tag(self._run_id, f"alert.{event.code}", event.message[:LONGEST_PARAM])

    def end(self, status: Status) -> None:
        """Close the run with its outcome."""
        self._log_waiting()
        self._client.set_terminated(self._run_id, status=STATUS[status])

    def _write_params(self, run: RunFacts) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in flat(run.recipe)]
        for start in range(0, len(params), BATCH):
            self._client.log_batch(self._run_id, params=params[start : start + BATCH])

    def _write_data(self, run: RunFacts) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for one in run.data:
            source, profile = json.dumps({"uri": ", ".join(one.files)}), json.dumps({"num_rows": one.rows})
            dataset = Dataset(f"{one.stage}-{one.split}", one.digest[:36], "local", source, profile=profile)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", one.split)]))
        if inputs:
            self._client.log_inputs(self._run_id, inputs)

    def _log_waiting(self, model_id: str | None = None) -> None:
        """Write the metrics of the last step; they wait for the model that they may be the figures of."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [
            Metric(key, value, now, step, model_id=model_id) for step, metrics in self._waiting for key, value in metrics.items()
        ]
        self._waiting.clear()
        if rows:
            self._client.log_batch(self._run_id, metrics=rows)

    def _model(self, stage: str, step: int, folder: Path, *, is_final: bool) -> None:
        """A logged model with the metrics that it had, and its files where they are wanted."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        assert self._run is not None
        tags = {"preftune.path": str(folder), "preftune.stage": stage, "preftune.step": str(step)}
        name = f"{stage}-final" if is_final else f"{stage}-step-{step}"
        logged = self._client.create_logged_model(
            self._experiment_id, name=name, source_run_id=self._run_id, tags=tags, model_type="causal-lm"
        )
        model_id = logged.model_id
        if self.upload == "all" or (self.upload == "final" and is_final):
            self._client.log_model_artifacts(model_id, str(folder))
        self._client.finalize_logged_model(model_id, LoggedModelStatus.READY)
        self._client.log_outputs(self._run_id, [LoggedModelOutput(model_id, step)])
        self._log_waiting(model_id)
        if is_final and self.register and stage == self._run.stages[-1]:
            self._register(model_id)

    def _register(self, model_id: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self.register)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self._client.create_model_version(
            self.register, source=f"models:/{model_id}", run_id=self._run_id, model_id=model_id
        )
        if self.alias:
            self._client.set_registered_model_alias(self.register, self.alias, version.version)
