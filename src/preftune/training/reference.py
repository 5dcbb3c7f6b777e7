"""The reference of a stage: scored once for each completion and kept by content, or scored beside the policy in every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from preftune.core.errors import CheckpointError, Interrupted, UsageError
from preftune.core.events import EventSink, Progress
from preftune.core.ids import digest_json
from preftune.core.recipe import StageConfig
from preftune.core.records import TokenisedExample
from preftune.core.references import ReferenceConfig, SyncConfig, check_reference_of_loss
from preftune.data.pack import Pack, pack_step
from preftune.maths.losses.base import Loss
from preftune.modeling.adapters import adapter_off
from preftune.modeling.forward import Entry, Scorer
from preftune.modeling.load import load_model
from preftune.modeling.reference import ReferenceCache, ReferenceIdentity, reference_logps, weights_digest
from preftune.training.devices import sent
from preftune.training.held import FollowingWeights, HeldWeights, following
from preftune.training.optim import Optimiser
from preftune.training.ranks import Ranks
from preftune.training.spread import ONE, Spread, spread_over
from preftune.training.state import StagePlan

DELAY = 30.0  # seconds that a file of another host may take to show


class Reference(Protocol):
    """What a stage asks of its reference, whichever policy the recipe chose."""

    is_cached: ClassVar[bool]

    @property
    def identity(self) -> str:
        """Digest of the model, and of how it moves: what a resumed run must agree on. Kernels are a run's arithmetic."""

    @property
    def num_forwards(self) -> int:
        """Completions that this process scored."""

    @property
    def is_start(self) -> bool:
        """Whether the policy starts as this reference."""

    @property
    def is_fresh(self) -> bool:
        """Whether the first pack was, or will be, scored as a whole by this process, as it will be trained on."""

    def scores(self, pack: Pack) -> Tensor:
        """Log-probabilities of a pack's scored tokens in the order of ``pack.targets``; (targets,) nats, float32."""

    def meet(self, pack: Pack) -> None:
        """What a rank without a pack does while others have theirs scored; ``pack`` counts nothing."""

    def after_step(self, step: int) -> Mapping[str, float]:
        """Follow the policy after its optimiser step with this number, from 1; metrics to log."""

    def tensors(self) -> Mapping[str, Tensor]:
        """What a checkpoint has to hold of it; nothing where it never moves."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what ``tensors`` gave."""


@dataclass(frozen=True, slots=True)
class CachedReference:
    """Scores from the cache.

    Parameters
        cache: per-token log-probabilities by content. device: where packs are scored.
        is_fresh: every completion of the first pack was scored by this process, in that pack, as it will be trained on.
        num_asked, num_held: completions that the stage needs, each once, and those that the cache held before.
    """

    is_cached: ClassVar[bool] = True

    cache: ReferenceCache
    device: torch.device
    is_fresh: bool
    is_start: bool = True
    num_asked: int = 0
    num_held: int = 0

    @property
    def identity(self) -> str:
        """Of the model whose scores are in the cache."""
        return self.cache.identity.model

    @property
    def num_forwards(self) -> int:
        """Completions that this process scored."""
        return self.cache.num_forwards

    def values(self, pack: Pack) -> npt.NDArray[np.float32]:
        """The scores of a pack from the disk, in the order of its targets; (targets,) nats."""
        return np.concatenate([part for example in pack.examples for part in self.cache.scores(example)])

    def scores(self, pack: Pack) -> Tensor:
        """From the disk."""
        return sent(self.values(pack), self.device)

    def meet(self, pack: Pack) -> None:
        """Nothing: a disk is read alone."""
        del pack

    def after_step(self, step: int) -> Mapping[str, float]:
        """Nothing moves."""
        del step
        return {}

    def tensors(self) -> Mapping[str, Tensor]:
        """Nothing: the cache fills itself again."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to put back."""
        del tensors


@dataclass(frozen=True, slots=True)
class Weighed:
    """A policy's scorer, how its model lies on the processes, and the digest of its weights where it was taken before that."""

    scorer: Scorer
    spread: Spread = ONE
    weights: str | None = None

    @property
    def identity(self) -> ReferenceIdentity:
        """Of the model without its fresh adapters."""
        return ReferenceIdentity.of(self.scorer, self.weights)


