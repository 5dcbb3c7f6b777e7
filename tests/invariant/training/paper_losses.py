"""Every loss as its paper prints it, on single tokens of a plain forward pass: nothing here is preftune's.

A formula takes all examples of a step and gives the step's loss, one number with a graph. What is said of a label (the
probability c that it is right) enters as an expectation over the label, unless the paper says what a probability does.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """One completion: log-probabilities of its scored tokens under policy and reference, and log sum p^2 at each."""

    tokens: Tensor
    reference: Tensor
    concentration: Tensor

    @property
    def p(self):
        return self.tokens.sum()

    @property
    def r(self):
        """Log-ratio of the whole completion."""
        return self.tokens.sum() - self.reference.sum()

    @property
    def length(self):
        return len(self.tokens)


@dataclass(frozen=True)
class Pair:
    """w: chosen, l: rejected. prompt: log-probabilities of the prompt's tokens from the second one on."""

    w: Side
    l: Side  # noqa: E741 -- the papers' y_l
    prompt: Tensor
    c: float = 1.0
    strength: float = 0.0
    is_tie: bool = False


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def swapped(pair):
    return replace(pair, w=pair.l, l=pair.w)


def doubted(formula, smoothing=0.0):
    """The expectation over the label; ``smoothing`` is the share of flips where a pair says nothing."""

    def of(pair):
        c = pair.c if pair.c < 1 else 1 - smoothing
        return c * formula(pair) + (1 - c) * formula(swapped(pair))

    return of


def over_pairs(formula):
    return lambda pairs: sum(formula(pair) for pair in pairs) / len(pairs)


SCORES = {  # f' of Table 1 of f-DPO, u = pi / ref
    "reverse_kl": lambda u: torch.log(u) + 1,
    "forward_kl": lambda u: -1 / u,
    "jensen_shannon": lambda u: torch.log(2 * u / (1 + u)),
    "alpha": lambda u: (1 - u**-0.5) / 0.5,
}


def dpo(beta, divergence="reverse_kl"):
    score = SCORES[divergence]
    return lambda y: -log_sigmoid(beta * (score(torch.exp(y.w.r)) - score(torch.exp(y.l.r))))


def odds(side):
    average = torch.exp(side.p / side.length)
    return average / (1 - average)


def orpo(weight, *, with_prompt):
    def nll(y):
        total = y.w.p + y.prompt.sum() if with_prompt else y.w.p
        return -total / (y.w.length + len(y.prompt) * with_prompt)

    ratio = doubted(lambda y: -log_sigmoid(torch.log(odds(y.w) / odds(y.l))))
    return lambda y: nll(y) + weight * ratio(y)


def robust(beta, smoothing):
    def of(y):
        e, m = 1 - y.c if y.c < 1 else smoothing, beta * (y.w.r - y.l.r)
        return (-(1 - e) * log_sigmoid(m) + e * log_sigmoid(-m)) / (1 - 2 * e)

    return of


def exo(beta, smoothing):
    def of(y):
        e = 1 - y.c if y.c < 1 else smoothing
        w, v = torch.exp(beta * y.w.r), torch.exp(beta * y.l.r)
        q = w / (w + v)
        return q * torch.log(q / (1 - e)) + (1 - q) * torch.log((1 - q) / e)

    return of


def simpo(beta, gamma, smoothing, reward=lambda a: a):
    """The target margin stays where it is when a label is doubted: both papers smooth the sigmoid alone."""

    def of(y):
        e = 1 - y.c if y.c < 1 else smoothing
        m = beta * (reward(y.w.p / y.w.length) - reward(y.l.p / y.l.length)) - gamma
        return -(1 - e) * log_sigmoid(m) - e * log_sigmoid(-m)

    return of


def odpo(beta, alpha):
    return doubted(lambda y: -log_sigmoid(beta * (y.w.r - y.l.r) - alpha * y.strength))


def sppo(beta, probability):
    def of(y):
        p = probability(y)
        return (y.w.r - (p - 0.5) / beta) ** 2 + (y.l.r - ((1 - p) - 0.5) / beta) ** 2

    return of


def win_rate(y):
    if y.c < 1:
        return y.c
    return 1 / (1 + math.exp(-1.5 * y.strength)) if y.strength > 0 else 1.0


def discopop(beta, tau):
    def of(y):
        m = beta * (y.w.r - y.l.r)
        return (1 - sigmoid(m / tau)) * -log_sigmoid(m) + sigmoid(m / tau) * torch.exp(-m)

    return doubted(of)


