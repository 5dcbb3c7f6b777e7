"""Everything between a plan and the first step: model, adapters, loss, order, reference scores, invariants, optimiser."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from preftune.core.errors import UsageError
from preftune.core.events import EventSink, Noted
from preftune.core.ids import digest_bytes, digest_json
from preftune.core.recipe import StageConfig
from preftune.core.records import TokenisedExample
from preftune.data.pack import Pack
from preftune.maths.losses.base import DataAwareLoss, Loss, losses
from preftune.modeling.adapters import add_lora, trainable_parameters
from preftune.modeling.compile import choose_kernels
from preftune.modeling.forward import Entry, Scorer
from preftune.modeling.lineage import is_adapter_enough
from preftune.modeling.machine import device_bytes
from preftune.modeling.reference import weights_digest
from preftune.training.balance import balance_experts
from preftune.training.devices import choose_device, return_free_memory, set_threads
from preftune.training.invariants import check_packed_equals_plain, check_start_is_reference, check_weights
from preftune.training.optim import LrSchedule, Optimiser, num_steps_of, schedule_of
from preftune.training.order import Order
from preftune.training.probe import Probe, make_probe
from preftune.training.ranks import ALONE, Ranks
from preftune.training.reference import CachedReference, Reference, Weighed, live_reference, reference_of, score_reference
from preftune.training.saving import save_memory
from preftune.training.sharing_out import Sizes, check_distributed, facts_of, spread_kind
from preftune.training.spread import ONE, Spread, spread_over
from preftune.training.state import StagePlan
from preftune.training.step import Objective, partner_pack

EVAL_CHUNK = 256  # held-out examples that are packed together


@dataclass(frozen=True, slots=True)
class Trainee:
    """A stage that is ready for its first step."""

    model: nn.Module
    device: torch.device
    objective: Objective
    optimiser: Optimiser
    order: Order
    num_steps: int
    schedule: LrSchedule
    select_packs: list[Pack]
    reference: Reference | None
    spread: Spread
    probe: Probe | None
    probes: frozenset[int]
    facts: dict[str, object]
    data_digest: str


@dataclass(frozen=True, slots=True)
class Policy:
    """What is trained and on what, before anything is scored.

    Parameters
        weighed: its scorer, and how it lies on the processes. loss: of the stage. order, num_steps: of its examples.
        select_packs: held-out ones.
    """

    weighed: Weighed
    loss: Loss
    order: Order
    num_steps: int
    select_packs: list[Pack]

    @property
    def scorer(self) -> Scorer:
        """Of the policy."""
        return self.weighed.scorer

    @property
    def spread(self) -> Spread:
        """How it lies on the processes."""
        return self.weighed.spread

    def reference_packs(self, stage: StagePlan) -> list[Pack]:
        """Everything that a reference is asked to score, as training and evaluation will see it, step 1 first."""
        seen = [*first_epoch(stage, self.order, self.num_steps), *self.select_packs]
        return [*seen, *(map(partner_pack, seen) if "mismatched" in self.loss.needs else ())]


def prepare(stage: StagePlan, sink: EventSink, *, should_stop: Callable[[], bool]) -> Trainee:
    """Build the trainee; the model of the plan is changed in place from here on.

    A reference that is the model as it stands here is scored through the very modules that will train (fresh adapters
    add nothing), so that the first margin is exactly 0.

    Raises
        Interrupted: ``should_stop`` said so while the reference was scored; what was scored is kept.
        InvariantBroken: the policy does not start as its reference, or packed and plain forward differ.
    """
    config, ranks = stage.config, stage.ranks
    policy = make_policy(stage, sink)
    model, scorer, spread, loss = policy.scorer.model, policy.scorer, policy.spread, policy.loss
    device, order, num_steps = scorer.device, policy.order, policy.num_steps
    saving = save_memory(stage, scorer, sink) | {"router_aux_loss_coef": balance_experts(config, scorer)}
    parameters = trainable_parameters(model)
    optimiser = Optimiser(
        parameters,
        betas=config.adam_betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        spread=spread,
        kind=config.optimizer,
    )
    asked = reference_of(config, loss)
    reference: Reference | None = None
    if asked is not None and asked.policy == "cached":
        packs = policy.reference_packs(stage)
        reference = score_reference(stage, policy.weighed, packs, sink, should_stop=should_stop)
    elif asked is not None:
        reference = live_reference(stage, asked, policy.weighed, optimiser)
    scores, meet = (None, None) if reference is None else (reference.scores, reference.meet)
    objective = Objective(scorer, loss, scores, spread, meet)
    first = ranks.packs([stage.train[index] for index in order.indices(0)], config.tokens_per_pack)[0]
    gaps = {"packed_gap": check_packed_equals_plain(scorer, first)}
    if reference is None or reference.is_start:
        is_exact = device.type == "cpu" and reference is not None and reference.is_fresh
        gaps["start_gap"] = check_start_is_reference(objective, first, is_exact=is_exact)
    schedule = schedule_of(config, loss.view, num_steps)
    probe, probes = make_probe(stage, scorer, parameters, num_steps, spread) or (None, frozenset())
    facts: dict[str, object] = {
        "method": config.method,
        "adapter": config.adapter,
        "reference": "none" if asked is None else asked.policy,
        "train": len(stage.train),
        "select": len(stage.select),
        "lr": schedule.peak,
        "device": str(device),
        "precision": str(scorer.dtype).removeprefix("torch."),
        "threads": set_threads(),
        "layout": scorer.kernel,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters.values()),
        "reference_forwards": 0 if reference is None else reference.num_forwards,
        "probe_copy_bytes": 0 if probe is None else probe.start.num_bytes,
        **gaps,
        **facts_of(ranks.launch, spread.kind),
        **saving,
    }
    select_packs = policy.select_packs
    return_free_memory()
    return Trainee(
        model=model,
        device=device,
        objective=objective,
        optimiser=optimiser,
        order=order,
        num_steps=num_steps,
        schedule=schedule,
        select_packs=select_packs,
        reference=reference,
        spread=spread,
        probe=probe,
        probes=probes,
        facts=facts,
        data_digest=data_digest(stage.train),
    )


def make_policy(stage: StagePlan, sink: EventSink) -> Policy:
    """The model of the plan in its place, with its adapters, and what it will be trained on."""
    config = stage.config
    check_weights(stage.loaded.model, stage.loaded.name)
    loss = fitted_loss(config, stage.train) if stage.loss is None else stage.loss
    _, scorer, spread, weights = _placed(stage, choose_device(), sink, needs_weights=loss.needs_reference)
    if not scorer.is_shared and config.shared_prefix == "auto":
        sink(Noted("info", "not_shared", f"prompts are computed once for each completion: {scorer.reason}"))
    order = Order(len(stage.train), config.pairs_per_step, stage.seed, config.shuffle)
    select_packs = list(packs_of(stage.select, config.tokens_per_pack, stage.ranks))
    num_steps = num_steps_of(config, len(stage.train))
    return Policy(Weighed(scorer, spread, weights), loss, order, num_steps, select_packs)


def fill_cache(stage: StagePlan, sink: EventSink, *, should_stop: Callable[[], bool]) -> CachedReference | None:
    """Score what a stage will ask of its cached reference, and train nothing; None where it has none.

    Raises
        Interrupted: ``should_stop`` said so; what was scored is kept.
    """
    policy = make_policy(stage, sink)
    asked = reference_of(stage.config, policy.loss)
    if asked is None or asked.policy != "cached":
        return None
    return score_reference(stage, policy.weighed, policy.reference_packs(stage), sink, should_stop=should_stop)


def _placed(
    stage: StagePlan, device: torch.device, sink: EventSink, *, needs_weights: bool
) -> tuple[nn.Module, Scorer, Spread, str | None]:
    """The model with its adapters on the device or on the ranks, its scorer, and what was asked of its weights before.

    Raises
        UsageError: a setting that cannot be spread over several processes.
    """
    config, ranks = stage.config, stage.ranks
    model: nn.Module = stage.loaded.model
    dtype = stage.loaded.model.dtype
    kind = spread_kind(config, ranks.launch, sizes_of(model, device))
    if kind != "fsdp2":  # which moves one layer after the other, because the whole may be too large for the device
        model.to(device)
    if config.adapter == "lora":
        model = add_lora(model, config.lora, stage.seed)
    shared: Literal["auto"] | bool = "auto" if config.shared_prefix == "auto" else False
    if kind == "one":
        steps = num_steps_of(config, len(stage.train))
        level: Literal["info", "warning"] = "warning" if config.compile == "on" else "info"  # what was asked for and is not had
        kernels = choose_kernels(config.compile, device, dtype, steps, lambda why: sink(Noted(level, "not_compiled", why)))
        return model, Scorer(model, shared=shared, kernels=kernels), ONE, None
    quantised = getattr(stage.loaded.model, "quantization_method", None)
    for finding in check_distributed(config, ranks.launch, kind, precision=name_of(dtype), quantised_by=quantised):
        if finding.level == "blocker":
            raise UsageError(f"{finding.fact}; {finding.way_out}")
    if kind == "fsdp2" and config.adapter == "lora" and not is_adapter_enough(model):
        raise UsageError(
            f"stage {config.name}: distributed: fsdp2 cannot save a model whose adapters do not add up to one (DoRA on an "
            "earlier adapter); write distributed: ddp"
        )
    weights = weights_digest(model) if needs_weights else None  # the same for all, and no rank has all of them afterwards
    entry = Entry(model)
    spread = spread_over(model, entry, kind, ranks, device, dtype)
    return model, Scorer(model, shared=shared, entry=spread.entry, dtype=dtype), spread, weights


def sizes_of(model: nn.Module, device: torch.device) -> Sizes:
    """Weights of a model, and the memory of the device that it is to lie on."""
    parameters = list(model.parameters())
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    return Sizes(
        sum(one.numel() for one in parameters), trained, max(one.element_size() for one in parameters), device_bytes(device)
    )


def name_of(dtype: torch.dtype) -> str:
    """A dtype as recipes write it."""
    return str(dtype).removeprefix("torch.")


def rank_seed(seed: int, rank: int) -> int:
    """The seed of a rank's generators: the first one's is the run's own."""
    return seed if rank == 0 else int(np.random.default_rng([seed, rank]).integers(2**31))


