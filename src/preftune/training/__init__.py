"""The one loop, its step, state, checkpoints and preflight."""

from preftune.core.loading import without_collections

with without_collections():
    import torch  # noqa: F401  # here, so that no module of this room loads it with collections