class LiveReference:
    """Scores of a model that is there, in the very packs of the policy, with dropout off and no graph.

    Parameters
        reference, policy: one and the same, or two models. in_place: makes the first the reference while it scores.
        identity: as in ``Reference``. sync, weights: where it follows the policy.
    """

    is_cached: ClassVar[bool] = False
    is_fresh: ClassVar[bool] = True

    def __init__(
        self,
        reference: Weighed,
        policy: Weighed,
        in_place: Callable[[], AbstractContextManager[None]],
        identity: str,
        *,
        sync: SyncConfig | None = None,
        weights: FollowingWeights | None = None,
    ) -> None:
        self.identity, self.is_start = identity, reference is policy
        self.num_forwards = 0
        self._scorer, self._policy = reference.scorer, policy.scorer
        self._is_parted = reference.spread.kind == "fsdp2"
        self._in_place, self._sync, self._weights = in_place, sync, weights

    def scores(self, pack: Pack) -> Tensor:
        """By a forward pass."""
        self.num_forwards += pack.num_completions
        return self._forward(pack)

    def meet(self, pack: Pack) -> None:
        """A forward pass too where weights are parted: all processes gather them together."""
        if self._is_parted:
            self._forward(pack)

    def _forward(self, pack: Pack) -> Tensor:
        if self._is_parted:
            self._scorer.peers = self._policy.peers
        return reference_logps(self._scorer, pack, self._in_place)

    def after_step(self, step: int) -> Mapping[str, float]:
        """Follow, every so many steps; ``reference/syncs`` counts how often it has."""
        if self._sync is None or self._weights is None:
            return {}
        if step % self._sync.every == 0:
            self._weights.follow(self._sync.alpha)
        return {"reference/syncs": float(step // self._sync.every)}

    def tensors(self) -> Mapping[str, Tensor]:
        """The weights of a reference that follows."""
        return {} if self._weights is None else self._weights.means

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put its weights back."""
        if self._weights is not None:
            self._weights.load(tensors)


def reference_of(config: StageConfig, loss: Loss) -> ReferenceConfig | None:
    """The settings of a stage's reference; None where log-probabilities are compared with none.

    Raises
        RecipeError: the loss takes no reference and the stage names one, or the stage takes away one that it needs.
    """
    given, needs = config.reference, loss.needs_reference
    check_reference_of_loss(given, config.method, needs_reference=needs, view=loss.view, where=f"stage {config.name}: ")
    if not needs or (given is not None and given.policy == "none"):
        return None
    return given or ReferenceConfig()


def live_reference(stage: StagePlan, asked: ReferenceConfig, policy: Weighed, optimiser: Optimiser) -> LiveReference:
    """A reference that is scored beside the policy.

    Raises
        UsageError: its own model has another vocabulary; adapters that cannot be followed softly.
    """
    if stage.reference is not None:
        other = _another(stage, policy)
        return LiveReference(other, policy, nullcontext, _digest(asked, other.identity))
    model, trained, spread = policy.scorer.model, optimiser.parameters, policy.spread
    identity, is_adapter = _digest(asked, policy.identity), stage.config.adapter == "lora"
    if asked.sync is not None:
        is_soft_adapter = is_adapter and asked.sync.alpha < 1
        weights = following(model, optimiser.masters, trained, spread, is_soft_adapter=is_soft_adapter)
        place: Callable[[], AbstractContextManager[None]] = weights.held.in_place
        return LiveReference(policy, policy, place, identity, sync=asked.sync, weights=weights)
    if is_adapter:  # a frozen copy would hold what the model without its fresh adapters is
        return LiveReference(policy, policy, lambda: adapter_off(model), identity)
    held = HeldWeights(model, trained, is_adapter_off=False, spread=spread)
    return LiveReference(policy, policy, held.in_place, identity)


def score_reference(
    stage: StagePlan, policy: Weighed, packs: Sequence[Pack], sink: EventSink, *, should_stop: Callable[[], bool]
) -> CachedReference:
    """Score what the cache does not hold, in the very packs that training and evaluation will see; ranks share the work.

    Raises
        Interrupted: ``should_stop`` said so; what was scored is kept.
    """
    ranks, is_start = stage.ranks, stage.reference is None
    reference = policy if is_start else _another(stage, policy)
    cache = ReferenceCache(stage.cache_folder, reference.identity)
    num_asked, num_held = cache.count(example for pack in packs for example in pack.examples)
    pending: list[Pack] = []
    left: list[TokenisedExample] = []
    for pack, missing in zip(packs, _missing(cache, packs, ranks), strict=True):
        if len(missing) == len(pack.examples):
            pending.append(pack)
        else:
            left.extend(missing)
    # A pair may share a completion with a pair of an earlier run, whose score was rounded in another pack.
    is_fresh = bool(ranks.from_first(bool(packs) and cache.is_new(packs[0])))
    pending += pack_step(left, stage.config.tokens_per_pack)
    turns = list(ranks.turns(pending))
    for done, turn in enumerate(turns):
        if ranks.any(is_so=should_stop()):
            raise Interrupted(
                f"stage {stage.config.name} stopped while the reference was scored, "
                f"{done * ranks.size} of {len(pending)} packs done; "
                "their scores are kept; resume the run, or give the same command again, to go on"
            )
        with reference.spread.turn(reference.scorer, turn):
            if turn.index is None:
                _idle(reference.scorer, turn.pack)
            else:
                cache.fill(turn.pack, reference.scorer, is_forced=ranks.size > 1)
        sink(Progress("scoring the reference", min((done + 1) * ranks.size, len(pending)), len(pending)))
    if turns and ranks.size > 1:
        ranks.wait()
        _wait_for_others(cache, pending)
    is_fresh = is_fresh and is_start and (ranks.size == 1 or ranks.launch.is_one_host)
    return CachedReference(cache, policy.scorer.device, is_fresh, is_start, num_asked, num_held)


def _another(stage: StagePlan, policy: Weighed) -> Weighed:
    """The model that the stage names as its reference, where the policy is, parted as it is, in its layout.

    A quantised model cannot be parted: every process holds the whole of it.
    """
    assert stage.reference is not None
    scorer, kind = policy.scorer, policy.spread.kind
    loaded = load_model(stage.reference, precision="bfloat16" if scorer.dtype == torch.bfloat16 else "float32")
    if loaded.tokenizer.raw.get_vocab() != stage.loaded.tokenizer.raw.get_vocab():
        raise UsageError(
            f"stage {stage.config.name}: reference.model: {stage.reference.name} has another vocabulary than "
            f"{stage.loaded.name}, so it cannot score the same tokens; name a model of the same family"
        )
    model: nn.Module = loaded.model
    model.requires_grad_(False)
    shared: Literal["auto"] | bool = "auto" if stage.config.shared_prefix == "auto" else False
    if kind != "fsdp2" or getattr(loaded.model, "quantization_method", None) is not None:
        model.to(scorer.device)
        return Weighed(Scorer(model, shared=shared))
    weights = weights_digest(model)  # before no process has all of them
    spread = spread_over(model, Entry(model), kind, stage.ranks, scorer.device, loaded.model.dtype)
    return Weighed(Scorer(model, shared=shared, entry=spread.entry), spread, weights)


def _digest(asked: ReferenceConfig, start: ReferenceIdentity) -> str:
    """Of a live reference: of its weights at the start, and of how it moves."""
    return digest_json([asked.model_dump(mode="json"), start.model])


def _missing(cache: ReferenceCache, packs: Sequence[Pack], ranks: Ranks) -> list[list[TokenisedExample]]:
    """What the cache lacks of each pack, as the first rank sees it: other runs may be filling it at this moment."""
    found = [cache.lookup(pack.examples) for pack in packs]
    if ranks.size == 1:
        return found
    ours = [
        [place for place, one in enumerate(pack.examples) if any(one is other for other in missing)]
        for pack, missing in zip(packs, found, strict=True)
    ]
    places = ranks.from_first(ours)
    return [[pack.examples[place] for place in some] for pack, some in zip(packs, places, strict=True)]


def _idle(scorer: Scorer, pack: Pack) -> None:
    """A pass that is kept nowhere."""
    with torch.no_grad(), adapter_off(scorer.model):
        scorer.token_logps(pack)


def _wait_for_others(cache: ReferenceCache, packs: Sequence[Pack]) -> None:
    """See what the other ranks have written; network file systems show it with some delay."""
    deadline = time.monotonic() + DELAY
    while True:
        cache.refresh()
        missing = sum(len(cache.lookup(pack.examples)) for pack in packs)
        if not missing:
            return
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{cache.folder}: {missing} examples that other ranks scored are not there after {DELAY:.0f} s; "
                "put PREFTUNE_CACHE where all hosts see it"
            )
        time.sleep(0.2)
