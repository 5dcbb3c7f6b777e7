"""Golden values of the losses over pairs, with the arithmetic written out; all on one pair, so that they can be compared.

The pair: log pi = -10 and -20, log ref = -12 and -15, 4 and 5 tokens. Log-ratios r_w = 2, r_l = -5; difference 7.
With beta = 0.1 the rewards are 0.2 and -0.5 and the margin m = 0.7.
"""

import math
from math import exp, log, log1p

import pytest
from pair_cases import Row, logps_of

from preftune.maths.losses.base import losses

SURE, DOUBTED, STRONG = (Row(-10.0, -20.0, -12.0, -15.0, 4, 5, c, d) for c, d in ((1.0, 0.0), (0.8, 0.0), (1.0, 2.0)))
FALLEN = Row(-14.0, -20.0, -12.0, -15.0)  # r_w = -2


def sigmoid(x):
    return 1 / (1 + exp(-x))


# loss, options, pair, terms
GOLDEN = [
    # max(0, 1 - 0.7)
    ("hinge", {}, SURE, {"hinge": 0.3}),
    # 0.8 max(0, 1 - 0.7) + 0.2 max(0, 1 + 0.7) = 0.24 + 0.34
    ("hinge", {}, DOUBTED, {"hinge": 0.58}),
    # m = 1.4: apart by one already
    ("hinge", {"beta": 0.2}, SURE, {"hinge": 0.0}),
    # [0.9 * 0.40319 - 0.1 * 1.10319] / 0.8 = (0.362869 - 0.110319) / 0.8
    ("robust", {"label_smoothing": 0.1}, SURE, {"robust": (0.9 * log1p(exp(-0.7)) - 0.1 * log1p(exp(0.7))) / 0.8}),
    # e = 0.2: [0.8 * 0.40319 - 0.2 * 1.10319] / 0.6 = 0.169853
    ("robust", {"label_smoothing": 0.1}, DOUBTED, {"robust": (0.8 * log1p(exp(-0.7)) - 0.2 * log1p(exp(0.7))) / 0.6}),
    # q = 0.668188: q log(q / 0.9) + (1 - q) log((1 - q) / 0.1)
    (
        "exo_pair",
        {"label_smoothing": 0.1},
        SURE,
        {"exo_pair": sigmoid(0.7) * log(sigmoid(0.7) / 0.9) + sigmoid(-0.7) * log(sigmoid(-0.7) / 0.1)},
    ),
    # log(1 + e^-0.2) + [log(1 + e^0.2) + log(1 + e^-0.5)] / 2
    ("nca_pair", {}, SURE, {"nca_pair": log1p(exp(-0.2)) + (log1p(exp(0.2)) + log1p(exp(-0.5))) / 2}),
    # 0.8 log(1 + e^-0.2) + 0.2 log(1 + e^0.5) + the same noise terms
    (
        "nca_pair",
        {},
        DOUBTED,
        {"nca_pair": 0.8 * log1p(exp(-0.2)) + 0.2 * log1p(exp(0.5)) + (log1p(exp(0.2)) + log1p(exp(-0.5))) / 2},
    ),
    # 1 - sigmoid(0.2) + sigmoid(-0.5) = 0.450166 + 0.377541
    ("apo_zero", {}, SURE, {"apo_zero": 1 - sigmoid(0.2) + sigmoid(-0.5)}),
    # sigmoid(0.2) + 1 - sigmoid(0.7) = 0.549834 + 0.331812
    ("apo_down", {}, SURE, {"apo_down": sigmoid(0.2) + 1 - sigmoid(0.7)}),
    # s = sigmoid(0.7 / 0.35) = sigmoid(2) = 0.880797: (1 - s) 0.403186 + s e^-0.7
    (
        "discopop",
        {"tau": 0.35},
        SURE,
        {"discopop": (1 - sigmoid(2.0)) * log1p(exp(-0.7)) + sigmoid(2.0) * exp(-0.7)},
    ),
    # the offset is 0.5 * 2 = 1: log(1 + e^(1 - 0.7))
    ("odpo", {"alpha": 0.5}, STRONG, {"odpo": log1p(exp(0.3))}),
    # the offset is 0.5 log 2 = 0.346574
    ("odpo", {"alpha": 0.5, "scaling": "log"}, STRONG, {"odpo": log1p(exp(0.5 * log(2.0) - 0.7))}),
    # no strength, no offset: DPO's 0.403186
    ("odpo", {"alpha": 0.5}, SURE, {"odpo": log1p(exp(-0.7))}),
    # m = 0.7 + 0.1 (4 - 5) = 0.6: the shorter completion was chosen in spite of its length
    ("r_dpo", {"alpha": 0.1}, SURE, {"r_dpo": log1p(exp(-0.6))}),
    # r_w = 2 > 0: no penalty, DPO's value
    ("dpop", {"lambda_p": 5.0}, SURE, {"dpop": log1p(exp(-0.7))}),
    # r_w = -2, r_l = -5: 0.1 (3 - 5 * 2) = -0.7
    ("dpop", {"lambda_p": 5.0}, FALLEN, {"dpop": log1p(exp(0.7))}),
    # (2 - 5)^2 + (-5 + 5)^2
    ("sppo_hard", {"beta": 0.1}, SURE, {"sppo_hard": 9.0}),
    # p = 0.8: targets of 3 and -3: (2 - 3)^2 + (-5 + 3)^2
    ("sppo_soft", {"beta": 0.1}, DOUBTED, {"sppo_soft": 5.0}),
    # p = sigmoid(2 log(2)) = 0.8 again, from a strength of 2
    ("sppo_soft", {"beta": 0.1, "slope": log(2.0)}, STRONG, {"sppo_soft": 5.0}),
    # without a probability it is the hard form
    ("sppo_soft", {"beta": 0.1}, STRONG, {"sppo_soft": 9.0}),
    # m = 0.1 (-10 + 20) = 1, and 10 nats of NLL
    ("cpo", {"beta": 0.1}, SURE, {"cpo": log1p(exp(-1.0)), "nll": 10.0}),
    ("cpo", {"beta": 0.1, "alpha": 0.0}, SURE, {"cpo": log1p(exp(-1.0))}),
    # a = -2.5 and -4; r = 2 (1 - e^1.25) / 0.5 = -9.961372 and 2 (1 - e^2) / 0.5 = -25.556224; m = 15.594853 - 1
    (
        "alphapo",
        {"beta": 2.0, "alpha": 0.5, "gamma": 1.0},
        SURE,
        {"alphapo": log1p(exp(-(4 * (exp(2.0) - exp(1.25)) - 1.0)))},
    ),
    # forward_kl: f' = 1 - e^-2 = 0.864665 and 1 - e^5 = -147.413159: m = 14.827782
    ("dpo", {"divergence": "forward_kl"}, SURE, {"dpo": log1p(exp(-0.1 * (exp(5.0) - exp(-2.0))))}),
    # jensen_shannon: log 2 + log sigmoid(2) = 0.566219 and log 2 + log sigmoid(-5) = -4.313568: m = 0.487979
    ("dpo", {"divergence": "jensen_shannon"}, SURE, {"dpo": log1p(exp(-0.1 * (log(sigmoid(2.0)) - log(sigmoid(-5.0)))))}),
    # alpha 0.5: (1 - e^-1) / 0.5 = 1.264241 and (1 - e^2.5) / 0.5 = -22.364988: m = 2.362923
    ("dpo", {"divergence": "alpha"}, SURE, {"dpo": log1p(exp(-0.1 * 2 * (exp(2.5) - exp(-1.0))))}),
    # the same inside the hinge: 1 - 0.487979
    ("hinge", {"divergence": "jensen_shannon"}, SURE, {"hinge": 1 - 0.1 * (log(sigmoid(2.0)) - log(sigmoid(-5.0)))}),
    # ipo, tau 0.5: h = 4.879787, target 1
    ("ipo", {"tau": 0.5, "divergence": "jensen_shannon"}, SURE, {"ipo": (log(sigmoid(2.0)) - log(sigmoid(-5.0)) - 1) ** 2}),
    # a confidence of 0.8 moves IPO's target: 0.8 (7 - 1)^2 + 0.2 (7 + 1)^2 = 28.8 + 12.8
    ("ipo", {"tau": 0.5}, DOUBTED, {"ipo": 41.6}),
    # simpo: 2 (-2.5 + 4) - 1 = 2
    ("simpo", {}, DOUBTED, {"simpo": 0.8 * log1p(exp(-2.0)) + 0.2 * log1p(exp(2.0))}),
]


