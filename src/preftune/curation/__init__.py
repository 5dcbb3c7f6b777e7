"""Making pairs from a model and a judge."""