def fitted_loss(config: StageConfig, train: Sequence[TokenisedExample]) -> Loss:
    """The loss of a stage, its weights fitted to how many completions have each label where it asks for that."""
    loss = losses.build(config.method, config.loss)
    if not isinstance(loss, DataAwareLoss):
        return loss
    labels = [label for example in train for label in example.labels]
    return loss.fitted(sum(labels), len(labels) - sum(labels))


def packs_of(examples: Sequence[TokenisedExample], tokens_per_pack: int, ranks: Ranks = ALONE) -> Iterator[Pack]:
    """Packs of held-out examples: the same examples give the same packs in every run."""
    for start in range(0, len(examples), EVAL_CHUNK):
        yield from ranks.packs(examples[start : start + EVAL_CHUNK], tokens_per_pack)


def first_epoch(stage: StagePlan, order: Order, num_steps: int) -> Iterable[Pack]:
    """The packs of the first epoch, as training will see them."""
    for step in range(min(num_steps, order.steps_per_epoch)):
        yield from stage.ranks.packs([stage.train[index] for index in order.indices(step)], stage.config.tokens_per_pack)


def seed_generators(seed: int) -> None:
    """Seed every generator that dropout, libraries and user code may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is what libraries use
    random.seed(seed)


def data_digest(examples: Sequence[TokenisedExample]) -> str:
    """Digest of what is trained on: every token, which of them count, which side is which, and the order of the examples.

    Ids of examples follow from their texts; their tokens follow from tokenizer and template too. Strengths and confidences
    are left out: a run that one of them stopped goes on once it is mended.
    """
    return digest_json([_content(example) for example in examples])


def _content(example: TokenisedExample) -> list[object]:
    partner = () if example.partner is None else (example.partner,)
    tokens = [example.prompt_ids, *(part for one in (*example.completions, *partner) for part in (one.ids, one.scored))]
    said = [example.example_id, example.is_tie, list(example.labels), len(partner)]
    return [*said, digest_bytes(*(np.asarray(part, dtype=np.int64).tobytes() for part in tokens))]