def ld_dpo(beta, alpha, smoothing):
    def reward(side, shared):
        ratios = side.tokens - side.reference
        return beta * (ratios[:shared].sum() + alpha * ratios[shared:].sum())

    def of(y):
        shared = min(y.w.length, y.l.length)
        return -log_sigmoid(reward(y.w, shared) - reward(y.l, shared))

    return doubted(of, smoothing)


def wpo(beta):
    def weight(side):
        return torch.exp((side.tokens.detach() - side.concentration).mean())

    return lambda y: weight(y.w) * weight(y.l) * doubted(dpo(beta))(y)


def with_ties(chances):
    """chances(strength of w, strength of l) -> P(w wins), P(tie)."""

    def of(y):
        strengths = torch.exp(0.3 * y.w.r), torch.exp(0.3 * y.l.r)
        if y.is_tie:
            return -torch.log(chances(*strengths)[1])
        return -y.c * torch.log(chances(*strengths)[0]) - (1 - y.c) * torch.log(chances(*strengths[::-1])[0])

    return over_pairs(of)


def rao_kupper(one, other, nu=3.0):
    return one / (one + nu * other), (nu**2 - 1) * one * other / ((one + nu * other) * (other + nu * one))


def davidson(one, other, nu=1.0):
    total = one + other + 2 * nu * torch.sqrt(one * other)
    return one / total, 2 * nu * torch.sqrt(one * other) / total


def transported(one, other, smoothing=0.1):
    """The cost of matching the i-th smallest of both."""
    gaps = [0.3 * (a - b) for a, b in zip(sorted(one, key=Tensor.item), sorted(other, key=Tensor.item), strict=True)]
    return sum(-(1 - smoothing) * log_sigmoid(d) - smoothing * log_sigmoid(-d) for d in gaps) / len(gaps)


def aot(pairs, smoothing=0.1):
    return transported([y.w.p - y.l.p for y in pairs], [y.w.reference.sum() - y.l.reference.sum() for y in pairs], smoothing)


def aot_unpaired(pairs):
    return transported([y.w.r for y in pairs], [y.l.r for y in pairs])


def bco(pairs):
    """At the first step: the running mean is that of this step."""
    d = sum((0.3 * (y.w.r + y.l.r)).item() for y in pairs) / (2 * len(pairs))
    return over_pairs(doubted(lambda y: -log_sigmoid(0.3 * y.w.r - d) - log_sigmoid(-(0.3 * y.l.r - d))))(pairs)


def nll(pairs):
    return -sum(y.w.p for y in pairs) / sum(y.w.length for y in pairs)


def mpo(pairs):
    preference, odds_ratio = over_pairs(doubted(dpo(0.3)))(pairs), over_pairs(orpo(0.4, with_prompt=True))(pairs)
    return 0.8 * preference + 0.5 * bco(pairs) + 0.3 * aot(pairs, 0.0) + 0.2 * nll(pairs) + 0.1 * odds_ratio


