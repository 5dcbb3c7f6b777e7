"""Metrics are exact over pairs: sums add up over packs, and the mean of batch means is shown to differ."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.maths.logps import pair_index, pairs_of, sum_by_completion
from preftune.maths.losses.apo_zero_unpaired import APOZeroUnpaired
from preftune.maths.losses.dpo import DPO
from preftune.maths.losses.sft import SFT
from preftune.maths.metrics import PAIR_METRICS, pair_means, pair_sums, reduce_terms, unpaired_means, unpaired_sums
from preftune.maths.types import LossTerms, PairLogps, SequenceLogps, Term, UnpairedLogps

nats = st.floats(-200, 0)
rows_of = st.lists(st.tuples(nats, nats, nats, nats), min_size=1, max_size=12)


def logps(rows):
    t = torch.tensor(rows, dtype=torch.float64).T
    n = torch.ones(len(rows), dtype=torch.int64)
    return PairLogps(t[0], t[1], t[2], t[3], n, n)


def means(rows):
    x = logps(rows)
    return pair_means(pair_sums(x, DPO()(x)).tolist(), len(rows))


def test_golden_values():
    # margins of beta 0.1: (2 - -5) * .1 = .7, (0 - 1) * .1 = -.1, and a tie: wins 1 + 0 + 1/2 of 3
    rows = [(-10.0, -20.0, -12.0, -15.0), (-1.0, -1.0, -1.0, -2.0), (-4.0, -4.0, -4.0, -4.0)]
    assert means(rows) == {
        "rewards/chosen": pytest.approx(0.2 / 3),
        "rewards/rejected": pytest.approx((-0.5 + 0.1) / 3),
        "rewards/margins": pytest.approx((0.7 - 0.1) / 3),
        "rewards/accuracies": pytest.approx(0.5),
        "logps/chosen": pytest.approx(-5.0),
        "logps/rejected": pytest.approx(-25 / 3),
        "logps/chosen_change": pytest.approx(2 / 3),
        "logps/rejected_change": pytest.approx(-4 / 3),
        "logps/chosen_change_per_token": pytest.approx(2 / 3),
        "logps/rejected_change_per_token": pytest.approx(-4 / 3),
    }


def test_a_change_per_token_is_by_the_completions_own_tokens():
    one = torch.tensor([-10.0], dtype=torch.float64)
    x = PairLogps(one, one, one - 6, one + 6, torch.tensor([2]), torch.tensor([3]))  # 6 / 2 and -6 / 3
    found = pair_means(pair_sums(x, DPO()(x)).tolist(), 1)
    assert [found[f"logps/{side}_change_per_token"] for side in ("chosen", "rejected")] == [3.0, -2.0]
    assert [found[f"logps/{side}_change"] for side in ("chosen", "rejected")] == [6.0, -6.0]


def test_a_tie_is_half_won_whatever_its_margin():
    """Margins of .7, -.1 and 0: a win, a loss and an undecided pair; a tie counts one half in place of what its margin says."""
    x = logps([(-10.0, -20.0, -12.0, -15.0), (-1.0, -1.0, -1.0, -2.0), (-4.0, -4.0, -4.0, -4.0)])
    for ties, expected in (([False] * 3, 1.5), ([True, False, False], 1.0), ([False, True, False], 2.0), ([True] * 3, 1.5)):
        tied = replace(x, is_tie=torch.tensor(ties))
        assert pair_sums(tied, DPO()(x))[PAIR_METRICS.index("rewards/accuracies")].item() == expected


def test_each_label_has_its_own_sums_and_its_own_count():
    n, label = torch.ones(5, dtype=torch.int64), torch.tensor([True, False, True, False, False])
    x = UnpairedLogps(-torch.arange(1.0, 6.0), torch.zeros(5), n, label)  # desirable -1 and -3, undesirable -2, -4 and -5
    sums = unpaired_sums(x, APOZeroUnpaired(beta=0.5)(x)).tolist()
    assert sums == [-2.0, -4.0, -5.5, -11.0]
    assert unpaired_means(sums, 2, 3) == {
        "rewards/chosen": -1.0,
        "logps/chosen": -2.0,
        "rewards/rejected": pytest.approx(-5.5 / 3),
        "logps/rejected": pytest.approx(-11 / 3),
        "rewards/margins": pytest.approx(-1 + 5.5 / 3),
    }


@given(rows_of, st.integers(1, 5))
def test_sums_of_packs_add_up(rows, k):
    parts = [logps(rows[i : i + k]) for i in range(0, len(rows), k)]
    sums = torch.stack([pair_sums(part, DPO()(part)) for part in parts]).sum(0)
    for name, value in pair_means(sums.tolist(), len(rows)).items():
        assert value == pytest.approx(means(rows)[name], abs=1e-9)


def test_a_mean_of_batch_means_is_another_number():
    win, loss = (-10.0, -20.0, -12.0, -15.0), (-1.0, -1.0, -1.0, -2.0)
    of_means = (means([win, win, win])["rewards/accuracies"] + means([loss])["rewards/accuracies"]) / 2
    assert (of_means, means([win, win, win, loss])["rewards/accuracies"]) == (0.5, 0.75)


@given(rows_of)
def test_accuracy_of_swapped_pairs_is_the_complement(rows):
    swapped = [(c, a, f, d) for a, c, d, f in rows]
    assert means(rows)["rewards/accuracies"] + means(swapped)["rewards/accuracies"] == pytest.approx(1.0)


def test_sft_has_no_rewards():
    x = SequenceLogps(torch.tensor([-1.0]), torch.tensor([1]))
    with pytest.raises(ValueError, match="no rewards"):
        pair_sums(logps([(0.0, 0.0, 0.0, 0.0)]), SFT()(x))


def test_terms_of_different_units_are_divided_by_their_own_count():
    # (1 + 2) / 4 pairs + 0.5 * (3 + 4 + 5) / 10 tokens
    terms = {"a": Term(torch.tensor([1.0, 2.0]), "pair"), "b": Term(torch.tensor([3.0, 4.0, 5.0]), "token", 0.5)}
    assert reduce_terms(LossTerms(terms), {"pair": 4, "token": 10}).item() == pytest.approx(0.75 + 0.6)


@given(st.lists(st.lists(nats, min_size=1, max_size=9), min_size=1, max_size=6))
def test_sum_by_completion(tokens):
    flat = torch.tensor([value for one in tokens for value in one], dtype=torch.float64)
    segments = torch.tensor([index for index, one in enumerate(tokens) for _ in one])
    out = sum_by_completion(flat, segments, torch.tensor([len(one) for one in tokens]))
    torch.testing.assert_close(out.logps, torch.tensor([sum(one) for one in tokens], dtype=torch.float64))


@pytest.mark.parametrize("seed", range(8))  # float32 sums are right by chance in some
def test_sums_do_not_depend_on_what_stands_before(seed):
    values = torch.rand(500, generator=torch.Generator().manual_seed(seed)) * -20
    alone = sum_by_completion(values, torch.zeros(500, dtype=torch.int64), torch.tensor([500])).logps[0]
    after = sum_by_completion(
        torch.cat([torch.full((77,), -1e3), values]),
        torch.cat([torch.zeros(77, dtype=torch.int64), torch.ones(500, dtype=torch.int64)]),
        torch.tensor([77, 500]),
    ).logps[1]
    assert torch.equal(alone, after)
    assert torch.equal(alone, values.double().sum().float()), "one rounding, at the end"


def test_pair_view_and_its_gradient():
    policy = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    n = torch.tensor([1, 2, 3, 4])
    x = pairs_of(SequenceLogps(policy, n), SequenceLogps(policy.detach() - 1, n), *pair_index([2, 2]))
    assert x.policy_chosen.tolist() == [-1.0, -3.0]
    assert x.rejected_logratio.tolist() == [1.0, 1.0]
    assert x.chosen_tokens.tolist() == [1, 3]
    assert x.rejected_tokens.tolist() == [2, 4]
    x.policy_rejected.sum().backward()
    assert policy.grad.tolist() == [0.0, 1.0, 0.0, 1.0]
    bare = pairs_of(SequenceLogps(policy, n), None, *pair_index([2, 2]))
    assert bare.reference_chosen.tolist() == [0.0, 0.0]


def test_a_group_that_is_no_pair_is_named():
    with pytest.raises(ValueError, match="group 1 holds 3"):
        pair_index([2, 3])


def test_names_are_trls():
    assert PAIR_METRICS[:4] == ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
