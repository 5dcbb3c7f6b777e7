"""Packs: the layout of one row, written out by hand."""

import numpy as np

from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.data.pack import Group, pack_of, pack_step


def tokens(prompt, *completions):
    return TokenisedExample(
        "id", tuple(prompt), tuple(TokenisedCompletion(tuple(ids), tuple(scored)) for ids, scored in completions)
    )


FIRST = tokens([10, 11, 12], ([1, 2, 3], [True] * 3), ([4, 5], [True] * 2))
SECOND = tokens([20], ([6, 7, 8], [True, False, True]))


def test_layout():
    pack = pack_of([FIRST, SECOND])
    assert pack.ids.tolist() == [10, 11, 12, 1, 2, 3, 4, 5, 20, 6, 7, 8]
    assert pack.positions.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2, 3]
    # the first token of each completion is predicted from the last token of its prompt
    assert pack.rows.tolist() == [2, 3, 4, 2, 6, 8, 10]
    assert pack.targets.tolist() == [1, 2, 3, 4, 5, 6, 8]
    assert pack.segments.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert pack.num_tokens.tolist() == [3, 2, 2]
    assert pack.groups == (Group(0, 3, (3, 2)), Group(8, 1, (3,)))
    assert (pack.num_groups, pack.num_completions) == (2, 3)
    assert all(array.dtype == np.int64 for array in (pack.ids, pack.rows, pack.num_tokens))


def test_unscored_tokens_are_context_and_no_targets():
    pack = pack_of([SECOND])
    assert 7 in pack.ids
    assert 7 not in pack.targets


def test_step_fills_packs_without_splitting_groups():
    sizes = [7, 3, 5, 2, 9]
    examples = [tokens([0] * (size - 1), ([1], [True])) for size in sizes]
    packs = pack_step(examples, tokens_per_pack=9)
    assert [[one.num_tokens for one in pack.examples] for pack in packs] == [[9], [7, 2], [5, 3]]
    alone = pack_step(examples, tokens_per_pack=1)
    assert [len(pack.examples) for pack in alone] == [1] * 5  # a group larger than the budget has its own pack
    assert pack_step([], 9) == []