MPO = {
    "dpo": {"weight": 0.8, "beta": 0.3},
    "bco_pair": {"weight": 0.5, "beta": 0.3},
    "aot": {"weight": 0.3, "beta": 0.3},
    "sft": {"weight": 0.2},
    "orpo": {"weight": 0.1, "lambda_or": 0.4, "nll_scope": "prompt_and_answer"},
}
B = {"beta": 0.3}
PAIRED = {  # name -> (method, options, formula of one pair)
    "dpo, smoothed": ("dpo", B | {"label_smoothing": 0.1}, doubted(dpo(0.3), 0.1)),
    "dpo, by length, with NLL": (
        "dpo",
        {"beta": 3.0, "length_normalised": True, "rpo_alpha": 0.7},
        lambda y: doubted(lambda z: -log_sigmoid(3 * (z.w.r / z.w.length - z.l.r / z.l.length)))(y) - 0.7 * y.w.p / y.w.length,
    ),
    "dpo, reference-free": ("dpo", B | {"reference_free": True}, doubted(lambda y: -log_sigmoid(0.3 * (y.w.p - y.l.p)))),
    **{f"dpo, {name}": ("dpo", B | {"divergence": name}, doubted(dpo(0.3, name))) for name in SCORES},
    "ipo": ("ipo", {"tau": 0.4}, doubted(lambda y: (y.w.r - y.l.r - 1 / 0.8) ** 2)),
    "ipo, by length": (
        "ipo",
        {"tau": 0.4, "length_normalised": True},
        doubted(lambda y: (y.w.r / y.w.length - y.l.r / y.l.length - 1 / 0.8) ** 2),
    ),
    "hinge": ("hinge", B, doubted(lambda y: torch.clamp(1 - 0.3 * (y.w.r - y.l.r), min=0))),
    "robust": ("robust", B | {"label_smoothing": 0.2}, robust(0.3, 0.2)),
    "exo_pair": ("exo_pair", B | {"label_smoothing": 0.05}, exo(0.3, 0.05)),
    "simpo": ("simpo", {"beta": 2.0, "gamma": 0.7, "label_smoothing": 0.1}, simpo(2.0, 0.7, 0.1)),
    "alphapo": (
        "alphapo",
        {"beta": 2.5, "alpha": 0.25, "gamma": 0.4},
        simpo(2.5, 0.4, 0.0, lambda a: (1 - torch.exp(a) ** -0.25) / 0.25),
    ),
    "orpo": ("orpo", {"lambda_or": 0.4}, orpo(0.4, with_prompt=False)),
    "orpo, with prompts": ("orpo", {"lambda_or": 0.4, "nll_scope": "prompt_and_answer"}, orpo(0.4, with_prompt=True)),
    "odpo": ("odpo", B | {"alpha": 0.8}, odpo(0.3, 0.8)),
    "r_dpo": ("r_dpo", B | {"alpha": 0.05}, doubted(
        lambda y: -log_sigmoid(0.3 * (y.w.r - y.l.r) + 0.05 * (y.w.length - y.l.length)))),
    "dpop": ("dpop", B | {"lambda_p": 5.0}, doubted(
        lambda y: -log_sigmoid(0.3 * (y.w.r - y.l.r - 5 * torch.clamp(-y.w.r, min=0))))),
    "nca_pair": ("nca_pair", B, doubted(
        lambda y: -log_sigmoid(0.3 * y.w.r) - 0.5 * log_sigmoid(-0.3 * y.w.r) - 0.5 * log_sigmoid(-0.3 * y.l.r))),
    "sppo_hard": ("sppo_hard", {"beta": 0.1}, sppo(0.1, lambda y: 1.0)),
    "sppo_soft": ("sppo_soft", {"beta": 0.1, "slope": 1.5}, sppo(0.1, win_rate)),
    "apo_zero": ("apo_zero", B, doubted(lambda y: 1 - sigmoid(0.3 * y.w.r) + sigmoid(0.3 * y.l.r))),
    "apo_down": ("apo_down", B, doubted(lambda y: sigmoid(0.3 * y.w.r) + 1 - sigmoid(0.3 * (y.w.r - y.l.r)))),
    "discopop": ("discopop", B | {"tau": 0.4}, discopop(0.3, 0.4)),
    "ld_dpo": ("ld_dpo", B | {"alpha": 0.4, "label_smoothing": 0.1}, ld_dpo(0.3, 0.4, 0.1)),
    "wpo": ("wpo", B, wpo(0.3)),
}  # fmt: skip
PAIRS = {name: (method, options, over_pairs(formula)) for name, (method, options, formula) in PAIRED.items()} | {
    "rao_kupper": ("rao_kupper", B, with_ties(rao_kupper)),
    "davidson": ("davidson", B, with_ties(davidson)),
    "aot": ("aot", B | {"label_smoothing": 0.1}, aot),
    "aot_unpaired": ("aot_unpaired", B | {"label_smoothing": 0.1}, aot_unpaired),
    "bco_pair": ("bco_pair", B, bco),
    "cpo": (
        "cpo",
        B | {"alpha": 0.5},
        lambda pairs: over_pairs(doubted(lambda y: -log_sigmoid(0.3 * (y.w.p - y.l.p))))(pairs) + 0.5 * nll(pairs),
    ),
    "mix": ("mix", {"parts": MPO}, mpo),
}


def kto(sides, labels, partners):
    """z0 is the mean over the prompts' partners, at least 0; every completion counts once."""
    z0 = max(0.0, sum(one.r.item() for one in partners) / len(partners))
    return _labelled(sides, labels, z0)


def apo_zero_unpaired(sides, labels, partners):
    return _labelled(sides, labels, 0.0)


def _labelled(sides, labels, z0):
    values = [
        1.2 * (1 - sigmoid(0.3 * (side.r - z0))) if label else 0.8 * (1 - sigmoid(0.3 * (z0 - side.r)))
        for side, label in zip(sides, labels, strict=True)
    ]
    return sum(values) / len(values)


LABELLED = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired}
