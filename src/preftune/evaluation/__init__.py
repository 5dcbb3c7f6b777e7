"""Held-out metrics, win rate and the report."""
