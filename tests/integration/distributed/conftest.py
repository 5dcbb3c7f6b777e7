"""The tiny models of the training tests, on one thread."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "invariant" / "training")]  # ranked.py, tiny.py
