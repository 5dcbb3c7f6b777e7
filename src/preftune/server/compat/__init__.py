"""Dialects: what the clients of others send and expect. They translate and decide nothing."""
