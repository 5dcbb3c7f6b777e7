"""A table of the losses over pairs: for each its formula in plain numpy and its gradient as derived by hand.

Nothing here is taken from the code: ``value`` is the docstring's equation, ``slopes`` its derivative on the two policy
log-probabilities. A loss of the margin alone gives both as functions of m; ``margin_case`` adds beta and the divergence.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.special import expit

from preftune.maths.losses.base import losses
from preftune.maths.types import PairLogps


@dataclass(frozen=True)
class Row:
    """One pair: log-probabilities of policy and reference, tokens, confidence of the label and strength."""

    pc: float
    pr: float
    rc: float
    rr: float
    tc: int = 4
    tr: int = 5
    c: float = 1.0
    d: float = 0.0

    @property
    def w(self):
        """Log-ratio of the chosen completion."""
        return self.pc - self.rc

    @property
    def v(self):
        """Log-ratio of the rejected one."""
        return self.pr - self.rr

    @property
    def swapped(self):
        return Row(self.pr, self.pc, self.rr, self.rc, self.tr, self.tc, self.c, self.d)


def logps_of(rows, grad=False, dtype=torch.float64):
    """The rows as a loss gets them."""
    t = torch.tensor([(r.pc, r.pr, r.rc, r.rr, r.d, r.c) for r in rows], dtype=dtype).T
    n = torch.tensor([(r.tc, r.tr) for r in rows], dtype=torch.int64).T
    policy = (one.clone().requires_grad_(grad) for one in t[:2])
    return PairLogps(*policy, t[2], t[3], n[0], n[1], strength=t[4], confidence=t[5])


def flip(row, o):
    """e: 1 - confidence where that is below 1, else the loss's own label smoothing."""
    return 1 - row.c if row.c < 1 else o.get("label_smoothing", 0.0)


def nls(x):
    """-log sigmoid(x)."""
    return np.logaddexp(0.0, -x)


SCORES = {  # divergence -> f'(e^r) - f'(1), and its derivative on r
    "reverse_kl": (lambda r, a: r, lambda r, a: 1.0),
    "forward_kl": (lambda r, a: 1 - np.exp(-r), lambda r, a: np.exp(-r)),
    "jensen_shannon": (lambda r, a: np.log(2 * np.exp(r) / (1 + np.exp(r))), lambda r, a: 1 / (1 + np.exp(r))),
    "alpha": (lambda r, a: (1 - np.exp(-a * r)) / a, lambda r, a: np.exp(-a * r)),
}


@dataclass(frozen=True)
class Case:
    """One loss: what its terms are and how they change.

    value(row, o) -> terms by name, without weights. slopes(row, o) -> d total / d policy chosen, and rejected.
    variants: options to try, with every default written out. bad: options that must be refused. only_margin: the same shift of
    both policy log-probabilities changes nothing. is_expectation: a confidence c gives c L(w, l) + (1 - c) L(l, w).
    rewards(row, o).
    """

    name: str
    value: object
    slopes: object
    rewards: object
    variants: tuple
    bad: tuple
    only_margin: bool = False
    is_expectation: bool = True
    weights: dict = field(default_factory=dict)

    def build(self, o):
        return losses.build(self.name, o)


def margin_case(name, loss, slope, variants, bad, margin=lambda m, row, o: m, divergences=True, **more):
    """A case whose loss and slope are functions of (m, e, row, o)."""

    def score(r, o, which):
        return SCORES[o.get("divergence", "reverse_kl")][which](r, o.get("divergence_alpha", 0.5))

    def m_of(row, o):
        return margin(o["beta"] * (score(row.w, o, 0) - score(row.v, o, 0)), row, o)

    def value(row, o):
        return {name: loss(m_of(row, o), flip(row, o), row, o)}

    def slopes(row, o):
        g = slope(m_of(row, o), flip(row, o), row, o) * o["beta"]
        return g * score(row.w, o, 1), -g * score(row.v, o, 1)

    def rewards(row, o):
        return o["beta"] * score(row.w, o, 0), o["beta"] * score(row.v, o, 0)

    if divergences:
        variants += tuple({**variants[0], "divergence": one} for one in SCORES)
        variants += ({**variants[0], "divergence": "alpha", "divergence_alpha": 0.2},)
        bad += ({"divergence": "total_variation"}, {"divergence_alpha": 0.0}, {"divergence_alpha": 1.0})
    return Case(name, value, slopes, rewards, variants, bad, only_margin=not more.get("keeps_shift"), **{
        key: one for key, one in more.items() if key != "keeps_shift"
    })  # fmt: skip


def plain_rewards(row, o):
    return o["beta"] * row.w, o["beta"] * row.v


def discopop(m, tau):
    s = expit(m / tau)
    return (1 - s) * nls(m) + s * np.exp(-m)


def discopop_slope(m, tau):
    s = expit(m / tau)
    return -(1 - s) * expit(-m) - s * np.exp(-m) + s * (1 - s) / tau * (np.exp(-m) - nls(m))