@pytest.mark.parametrize(("name", "options", "row", "expected"), GOLDEN)
def test_golden(name, options, row, expected):
    out = losses.build(name, options)(logps_of([row]))
    assert {key: term.values.item() for key, term in out.terms.items()} == {
        key: pytest.approx(value, abs=1e-12) for key, value in expected.items()
    }


def test_the_written_numbers_are_those_of_the_formulas():
    """The comments above, to their digits."""
    by = {(name, *map(str, options.values()), row.c, row.d): expected for name, options, row, expected in GOLDEN}
    assert by["robust", "0.1", 0.8, 0.0]["robust"] == pytest.approx(0.169853, abs=1e-6)
    assert by["nca_pair", 1.0, 0.0]["nca_pair"] == pytest.approx(0.598139 + (0.798139 + 0.474077) / 2, abs=1e-6)
    assert by["apo_zero", 1.0, 0.0]["apo_zero"] == pytest.approx(0.450166 + 0.377541, abs=1e-6)
    assert by["apo_down", 1.0, 0.0]["apo_down"] == pytest.approx(0.549834 + 0.331812, abs=1e-6)
    assert by["odpo", "0.5", 1.0, 2.0]["odpo"] == pytest.approx(0.854355, abs=1e-6)
    assert by["dpo", "jensen_shannon", 1.0, 0.0]["dpo"] == pytest.approx(math.log1p(math.exp(-0.487979)), abs=1e-6)
    assert by["dpo", "alpha", 1.0, 0.0]["dpo"] == pytest.approx(math.log1p(math.exp(-2.362923)), abs=1e-6)


def test_orpo_with_a_confidence():
    # a = -2.5 and -4; p = 0.082085 and 0.018316; o = log(0.089425) - log(0.018657) = 1.567265
    o = log(0.08208499862 / (1 - 0.08208499862)) - log(0.01831563889 / (1 - 0.01831563889))
    out = losses.build("orpo", {})(logps_of([DOUBTED]))
    assert out.terms["odds_ratio"].values.item() == pytest.approx(0.8 * log1p(exp(-o)) + 0.2 * log1p(exp(o)), abs=1e-8)
    assert out.terms["nll"].values.item() == pytest.approx(2.5, abs=1e-12)
