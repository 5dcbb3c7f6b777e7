"""Judges, one file each; the caller runs both orders."""