def offset(row, o):
    if row.d == 0:
        return 0.0
    return o["alpha"] * (np.log(row.d) if o["scaling"] == "log" else row.d)


def penalised(w, v, o):
    return o["beta"] * (w - v - o["lambda_p"] * max(0.0, -w))


def dpop_value(row, o):
    e = flip(row, o)
    return {"dpop": (1 - e) * nls(penalised(row.w, row.v, o)) + e * nls(penalised(row.v, row.w, o))}


def dpop_slopes(row, o):
    e = flip(row, o)
    label = -(1 - e) * o["beta"] * expit(-penalised(row.w, row.v, o))
    flipped = -e * o["beta"] * expit(-penalised(row.v, row.w, o))
    gain_w, gain_l = (1 + o["lambda_p"] * (r < 0) for r in (row.w, row.v))
    return label * gain_w - flipped, -label + flipped * gain_l


def nca_value(row, o):
    e, (w, v) = flip(row, o), plain_rewards(row, o)
    return {"nca_pair": (1 - e) * nls(w) + e * nls(v) + (nls(-w) + nls(-v)) / 2}


def nca_slopes(row, o):
    e, (w, v) = flip(row, o), plain_rewards(row, o)
    return o["beta"] * (expit(w) / 2 - (1 - e) * expit(-w)), o["beta"] * (expit(v) / 2 - e * expit(-v))


def bump(r):
    """The derivative of the sigmoid."""
    return expit(r) * expit(-r)


def apo_zero_value(row, o):
    e, (w, v) = flip(row, o), plain_rewards(row, o)
    return {"apo_zero": (1 - e) * (1 - expit(w) + expit(v)) + e * (1 - expit(v) + expit(w))}


def apo_zero_slopes(row, o):
    e, (w, v) = flip(row, o), plain_rewards(row, o)
    return -o["beta"] * (1 - 2 * e) * bump(w), o["beta"] * (1 - 2 * e) * bump(v)


def apo_down_value(row, o):
    e, (w, v) = flip(row, o), plain_rewards(row, o)
    return {"apo_down": (1 - e) * (expit(w) + 1 - expit(w - v)) + e * (expit(v) + 1 - expit(v - w))}


def apo_down_slopes(row, o):
    e, (w, v) = flip(row, o), plain_rewards(row, o)
    apart = (1 - 2 * e) * bump(w - v)
    return o["beta"] * ((1 - e) * bump(w) - apart), o["beta"] * (e * bump(v) + apart)


def probability(row, o):
    if row.c < 1 or "slope" not in o:
        return row.c if "slope" in o else 1.0
    return expit(o["slope"] * row.d) if o["slope"] > 0 and row.d > 0 else 1.0


def sppo(name):
    def target(row, o):
        return (probability(row, o) - 0.5) / o["beta"]

    return (
        lambda row, o: {name: (row.w - target(row, o)) ** 2 + (row.v + target(row, o)) ** 2},
        lambda row, o: (2 * (row.w - target(row, o)), 2 * (row.v + target(row, o))),
    )


def cpo_value(row, o):
    m, e = o["beta"] * (row.pc - row.pr), flip(row, o)
    terms = {"cpo": (1 - e) * nls(m) + e * nls(-m)}
    return terms | ({"nll": -row.pc} if o["alpha"] > 0 else {})


def cpo_slopes(row, o):
    m, e = o["beta"] * (row.pc - row.pr), flip(row, o)
    g = o["beta"] * (e - expit(-m))
    return g - o["alpha"], -g


def shaped(p, t, o):
    a = p / t
    return o["beta"] * (a if o["alpha"] == 0 else (1 - np.exp(a) ** -o["alpha"]) / o["alpha"])


def alphapo_value(row, o):
    m, e = shaped(row.pc, row.tc, o) - shaped(row.pr, row.tr, o) - o["gamma"], flip(row, o)
    return {"alphapo": (1 - e) * nls(m) + e * nls(-m)}


def alphapo_slopes(row, o):
    m, e = shaped(row.pc, row.tc, o) - shaped(row.pr, row.tr, o) - o["gamma"], flip(row, o)
    g = o["beta"] * (e - expit(-m))
    return g * np.exp(-o["alpha"] * row.pc / row.tc) / row.tc, -g * np.exp(-o["alpha"] * row.pr / row.tr) / row.tr


def exo(m, e, row, o):
    q = expit(m)
    return q * (np.log(q) - np.log(1 - e)) + (1 - q) * (-nls(-m) - np.log(e))


SMOOTHINGS = ({"label_smoothing": 0.5}, {"label_smoothing": -0.1})
BETAS = ({"beta": 0}, {"beta": -0.1}, {"beta": "x"}, {"betta": 0.1})

