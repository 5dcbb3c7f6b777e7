"""Sinks: what a run says, in TensorBoard, MLflow, Weights & Biases or trackio; none of them can stop a run."""
