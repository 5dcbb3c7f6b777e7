"""The reference of a stage: the model that it starts from, scored once for each completion and kept by content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from preftune.core.errors import Interrupted
from preftune.core.events import EventSink, Progress
from preftune.core.records import TokenisedExample
from preftune.data.pack import Pack, pack_step
from preftune.modeling.forward import Scorer
from preftune.modeling.reference import ReferenceCache, ReferenceIdentity
from preftune.training.state import StagePlan


@dataclass(frozen=True, slots=True)
class Reference:
    """Scores of the reference, from the cache.

    Parameters
        cache: per-token log-probabilities by content. device: where packs are scored.
        is_fresh: every completion of the first pack was scored by this process, in that pack, as it will be trained on.
    """

    cache: ReferenceCache
    device: torch.device
    is_fresh: bool

    @property
    def identity(self) -> str:
        """Digest of weights, precision, kernel and versions: what the scores depend on."""
        return self.cache.identity.digest

    @property
    def num_forwards(self) -> int:
        """Completions that this process scored."""
        return self.cache.num_forwards

    def scores(self, pack: Pack) -> Tensor:
        """Log-probabilities of a pack's scored tokens in the order of ``pack.targets``; (targets,) nats, float32."""
        parts = [part for example in pack.examples for part in self.cache.scores(example)]
        return torch.from_numpy(np.concatenate(parts)).to(self.device)


def score_reference(
    stage: StagePlan, scorer: Scorer, packs: Sequence[Pack], sink: EventSink, *, should_stop: Callable[[], bool]
) -> Reference:
    """Score what the cache does not hold, in the very packs that training and evaluation will see.

    Raises
        Interrupted: ``should_stop`` said so; what was scored is kept.
    """
    identity = ReferenceIdentity.of(scorer)
    cache = ReferenceCache(stage.cache_folder, identity)
    pending: list[Pack] = []
    left: list[TokenisedExample] = []
    for pack in packs:
        missing = cache.lookup(pack.examples)
        if len(missing) == len(pack.examples):
            pending.append(pack)
        else:
            left.extend(missing)
    # A pair may share a completion with a pair of an earlier run, whose score was rounded in another pack.
    is_fresh = bool(packs) and cache.is_new(packs[0])
    pending += pack_step(left, stage.config.tokens_per_pack)
    for done, pack in enumerate(pending):
        if should_stop():
            raise Interrupted(
                f"stage {stage.config.name} stopped while the reference was scored, {done} of {len(pending)} packs done; "
                "their scores are kept, resume the run to go on"
            )
        cache.fill(pack, scorer)
        sink(Progress("scoring the reference", done + 1, len(pending)))
    return Reference(cache, scorer.device, is_fresh)
