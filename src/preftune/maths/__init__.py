"""Pure mathematics on tensors: log-probabilities, losses, metrics. No files, no models, no transformers."""
