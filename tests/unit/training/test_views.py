"""Views against plain loops over the tokens."""

from dataclasses import replace

import pytest
import torch

from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.data.pack import pack_of
from preftune.maths.losses.base import BaseLoss
from preftune.maths.losses.dpo import DPO
from preftune.maths.losses.kto import KTO
from preftune.maths.losses.sft import SFT
from preftune.training.views import Mismatched, Scores, view_of


def completion(scored):
    return TokenisedCompletion(tuple(range(10, 10 + len(scored))), tuple(bool(one) for one in scored))


EXAMPLES = [
    TokenisedExample("a", (1, 3), (completion([1, 1, 1]), completion([1, 0, 1, 1])), strength=2.0, confidence=0.8),
    TokenisedExample("b", (1,), (completion([0, 1]), completion([1])), is_tie=True),
    TokenisedExample("c", (1, 4, 5), (completion([1, 1]), completion([1, 1, 0])), strength=1.0),
]
PACKS = [pack_of(EXAMPLES[:1]), pack_of(EXAMPLES[1:])]


class Everything(BaseLoss):
    needs = frozenset({"tokens", "concentration", "ties"})


def scores_of(packs):
    count = sum(len(pack.targets) for pack in packs)
    policy = -torch.arange(1.0, count + 1)
    return Scores(policy, policy * 10, policy * 100)


def by_hand(side):
    """Policy log-probability, pair and place of every scored token of one side; tokens are numbered from 1 in flat order."""
    at, found = 0, []
    for number, example in enumerate(EXAMPLES):
        for role, one in enumerate(example.completions):
            for place in range(sum(one.scored)):
                at += 1
                if role == side:
                    found.append((-float(at), number, place))
    return found


def test_pairs_with_everything():
    view = view_of(Everything(), PACKS, scores_of(PACKS))
    for side, tokens in enumerate((view.chosen, view.rejected)):
        expected = by_hand(side)
        assert tokens.policy.tolist() == [value for value, _, _ in expected]
        assert tokens.segments.tolist() == [pair for _, pair, _ in expected]
        assert tokens.places.tolist() == [place for _, _, place in expected]
        assert tokens.reference.tolist() == [10 * value for value, _, _ in expected]
        assert tokens.concentration.tolist() == [100 * value for value, _, _ in expected]
        logps = (view.policy_chosen, view.policy_rejected)[side].tolist()
        assert logps == [sum(value for value, pair, _ in expected if pair == number) for number in range(3)]
    assert view.strength.tolist() == [2.0, 0.0, 1.0]
    assert view.confidence.tolist() == pytest.approx([0.8, 1.0, 1.0])
    assert view.is_tie.tolist() == [False, True, False]
    assert view.chosen_tokens.tolist() == [3, 1, 2]


def test_packs_together_are_the_packs_one_by_one():
    whole = view_of(Everything(), PACKS, scores_of(PACKS))
    parts = [
        view_of(Everything(), [pack], Scores(*(one.split([6, 6])[at] for one in vars_of(scores_of(PACKS)))))
        for at, pack in enumerate(PACKS)
    ]
    assert torch.cat([part.policy_chosen for part in parts]).tolist() == whole.policy_chosen.tolist()
    assert torch.cat([part.chosen.places for part in parts]).tolist() == whole.chosen.places.tolist()


def vars_of(scores):
    return scores.policy, scores.reference, scores.concentration


def test_a_loss_is_given_no_more_than_it_needs():
    view = view_of(DPO(), PACKS, Scores(scores_of(PACKS).policy))
    assert view.chosen is None
    assert view.is_tie is None
    assert view.reference_chosen.tolist() == [0.0, 0.0, 0.0]


def test_unpaired():
    examples = [
        replace(EXAMPLES[0], labels=(True, False)),
        replace(EXAMPLES[1], completions=EXAMPLES[1].completions[:1], labels=(False,)),
    ]
    packs = [pack_of(examples)]
    partners = Mismatched(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -3.0]))
    view = view_of(KTO(), packs, scores_of(packs), partners)
    assert view.policy.tolist() == [-6.0, -15.0, -7.0]
    assert view.reference.tolist() == [-60.0, -150.0, -70.0]
    assert view.is_desirable.tolist() == [True, False, False]
    assert (view.mismatched_policy.tolist(), view.mismatched_reference.tolist()) == ([-1.0, -2.0], [-3.0, -3.0])
    assert partners.divergence.item() == 1.5
    with pytest.raises(ValueError, match="2 completions and 0 labels"):
        view_of(KTO(), PACKS, scores_of(PACKS), partners)


def test_demonstrations():
    assert view_of(SFT(), PACKS, scores_of(PACKS)).num_tokens.tolist() == [3, 3, 1, 1, 2, 2]
