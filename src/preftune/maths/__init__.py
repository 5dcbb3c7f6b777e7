"""Pure mathematics on tensors: log-probabilities, losses, metrics. No files, no models, no transformers."""

from preftune.core.loading import without_collections

with without_collections():
    import torch  # noqa: F401  # here, so that no module of this room loads it with collections
