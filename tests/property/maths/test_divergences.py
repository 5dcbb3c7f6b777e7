"""f-divergences: the derivative of f as printed, and a refusal by name wherever the derivation does not hold."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_cases import Row, logps_of

from preftune.core.errors import UnknownName, UsageError
from preftune.maths.divergence import divergence_score
from preftune.maths.losses.base import losses

# f as printed in Table 1 of the paper, f(1) = 0; the score is f' - f'(1), checked by differences of f itself
F = {
    "reverse_kl": lambda u, a: u * np.log(u),
    "forward_kl": lambda u, a: -np.log(u),
    "jensen_shannon": lambda u, a: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
    "alpha": lambda u, a: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
}
ANCHORED = {"dpo", "ipo", "hinge", "robust", "exo_pair", "discopop", "odpo", "r_dpo"}


@pytest.mark.parametrize("name", F)
@given(r=st.floats(-3, 3), alpha=st.floats(0.05, 0.95))
def test_the_score_is_the_derivative_of_f(name, r, alpha):
    step = 1e-5

    def slope(u):
        return (F[name](u + step * u, alpha) - F[name](u - step * u, alpha)) / (2 * step * u)

    got = divergence_score(torch.tensor([r], dtype=torch.float64), name, alpha).item()
    assert got == pytest.approx(slope(np.exp(r)) - slope(1.0), rel=1e-5, abs=1e-5)


def test_alpha_runs_from_reverse_to_forward_kl():
    r = torch.linspace(-4, 4, 9, dtype=torch.float64)
    torch.testing.assert_close(divergence_score(r, "alpha", 1e-9), divergence_score(r, "reverse_kl", 0.5), rtol=1e-6, atol=1e-6)
    close = divergence_score(r, "alpha", 1 - 1e-9)
    torch.testing.assert_close(close, divergence_score(r, "forward_kl", 0.5), rtol=1e-6, atol=1e-6)


def test_far_policies_give_finite_scores_and_gradients():
    for name in F:
        r = torch.tensor([-1e4, 1e4], requires_grad=True)
        score = divergence_score(r, name, 0.5)
        assert torch.isfinite(score).all()
        (score[1] - score[0]).backward()
        assert torch.isfinite(r.grad).all()


def test_losses_of_the_reward_difference_take_the_option_and_no_others():
    for name in losses.names():
        options = {field.name for field in dataclasses.fields(losses.factory(name))}
        assert ("divergence" in options) is (name in ANCHORED), name
        if name not in ANCHORED:
            with pytest.raises(UnknownName, match="divergence"):
                losses.build(name, {"divergence": "forward_kl"})


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_by_length_is_refused_with_the_reason(name):
    with pytest.raises(UsageError, match=r"option 'divergence': jensen_shannon is derived for log-ratios of whole completions"):
        losses.build(name, {"divergence": "jensen_shannon", "length_normalised": True})
    losses.build(name, {"length_normalised": True})


@pytest.mark.parametrize("name", ["dpo", "ipo"])
@pytest.mark.parametrize("divergence", F)
def test_the_chain_rule_through_dpo_and_ipo(name, divergence):
    """dL/d log pi = dL/dh times the gradient that the docstring of divergence_score gives."""
    rows = [Row(-10.0, -20.0, -12.0, -15.0), Row(-3.0, -1.0, -2.0, -2.5, c=0.9)]
    slopes = {
        "reverse_kl": lambda r: 1.0, "forward_kl": lambda r: np.exp(-r), "jensen_shannon": lambda r: 1 / (1 + np.exp(r)),
        "alpha": lambda r: np.exp(-0.3 * r),
    }  # fmt: skip
    x = logps_of(rows, grad=True)
    options = {"divergence": divergence, "divergence_alpha": 0.3}
    loss = losses.build(name, options | ({"beta": 0.2} if name == "dpo" else {"tau": 0.2}))
    out = loss(x)
    out.terms[name].values.sum().backward()
    h = ((out.chosen_rewards - out.rejected_rewards) / 0.2).numpy()
    e = np.array([0.0, 0.1])
    outer = 0.2 * (e - 1 / (1 + np.exp(0.2 * h))) if name == "dpo" else 2 * (h - (1 - 2 * e) * 2.5)
    inner = [(slopes[divergence](row.w), slopes[divergence](row.v)) for row in rows]
    np.testing.assert_allclose(x.policy_chosen.grad.numpy(), outer * [one[0] for one in inner], rtol=1e-9)
    np.testing.assert_allclose(x.policy_rejected.grad.numpy(), -outer * [one[1] for one in inner], rtol=1e-9)
