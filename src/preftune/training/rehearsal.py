"""A dry run that tells what a stage will need: its largest pack for memory, three of its steps for time.

It runs the code that trains (``prepare``, ``train_step``, ``evaluate``, a checkpoint) on a few packs of the stage, in a
process of its own, so that the peak of memory is exact and running out of it ends only that process. Nothing is fitted:
times are those of the steps, scaled by tokens, and the optimiser's own time is counted once a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from preftune.core.events import ignore
from preftune.core.recipe import StageConfig
from preftune.core.records import TokenisedExample
from preftune.data.pack import Pack, bins_of, pack_of
from preftune.modeling.adapters import adapter_off
from preftune.modeling.lineage import save_model
from preftune.training.devices import peak_memory_bytes
from preftune.training.optim import Optimiser, num_steps_of
from preftune.training.order import Order
from preftune.training.prepare import EVAL_CHUNK, Trainee, prepare, seed_generators
from preftune.training.probe import num_probes
from preftune.training.resume import save
from preftune.training.state import StagePlan, TrainState
from preftune.training.step import evaluate, train_step

PROBE_STEPS = 3
PACKS_A_STEP = 4
"""Packs of a probe step at most; a step of more packs is scaled by tokens."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The part of a stage that is rehearsed, each pack as the examples that it holds.

    Parameters
        peak: the packs that memory is measured on: the largest of the first epoch, the one with the longest example,
            and a second one of the same step, so that gradients of an earlier pack are held meanwhile.
        steps: packs of the probe steps. select: the largest pack of the held-out examples, or none.
        epoch_tokens, select_tokens: of the whole first epoch and of all held-out examples, prompts counted once.
        num_steps, steps_per_epoch: of the stage. num_prompts: that its probe samples each time; 0 without one.
    """

    peak: tuple[tuple[TokenisedExample, ...], ...]
    steps: tuple[tuple[tuple[TokenisedExample, ...], ...], ...]
    select: tuple[TokenisedExample, ...]
    epoch_tokens: int
    select_tokens: int
    num_steps: int
    steps_per_epoch: int
    num_prompts: int = 0

    @property
    def peak_tokens(self) -> int:
        """Tokens of the largest pack."""
        return max(sum(one.num_tokens for one in pack) for pack in self.peak)


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What was measured.

    Parameters
        peak_bytes: the most memory of the process (CPU) or the GPU's allocator. base_bytes: of the process before the
            model was loaded; 0 on a GPU.
        load_s, prepare_s: seconds to load the model, and to prepare the stage but for the reference's scores.
        step_s_per_token, forward_s_per_token, eval_s_per_token: seconds of forward and backward, of a forward without
            graph, of an evaluation. optimiser_s: of one optimiser step. checkpoint_s, final_s: of writing them.
        device: where. tokens: of the largest pack. probe_s: seconds of one probe of the stage's prompts. probe_tokens: the
        training that costs about as much, as the probe counts it.
    """

    peak_bytes: int
    base_bytes: int
    load_s: float
    prepare_s: float
    step_s_per_token: float
    forward_s_per_token: float
    eval_s_per_token: float
    optimiser_s: float
    checkpoint_s: float
    final_s: float
    device: str
    tokens: int
    probe_s: float = 0.0
    probe_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a stage will need: bytes at the peak, and seconds by part."""

    peak_bytes: int
    loading_s: float
    reference_s: float
    training_s: float
    evaluation_s: float
    saving_s: float
    probing_s: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.loading_s + self.reference_s + self.training_s + self.evaluation_s + self.saving_s + self.probing_s


def choose_sample(
    config: StageConfig, train: Sequence[TokenisedExample], select: Sequence[TokenisedExample], seed: int
) -> Sample:
    """The packs to rehearse, from the sizes of the examples alone; the first epoch is gone through as it will be trained."""
    order = Order(len(train), config.pairs_per_step, seed, config.shuffle)
    num_steps = num_steps_of(config, len(train))
    places = range(min(num_steps, order.steps_per_epoch))
    steps = [bins_of([train[index] for index in order.indices(step)], config.tokens_per_pack) for step in places]
    sizes = [sum(example.num_tokens for pack in step for example in pack) for step in steps]
    packs = [(pack, step) for step in steps for pack in step]
    largest, its_step = max(packs, key=lambda one: _size(one[0]))
    longest, _ = max(packs, key=lambda one: max(example.num_tokens for example in one[0]))
    others = sorted((pack for pack in its_step if pack is not largest and pack is not longest), key=_size)
    peak = [largest, *([longest] if longest is not largest else []), *others[-1:]]
    chosen = [places[round(k * (len(places) - 1) / max(1, PROBE_STEPS - 1))] for k in range(PROBE_STEPS)]
    chunks = [select[at : at + EVAL_CHUNK] for at in range(0, len(select), EVAL_CHUNK)]
    held_out: list[list[TokenisedExample]] = [pack for one in chunks for pack in bins_of(one, config.tokens_per_pack)]
    return Sample(
        peak=tuple(map(tuple, peak)),
        steps=tuple(tuple(map(tuple, _spread(steps[step], PACKS_A_STEP))) for step in chosen),
        select=tuple(max(held_out, key=_size)) if held_out and config.evals > 0 else (),
        epoch_tokens=sum(sizes),
        select_tokens=sum(example.num_tokens for example in select),
        num_steps=num_steps,
        steps_per_epoch=len(places),
        num_prompts=_num_prompts(config, select or train),
    )


def rehearse(stage: StagePlan, sample: Sample, *, loaded_in: float, base_bytes: int) -> Rehearsal:
    """Run the sample; the model of the plan is trained on it, so it must not be used afterwards.

    Parameters
        stage: with a folder of its own to write into. loaded_in: seconds that loading the model took.
        base_bytes: memory of the process before it was loaded.
    """
    everything = list({one.example_id: one for pack in _packs(sample) for one in pack}.values())
    one_step = {"pairs_per_step": len(everything), "shuffle": False, "epochs": 1.0, "max_steps": None}
    config = stage.config.model_copy(update=one_step)
    stage = replace(stage, config=config, train=everything, select=list(sample.select))
    seed_generators(stage.seed)
    started = time.perf_counter()
    trainee = prepare(stage, ignore, should_stop=lambda: False)
    prepared_in = time.perf_counter() - started
    timer = _TimedOptimiser(trainee.optimiser)
    state = TrainState()
    peak = [pack_of(one) for one in sample.peak]
    trainee.model.train()
    _step(trainee, timer, peak, state, config.max_grad_norm)  # allocates what the optimiser keeps, and warms up
    forward = _forward_rate(trainee, peak[0])
    timer.seconds = 0.0
    seconds, tokens = 0.0, 0
    for step in sample.steps:
        packs = [pack_of(one) for one in step]
        seconds += _step(trainee, timer, packs, state, config.max_grad_norm)
        tokens += sum(len(pack.ids) for pack in packs)
    optimiser_s, of_packs = timer.seconds / max(1, len(sample.steps)), seconds - timer.seconds
    evaluating = 0.0
    if sample.select:
        held_out = pack_of(sample.select)
        evaluating = _seconds(lambda: evaluate(trainee.objective.at(state.loss_state), [held_out]), trainee) / len(held_out.ids)
    probing, probe_tokens = _probe(stage, trainee, sample) if sample.steps else (0.0, 0.0)
    saving = _seconds(lambda: save(stage, trainee, state, ignore), trainee) if config.checkpoints else 0.0
    _step(trainee, timer, peak, state, config.max_grad_norm)  # as every later step: the moments are there
    finishing = _seconds(lambda: save_model(trainee.model, stage.loaded.tokenizer, stage.folder / "final"), trainee)
    is_cached = trainee.reference is not None and trainee.reference.is_cached  # a live one is part of the steps
    scored = sum(one.num_tokens for one in everything) + sum(one.num_tokens for one in sample.select)
    of_reference = forward * scored if is_cached else 0.0
    return Rehearsal(
        peak_bytes=peak_memory_bytes(trainee.device),
        base_bytes=0 if trainee.device.type == "cuda" else base_bytes,
        load_s=loaded_in,
        prepare_s=max(0.0, prepared_in - of_reference),
        step_s_per_token=of_packs / max(1, tokens),
        forward_s_per_token=forward if is_cached else 0.0,
        eval_s_per_token=evaluating,
        optimiser_s=optimiser_s,
        checkpoint_s=saving,
        final_s=finishing,
        device=str(trainee.device),
        tokens=sample.peak_tokens,
        probe_s=probing,
        probe_tokens=probe_tokens,
    )


def predict(rehearsal: Rehearsal, sample: Sample, config: StageConfig, parent_bytes: int) -> Prediction:
    """What the whole stage will need.

    Parameters
        parent_bytes: memory of a process that holds the data and no model; the trainer holds both.
    """
    tokens = sample.epoch_tokens * sample.num_steps / sample.steps_per_epoch
    # data that the rehearsal did not hold: counted on a CPU only, where they share memory with the model
    beside = max(0, parent_bytes - rehearsal.base_bytes) if rehearsal.base_bytes else 0
    evals = min(config.evals, sample.num_steps) if config.evals else 0
    probes = 0
    if config.probe is not None and rehearsal.probe_s > 0:  # at the start, and as often as the stage affords
        probes = 1 + min(sample.num_steps, num_probes(config.probe, config.evals, tokens, rehearsal.probe_tokens))
    return Prediction(
        peak_bytes=rehearsal.peak_bytes + beside,
        loading_s=rehearsal.load_s + rehearsal.prepare_s,
        reference_s=rehearsal.forward_s_per_token * (sample.epoch_tokens + sample.select_tokens),
        training_s=rehearsal.step_s_per_token * tokens + rehearsal.optimiser_s * sample.num_steps,
        evaluation_s=rehearsal.eval_s_per_token * sample.select_tokens * evals,
        saving_s=rehearsal.checkpoint_s * min(config.checkpoints, max(0, sample.num_steps - 1)) + rehearsal.final_s,
        probing_s=rehearsal.probe_s * probes,
    )


def _num_prompts(config: StageConfig, examples: Sequence[TokenisedExample]) -> int:
    if config.probe is None:
        return 0
    return min(config.probe.prompts, len({one.prompt_ids for one in examples})) * config.probe.samples


def _probe(stage: StagePlan, trainee: Trainee, sample: Sample) -> tuple[float, float]:
    """Seconds of one probe and the tokens that it counts as, both scaled from the prompts at hand to the stage's."""
    probe = trainee.probe
    if probe is None:
        return 0.0, 0.0
    share = sample.num_prompts / len(probe.prompts)
    return _seconds(lambda: probe.begin(stage.folder), trainee) * share, probe.cost(sample.num_prompts)


