"""Each setting of sampling does what its API says, and a row's tokens depend on nothing beside it."""

import math

import pytest
import torch

from preftune.serving.protocol import Sampling
from preftune.serving.sampling import Stream, choose

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def frequencies(sampling, count=4000, prompt=(), told=()):
    """How often each token comes first, over many seeds, in one batch."""
    streams = [Stream(Sampling(**{"seed": seed, **sampling}), prompt, 0) for seed in range(count)]
    for stream in streams:
        for token in told:
            stream.told(token)
    tokens = torch.tensor(choose(LOGITS.expand(count, -1), streams))
    return torch.bincount(tokens, minlength=len(LOGITS)).double() / count


def softmax(values):
    total = sum(math.exp(value) for value in values)
    return torch.tensor([math.exp(value) / total for value in values], dtype=torch.float64)


CASES = {
    "plain": ({}, [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]),
    "hot": ({"temperature": 2.0}, [1.0, 0.5, 0.25, 0.0, -0.5, -1.5]),
    "top_k": ({"top_k": 2}, [2.0, 1.0, -math.inf, -math.inf, -math.inf, -math.inf]),
    # probabilities .56 .21 .12 .08 .03 .00: .7 is reached with the second, .8 with the third
    "top_p": ({"top_p": 0.7}, [2.0, 1.0, -math.inf, -math.inf, -math.inf, -math.inf]),
    "top_p more": ({"top_p": 0.8}, [2.0, 1.0, 0.5, -math.inf, -math.inf, -math.inf]),
    "top_p of top_k": ({"top_k": 2, "top_p": 0.7}, [2.0, -math.inf, -math.inf, -math.inf, -math.inf, -math.inf]),
    "top_p 0": ({"top_p": 0.0}, [2.0, -math.inf, -math.inf, -math.inf, -math.inf, -math.inf]),
    "min_p": ({"min_p": 0.2}, [2.0, 1.0, 0.5, -math.inf, -math.inf, -math.inf]),
    "bias": ({"logit_bias": {0: -100.0, 4: 2.0}}, [-98.0, 1.0, 0.5, 0.0, 1.0, -3.0]),
    # the answer so far has token 0 twice, token 4 once
    "presence": ({"presence_penalty": 1.5}, [0.5, 1.0, 0.5, 0.0, -2.5, -3.0]),
    "frequency": ({"frequency_penalty": 0.5}, [1.0, 1.0, 0.5, 0.0, -1.5, -3.0]),
    # of prompt (1) and answer (0, 4): positive logits shrink, negative ones grow
    "repetition": ({"repetition_penalty": 2.0}, [1.0, 0.5, 0.5, 0.0, -2.0, -3.0]),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_come_as_often_as_they_should(case):
    sampling, logits = CASES[case]
    wanted = softmax(logits)
    got = frequencies(sampling, prompt=(1,), told=(0, 4, 0))
    spread = torch.sqrt(wanted * (1 - wanted) / 4000)
    assert bool(((got - wanted).abs() <= 4.5 * spread + 1e-9).all()), (got, wanted)


def test_greedy_takes_the_best_and_draws_no_number():
    stream = Stream(Sampling(temperature=0.0, seed=0), (), 0)
    assert choose(LOGITS[None], [stream]) == [0]
    assert stream.number() == Stream(Sampling(seed=0), (), 0).number()


def test_a_forbidden_token_does_not_come():
    stream = Stream(Sampling(temperature=0.0), (), 0)
    stream.forbid([0, 1])
    assert choose(LOGITS[None], [stream]) == [2]
    stream.forbid([])
    assert choose(LOGITS[None], [stream]) == [0]


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9}, {"top_k": 700}, {"min_p": 0.01, "temperature": 1.3}, {"top_p": 0.999}])
def test_company_changes_nothing(sampling):
    """Beside rows of other settings, and with a vocabulary that a shortlist does not hold."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5000, generator=generator)
    for seed in range(20):
        own = Stream(Sampling(seed=seed, **sampling), (), 0)
        others = [Stream(Sampling(temperature=0.0), (), 0), Stream(Sampling(seed=9, top_p=0.2, presence_penalty=1), (), 0)]
        single = [choose(logits[1:2], [Stream(Sampling(seed=seed, **sampling), (), 0)])[0]]
        assert choose(logits, [others[0], own, others[1]])[1:2] == single


def test_choices_of_one_seed_differ_and_seeds_repeat():
    logits = torch.zeros(1, 1000)
    first = [choose(logits, [Stream(Sampling(seed=3), (), index)])[0] for index in range(5)]
    assert len(set(first)) > 3
    assert first == [choose(logits, [Stream(Sampling(seed=3), (), index)])[0] for index in range(5)]
    assert len({choose(logits, [Stream(Sampling(), (), 0)])[0] for _ in range(5)}) > 1
