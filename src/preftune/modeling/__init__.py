"""Transformers and PEFT live here and nowhere else."""
