"""Schemas: one file per format; each turns a row into an ``Example``."""
