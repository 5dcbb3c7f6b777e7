"""Answers by name: one protocol, the embedded engine (transformers in a process of its own) and upstream servers."""
