"""Partners: of another prompt, from content alone, within the length limit."""

import random
from dataclasses import replace

import pytest

from preftune.core.errors import InputError
from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.data.partners import partner_group, with_partners


def example(prompt, *answers):
    completions = tuple(TokenisedCompletion(tuple(ids), (True,) * len(ids)) for ids in answers)
    return TokenisedExample(f"{prompt}-{answers}", (1, prompt), completions, labels=(True,) * len(answers))


ROWS = [example(p, [p, 2], [p, p, 2]) for p in range(10, 18)] + [example(10, [7, 2]), example(10, [8, 8, 8, 2])]


def test_partners_are_completions_of_other_prompts():
    theirs = {
        row.prompt_ids: {one for other in ROWS if other.prompt_ids != row.prompt_ids for one in other.completions} for row in ROWS
    }
    found = with_partners(ROWS, 64)
    assert [replace(one, partner=None) for one in found] == ROWS, "nothing else changes, the order neither"
    for row in found:
        assert row.partner in theirs[row.prompt_ids]
    assert len({row.partner for row in found}) >= len({row.prompt_ids for row in ROWS})


def test_examples_of_one_prompt_take_the_next_prompts_completions_in_turn():
    """Else the reference point would be that of one completion, however many rows a prompt has."""
    many = [example(20, [at, 2]) for at in range(3, 7)]
    found = with_partners([*many, example(21, [7, 2], [8, 2], [9, 2], [10, 2])], 64)
    assert len({row.partner for row in found[:4]}) == 4


def test_order_plays_no_part():
    whole = {row.example_id: row.partner for row in with_partners(ROWS, 64)}
    for seed in range(5):
        shuffled = random.Random(seed).sample(ROWS, len(ROWS))
        assert {row.example_id: row.partner for row in with_partners(shuffled, 64)} == whole


def test_a_partner_that_does_not_fit_is_cut():
    for row in with_partners(ROWS, 4):
        assert len(row.prompt_ids) + len(row.partner.ids) <= 4
    cut = [row.partner for row in with_partners(ROWS, 4) if row.partner.is_cut]
    assert cut
    assert all(len(one.ids) == 2 for one in cut)


def test_a_partner_without_a_scored_token_is_passed_over():
    silent = replace(ROWS[0], prompt_ids=(1, 99), completions=(TokenisedCompletion((5, 6, 2), (False, False, True)),))
    for row in with_partners([*ROWS, silent], 4):
        assert any(row.partner.scored)


def test_one_prompt_is_refused():
    with pytest.raises(InputError, match="all 2 examples have one prompt"):
        with_partners(ROWS[-2:], 64)
    assert with_partners([], 64) == []


def test_a_small_set_may_borrow():
    alone = [one for one in ROWS if one.prompt_ids == (1, 10)]
    found = with_partners(alone, 64, ROWS)
    assert [replace(one, partner=None) for one in found] == alone
    strangers = {completion for row in ROWS if row.prompt_ids != (1, 10) for completion in row.completions}
    assert all(one.partner in strangers for one in found)
    assert with_partners(ROWS, 64, [example(5, [9, 2])]) == with_partners(ROWS, 64), "a set of its own borrows nothing"


def test_the_group_that_is_scored():
    row = with_partners(ROWS, 64)[0]
    group = partner_group(row)
    assert group.completions == (row.partner,)
    assert group.prompt_ids == row.prompt_ids
    with pytest.raises(ValueError, match="has no partner"):
        partner_group(ROWS[0])
