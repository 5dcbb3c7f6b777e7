"""Mixes are the weighted sum of their parts, each by its own unit; and confidences make DPO conservative pair by pair."""

from dataclasses import replace

import pytest
import torch
from pair_rows import ROWS, logps

from preftune.core.errors import UsageError
from preftune.maths.losses.base import BaseLoss, StatefulLoss, losses
from preftune.maths.losses.dpo import DPO
from preftune.maths.losses.ipo import IPO
from preftune.maths.losses.mix import Mix
from preftune.maths.metrics import reduce_terms, term_shares
from preftune.maths.types import LossTerms, Term

COUNTS = {"pair": 3, "completion": 6, "token": 57, "chosen_token": 36}


def test_the_weighted_sum_of_its_parts_and_of_their_gradients():
    x, y = logps(ROWS, grad=True), logps(ROWS, grad=True)
    mix = losses.build("mix", {"parts": {"dpo": {"weight": 0.8, "beta": 0.3}, "ipo": {"tau": 0.5}, "sft": {"weight": 0.2}}})
    loss = reduce_terms(mix(x), COUNTS)
    dpo, ipo = DPO(beta=0.3)(y).terms["dpo"].values.mean(), IPO(tau=0.5)(y).terms["ipo"].values.mean()
    expected = 0.8 * dpo + ipo - 0.2 * y.policy_chosen.sum() / 36  # 4 + 2 + 30 chosen tokens
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(x.policy_chosen.grad, y.policy_chosen.grad)
    torch.testing.assert_close(x.policy_rejected.grad, y.policy_rejected.grad)
    shares = term_shares(mix(logps(ROWS)), COUNTS)  # in the log each part stands without its weight
    assert shares[0].item() == pytest.approx(dpo.item())
    assert tuple(mix(x).terms) == ("dpo", "ipo", "sft")


def test_rewards_are_those_of_the_first_part_that_has_them():
    out = Mix({"sft": {}, "ipo": {"tau": 0.5}, "dpo": {"beta": 3.0}})(logps(ROWS))
    torch.testing.assert_close(out.chosen_rewards, IPO(tau=0.5)(logps(ROWS)).chosen_rewards)


def test_a_part_of_several_terms_names_each():
    out = Mix({"dpo": {"rpo_alpha": 0.5}, "orpo": {"lambda_or": 0.3, "weight": 2}})(logps(ROWS))
    assert set(out.terms) == {"dpo/dpo", "dpo/nll", "orpo/nll", "orpo/odds_ratio"}
    assert out.terms["orpo/odds_ratio"].weight == pytest.approx(0.6)


def test_needs_are_those_of_the_parts():
    assert not Mix({"simpo": {}, "sft": {}}).needs_reference
    assert Mix({"simpo": {}, "dpo": {}}).needs_reference
    assert not Mix({"dpo": {}}).is_batchwise


class Running(BaseLoss):
    """A stateful part: its running mean is that of the chosen log-probabilities."""

    is_batchwise = True
    mean = 0.0

    def initial_state(self):
        return {"mean": 0.0}

    def advance(self, state, x):
        return {"mean": 0.5 * state["mean"] + 0.5 * float(x.policy_chosen.mean())}

    def at(self, state):
        moved = Running()
        moved.mean = state["mean"]
        return moved

    def __call__(self, x):
        return LossTerms({"running": Term(x.policy_chosen * 0 + self.mean, "pair")})


def test_the_state_of_a_part_is_kept_under_its_name():
    mix = Mix({"dpo": {}})
    from preftune.maths.losses.mix import Part

    object.__setattr__(mix, "built", (*mix.built, Part("running", 1.0, Running())))
    assert isinstance(mix, StatefulLoss)
    assert mix.is_batchwise
    assert mix.initial_state() == {"running/mean": 0.0}
    after = mix.advance(mix.initial_state(), logps(ROWS))
    assert after == {"running/mean": pytest.approx(-10.5)}
    assert mix.at(after)(logps(ROWS)).terms["running"].values.tolist() == [pytest.approx(-10.5)] * 3
    assert mix(logps(ROWS)).terms["running"].values.tolist() == [0.0] * 3, "the mix itself has not moved"


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({}, "name at least one"),
        ({"sft": {}}, "over pairs"),
        ({"kto": {}}, "parts.kto"),
        ({"mix": {"parts": {}}}, "no mix in it"),
        ({"dpo": {"weight": 0}}, "parts.dpo.weight"),
        ({"dpo": {"weight": "1"}}, "parts.dpo.weight"),
        ({"dpo": {"betta": 1}}, "did you mean 'beta'"),
        ({"dppo": {}}, "did you mean 'dpo'"),
        ({"dpo": {"beta": -1}}, "'beta'"),
    ],
)
def test_bad_parts_are_named(parts, word):
    with pytest.raises(UsageError, match=word):
        losses.build("mix", {"parts": parts})


def test_confidences_are_label_smoothing_pair_by_pair():
    x = replace(logps(ROWS), confidence=torch.tensor([0.9, 1.0, 0.7], dtype=torch.float64))
    got = DPO(label_smoothing=0.2)(x).terms["dpo"].values
    expected = [
        DPO(label_smoothing=e)(logps([row])).terms["dpo"].values.item() for row, e in zip(ROWS, (0.1, 0.2, 0.3), strict=True)
    ]
    assert got.tolist() == [pytest.approx(value, rel=1e-12) for value in expected]
    assert DPO()(x).terms["dpo"].values.tolist() != DPO()(logps(ROWS)).terms["dpo"].values.tolist()
