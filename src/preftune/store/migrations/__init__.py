"""Alembic's folder: one module a change of the tables, never edited once it was released."""
