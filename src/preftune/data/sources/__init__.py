"""Containers: one file per kind of file; each yields ``(line, row)``."""
