"""Losses: one file each, registered by name; see ``base`` for the contract."""
