"""The one loop, its step, state, checkpoints and preflight."""
