"""Answers by model name: which engine a name belongs to, and what is kept of answers."""