class _TimedOptimiser:
    """The optimiser, with the seconds that its own work takes."""

    def __init__(self, inner: Optimiser) -> None:
        self._inner = inner
        self.seconds = 0.0

    def clip(self, max_norm: float | None) -> Tensor:
        """As the optimiser's."""
        started = time.perf_counter()
        norm = self._inner.clip(max_norm)
        self.seconds += time.perf_counter() - started
        return norm

    def step(self, lr: float) -> None:
        """As the optimiser's."""
        started = time.perf_counter()
        self._inner.step(lr)
        self.seconds += time.perf_counter() - started


def _step(trainee: Trainee, timer: _TimedOptimiser, packs: Sequence[Pack], state: TrainState, max_norm: float | None) -> float:
    """Seconds of one optimiser step."""
    lr, optimiser = trainee.schedule.peak, cast(Optimiser, timer)

    def step() -> None:
        train_step(trainee.objective, packs, optimiser, lr=lr, max_grad_norm=max_norm, loss_state=state.loss_state)
        state.step += 1

    return _seconds(step, trainee)


def _forward_rate(trainee: Trainee, pack: Pack) -> float:
    """Seconds a token of a forward pass as the reference is scored."""

    def score() -> None:
        with torch.no_grad(), adapter_off(trainee.model):
            trainee.objective.scorer.token_logps(pack)

    return _seconds(score, trainee) / max(1, len(pack.ids))


def _seconds(work: Callable[[], object], trainee: Trainee) -> float:
    """Wall seconds of some work, the device's part included."""
    started = time.perf_counter()
    work()
    if trainee.device.type == "cuda":
        torch.cuda.synchronize(trainee.device)
    return time.perf_counter() - started


def _packs(sample: Sample) -> Iterator[tuple[TokenisedExample, ...]]:
    yield from sample.peak
    for step in sample.steps:
        yield from step


def _spread(packs: Sequence[Sequence[TokenisedExample]], count: int) -> list[Sequence[TokenisedExample]]:
    """At most ``count`` of the packs, evenly spaced: packs of a step are sorted by the length of their first example."""
    if len(packs) <= count:
        return list(packs)
    return [packs[round(k * (len(packs) - 1) / (count - 1))] for k in range(count)]


def _size(pack: Iterable[TokenisedExample]) -> int:
    return sum(example.num_tokens for example in pack)
