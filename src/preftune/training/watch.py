"""What is looked at while a stage trains: the ledger of its pairs, the probe, and the alerts that follow from the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from preftune.core.events import EvalDone, EventSink, Noted
from preftune.data.pack import Pack
from preftune.training.diagnose import Diagnosis
from preftune.training.journal import Journal
from preftune.training.ledger import Ledger
from preftune.training.order import evenly_spaced
from preftune.training.prepare import Trainee
from preftune.training.probe import SHARE
from preftune.training.selection import note_evaluation
from preftune.training.state import StagePlan, TrainState
from preftune.training.step import evaluate

SHORT = 30.0  # seconds of a stage below which the share of a probe says nothing


class Watch:
    """Everything beside the loss that a stage records; nothing here changes a weight or a random draw.

    Parameters
        step: where the stage stands; the rows of the journal up to it are read again, so that no alert comes twice.
    """

    def __init__(self, stage: StagePlan, trainee: Trainee, journal: Journal, sink: EventSink, step: int) -> None:
        view = trainee.objective.loss.view
        self._config, self._sink, self._journal, self._trainee = stage.config, sink, journal, trainee
        self._evals = evenly_spaced(trainee.num_steps, max(1, stage.config.evals), with_end=True)
        ledger = stage.folder / "ledger.jsonl" if stage.ranks.is_first else None
        self._ledger = Ledger(ledger, stage.train if view == "pairs" else (), step)
        self._diagnosis = Diagnosis(view, trainee.num_steps, stage.config.pairs_per_step)
        for row in journal.rows():
            self._diagnosis.see(row)
        # KTO reports a kl of its own, over the pairs' prompts: TRL's name stays with it
        self._renames = {"kl": "probe/kl"} if "mismatched" in trainee.objective.loss.needs else {}
        if trainee.probe is not None:
            begun = trainee.probe.begin(stage.folder)
            if step == 0:
                self._add(0, begun)

    def after_step(self, step: int, metrics: Mapping[str, float], packs: Sequence[Pack], margins: Sequence[float]) -> None:
        """Take the metrics of a step, and the margin that each of its pairs had before it."""
        self._ledger.add(step, [example for pack in packs for example in pack.examples], margins)
        self._diagnosis.see({"step": step, **metrics})

    def look(self, state: TrainState, epoch: float) -> bool:
        """After some steps: held-out metrics, the probe, and the alerts; True where ``keep: best`` wants this step kept.

        The state learns which evaluation was the best one, and whether the stage ends because none gets better.
        """
        is_best, trainee, step = False, self._trainee, state.step
        if step in self._evals and trainee.select_packs:
            trainee.model.eval()
            held_out = evaluate(trainee.objective.at(state.loss_state), trainee.select_packs)
            trainee.model.train()
            self._add(step, held_out, {"epoch": epoch})
            is_best = note_evaluation(self._config, state, held_out)
        if step in trainee.probes and trainee.probe is not None:
            metrics = trainee.probe.run()
            correlation = self._ledger.length_correlation()
            if correlation is not None:
                metrics["margins/length_correlation"] = correlation
            self._add(step, metrics)
        return is_best and self._config.keep == "best" and step < trainee.num_steps

    def cost(self, seconds: float) -> dict[str, float]:
        """Seconds of the probe in this process and their share of the stage's; said where it is more than was meant."""
        spent = 0.0 if self._trainee.probe is None else self._trainee.probe.seconds
        share = spent / seconds if seconds > 0 else 0.0
        if self._trainee.probe is not None:
            words = f"the probe took {spent:.1f} s, {share:.0%} of stage {self._config.name}"
            if share > 2 * SHARE and seconds > SHORT:
                words += "; set probe: {evals: 1}, a smaller probe.max_new_tokens, or probe: off"
            self._sink(Noted("info", "probe_cost", words))
        return {"probe_seconds": spent, "probe_share": share}

    def _add(self, step: int, metrics: Mapping[str, float], beside: Mapping[str, float] | None = None) -> None:
        named = {self._renames.get(name, name): value for name, value in metrics.items()}
        self._journal.add(step, {**named, **(beside or {})})
        self._sink(EvalDone(self._config.name, step, named))
        for noted in self._diagnosis.see({"step": step, **named}):
            self._sink(noted)