CASES = (
    margin_case(
        "hinge",
        lambda m, e, row, o: (1 - e) * max(0.0, 1 - m) + e * max(0.0, 1 + m),
        lambda m, e, row, o: -(1 - e) * (m < 1) + e * (m > -1),
        ({"beta": 0.1}, {"beta": 0.7}),
        (*BETAS, {"label_smoothing": 0.1}),
    ),
    margin_case(
        "robust",
        lambda m, e, row, o: ((1 - e) * nls(m) - e * nls(-m)) / (1 - 2 * e),
        lambda m, e, row, o: -((1 - e) * expit(-m) + e * expit(m)) / (1 - 2 * e),
        ({"beta": 0.1, "label_smoothing": 0.1}, {"beta": 0.4, "label_smoothing": 0.0}, {"beta": 0.2, "label_smoothing": 0.3}),
        (*BETAS, *SMOOTHINGS),
        is_expectation=False,
    ),
    margin_case(
        "exo_pair",
        exo,
        lambda m, e, row, o: bump(m) * (m - np.log((1 - e) / e)),
        ({"beta": 0.1, "label_smoothing": 1e-3}, {"beta": 0.4, "label_smoothing": 0.2}),
        (*BETAS, *SMOOTHINGS, {"label_smoothing": 0}),
        is_expectation=False,
    ),
    margin_case(
        "discopop",
        lambda m, e, row, o: (1 - e) * discopop(m, o["tau"]) + e * discopop(-m, o["tau"]),
        lambda m, e, row, o: (1 - e) * discopop_slope(m, o["tau"]) - e * discopop_slope(-m, o["tau"]),
        ({"beta": 0.1, "tau": 0.05}, {"beta": 0.02, "tau": 0.6}),
        (*BETAS, {"tau": 0}),
    ),
    margin_case(
        "odpo",
        lambda m, e, row, o: (1 - e) * nls(m - offset(row, o)) + e * nls(-m - offset(row, o)),
        lambda m, e, row, o: -(1 - e) * expit(offset(row, o) - m) + e * expit(m + offset(row, o)),
        ({"beta": 0.1, "alpha": 0.8, "scaling": "linear"}, {"beta": 0.3, "alpha": 0.7, "scaling": "log"}),
        (*BETAS, {"alpha": -1}, {"scaling": "square"}),
    ),
    margin_case(
        "r_dpo",
        lambda m, e, row, o: (1 - e) * nls(m) + e * nls(-m),
        lambda m, e, row, o: e - expit(-m),
        ({"beta": 0.1, "alpha": 0.05}, {"beta": 0.3, "alpha": 0.0}),
        (*BETAS, {"alpha": -1}),
        margin=lambda m, row, o: m + o["alpha"] * (row.tc - row.tr),
    ),
    Case("dpop", dpop_value, dpop_slopes, plain_rewards, ({"beta": 0.1, "lambda_p": 5.0}, {"beta": 0.3, "lambda_p": 0.0}),
         (*BETAS, {"lambda_p": -1})),
    Case("nca_pair", nca_value, nca_slopes, plain_rewards, ({"beta": 0.1}, {"beta": 0.5}), BETAS),
    Case("apo_zero", apo_zero_value, apo_zero_slopes, plain_rewards, ({"beta": 0.1}, {"beta": 0.5}), BETAS),
    Case("apo_down", apo_down_value, apo_down_slopes, plain_rewards, ({"beta": 0.1}, {"beta": 0.5}), BETAS),
    Case("sppo_hard", *sppo("sppo_hard"), plain_rewards, ({"beta": 0.1}, {"beta": 1e-3}), BETAS, is_expectation=False),
    Case("sppo_soft", *sppo("sppo_soft"), plain_rewards,
         ({"beta": 0.1, "slope": 0.0}, {"beta": 1e-3, "slope": 0.0}, {"beta": 0.2, "slope": 1.5}),
         (*BETAS, {"slope": -1}), is_expectation=False),
    Case("cpo", cpo_value, cpo_slopes, lambda row, o: (o["beta"] * row.pc, o["beta"] * row.pr),
         ({"beta": 0.1, "alpha": 1.0, "label_smoothing": 0.0}, {"beta": 0.3, "alpha": 0.0, "label_smoothing": 0.2},
          {"beta": 0.2, "alpha": 0.5, "label_smoothing": 0.1}),
         (*BETAS, *SMOOTHINGS, {"alpha": -1}), is_expectation=False, weights={"nll": "alpha"}),
    Case("alphapo", alphapo_value, alphapo_slopes, lambda row, o: (shaped(row.pc, row.tc, o), shaped(row.pr, row.tr, o)),
         ({"beta": 2.5, "alpha": 0.25, "gamma": 0.25, "label_smoothing": 0.0}, {"beta": 2.0, "alpha": 0.0, "gamma": 1.0},
          {"beta": 10.0, "alpha": -0.25, "gamma": 0.0, "label_smoothing": 0.1}),
         (*BETAS, *SMOOTHINGS, {"gamma": -1}, {"alpha": 11}), is_expectation=False),
)  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
VARIANTS = [(case, o) for case in CASES for o in case.variants]
IDS = [f"{case.name}-{'-'.join(str(one) for one in o.values())}" for case, o in VARIANTS]
