"""The HTTP API: one job store, thin dialects that translate, one error envelope."""
