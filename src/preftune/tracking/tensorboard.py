"""TensorBoard: event files in the run's folder, one log directory a stage."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from preftune.core.events import EvalDone, Event, Noted, StepDone
from preftune.tracking.base import RunFacts, Status, sinks


@sinks.register("tensorboard")
@dataclass(slots=True)
class TensorBoard:
    """Scalars, the recipe and the alerts as event files; `tensorboard --logdir RUN/tracking/tensorboard` shows them.

    Parameters
        folder: where to write instead, below it one folder a run and stage.
    """

    folder: str = ""
    _run: RunFacts | None = field(default=None, init=False, repr=False)
    _writers: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _step: int = field(default=0, init=False, repr=False)

    def missing(self) -> str:
        """The package."""
        return "" if find_spec("tensorboard") else "the package tensorboard is not installed"

    def way_out(self) -> str:
        """Its extra."""
        return "pip install 'preftune[tensorboard]', or drop it from tracking"

    def begin(self, run: RunFacts) -> None:
        """Nothing is opened before the first metric."""
        self._run = run

    def take(self, event: Event) -> None:
        """Scalars of a step, an evaluation or a probe; a warning as text."""
        assert self._run is not None
        if isinstance(event, StepDone | EvalDone):
            self._step = event.step
            values = {
                self._run.key(event.stage, name).removeprefix(f"{event.stage}/"): value for name, value in event.metrics.items()
            }
            self._add(event.stage, event.step, {name: float(value) for name, value in values.items()}, {})
        elif isinstance(event, Noted) and event.level == "warning" and self._writers:
            self._add(next(reversed(self._writers)), self._step, {}, {f"alerts/{event.code}": event.message})

    def end(self, status: Status) -> None:
        """Flush and close."""
        del status
        for writer in self._writers.values():
            writer.close()

    def _add(self, stage: str, step: int, scalars: dict[str, float], texts: dict[str, str]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        for name, text in texts.items():
            content = TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
            values.append(Summary.Value(tag=name, metadata=plugin, tensor=content))
        writer = self._writer(stage)
        writer.add_event(Record(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _writer(self, stage: str) -> Any:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        assert self._run is not None
        if stage not in self._writers:
            root = (
                Path(self.folder).expanduser() / self._run.name if self.folder else self._run.folder / "tracking" / "tensorboard"
            )
            self._writers[stage] = EventFileWriter(str(root / stage), flush_secs=10)
            self._add(stage, 0, {}, {"recipe": _as_code(self._run)})
        return self._writers[stage]


def _as_code(run: RunFacts) -> str:
    """The recipe as an indented block, which TensorBoard's text page shows as it is."""
    import json

    text = json.dumps(run.recipe, indent=2, ensure_ascii=False)
    return "\n".join(f"    {line}" for line in text.splitlines())
