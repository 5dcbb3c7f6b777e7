"""A checkpoint knows its data by every token and by which side is which."""

from __future__ import annotations

from dataclasses import replace

import pytest

from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.training.prepare import data_digest

CHOSEN, REJECTED = TokenisedCompletion((5, 6, 2), (True, True, True)), TokenisedCompletion((7, 2), (True, True))
EXAMPLE = TokenisedExample("one", (1, 3, 4), (CHOSEN, REJECTED), confidence=0.8)
OTHERS = [
    replace(EXAMPLE, example_id="two"),
    replace(EXAMPLE, prompt_ids=(1, 3, 9)),  # another template, and as many tokens
    replace(EXAMPLE, prompt_ids=(1, 3), completions=(replace(CHOSEN, ids=(4, 5, 6, 2), scored=(True,) * 4), REJECTED)),
    replace(EXAMPLE, completions=(replace(CHOSEN, ids=(5, 8, 2)), REJECTED)),
    replace(EXAMPLE, completions=(replace(CHOSEN, scored=(False, True, True)), REJECTED)),
    replace(EXAMPLE, completions=(REJECTED, CHOSEN)),
    replace(EXAMPLE, is_tie=True),
    replace(EXAMPLE, labels=(True, False)),
    replace(EXAMPLE, partner=REJECTED),
    replace(EXAMPLE, completions=(CHOSEN,), partner=REJECTED),
]


@pytest.mark.parametrize("other", OTHERS, ids=range(len(OTHERS)))
def test_whatever_changes_is_seen(other: TokenisedExample) -> None:
    rest = replace(EXAMPLE, example_id="rest")
    assert data_digest([other, rest]) != data_digest([EXAMPLE, rest])
    assert data_digest([rest, EXAMPLE]) != data_digest([EXAMPLE, rest])
    assert data_digest([EXAMPLE, rest]) == data_digest([replace(EXAMPLE), replace(rest)])


def test_a_strength_or_confidence_may_be_mended() -> None:
    assert data_digest([replace(EXAMPLE, confidence=None, strength=1.0)]) == data_digest([EXAMPLE])
