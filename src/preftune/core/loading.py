"""Heavy libraries are loaded without the garbage collector, which would go over every object they make, again and again.

Torch, transformers and PEFT make some 600,000 objects that stay to the end. The collector finds nothing among them, and looking
took a sixth of the processor time of `plan`, and a quarter of that of loading them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_is_ours = False


def own_process() -> None:
    """Say that preftune started this process, so what is loaded by now and in blocks to come is never looked at again.

    In the process of somebody who imports preftune, objects of theirs would be kept with them; there the collector only waits.
    """
    global _is_ours  # noqa: PLW0603  # a fact of the process
    _is_ours = True
    gc.freeze()


@contextmanager
def without_collections() -> Iterator[None]:
    """Imports in this block run without the collector; afterwards it is as it was."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _is_ours:
            gc.freeze()
        if was_on:
            gc.enable()
