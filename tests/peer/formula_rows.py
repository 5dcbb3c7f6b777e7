"""Random rows for the comparison with the peer's formulas, and what a loss of ours makes of them."""

import copy
import random

import torch

from preftune.maths.logps import sum_by_completion
from preftune.maths.losses.base import StatefulLoss
from preftune.maths.metrics import reduce_terms
from preftune.maths.types import PairLogps, SequenceLogps, TokenLogps, UnpairedLogps

VOCABULARY = 7


def completion(rng, drift=0.0):
    """Log-probabilities of a completion's tokens under policy and reference, and log sum p^2 of each."""
    reference = [-3 * rng.random() for _ in range(rng.randint(1, 6))]
    policy = [min(-1e-3, value + rng.gauss(drift, 0.7)) for value in reference]
    # the largest probability squared bounds the sum of the squares from below, so a real value lies above it
    concentration = [min(-1e-3, 2 * value + 2 * rng.random()) for value in policy]
    return {"policy": policy, "reference": reference, "concentration": concentration}


def pairs(seed=0, count=5):
    """Pairs with the log-probability of every token."""
    rng = random.Random(seed)
    return [{"prompt": rng.randint(1, 4), "chosen": completion(rng), "rejected": completion(rng)} for _ in range(count)]


def labelled(seed=1, count=6, drift=1.0):
    """Single completions with a label and a partner each; drift moves the partners' log-ratios."""
    rng = random.Random(seed)
    return [
        {
            "prompt": rng.randint(1, 4),
            "completion": completion(rng),
            "partner": completion(rng, drift),
            "is_desirable": at % 3 != 0,
        }
        for at in range(count)
    ]


def sequences(seed=2, count=4):
    """Pairs of whole sequences with the logits of every position, padded to one width."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(2, 4))]
        sides = {side: {"ids": [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 6))]} for side in ("chosen", "rejected")}
        rows.append({"prompt_ids": prompt, **sides})
    width = max(len(row["prompt_ids"]) + len(row[side]["ids"]) for row in rows for side in ("chosen", "rejected"))
    for row in rows:
        for side in ("chosen", "rejected"):
            row[side]["logits"] = [[rng.gauss(0, 2) for _ in range(VOCABULARY)] for _ in range(width)]
    return rows


def flat(parts, key, dtype):
    return torch.tensor([value for part in parts for value in part[key]], dtype=dtype)


def summed(parts, values):
    """Sums over completions, and the completion of each token."""
    counts = torch.tensor([len(part["policy"]) for part in parts])
    owners = torch.repeat_interleave(torch.arange(len(parts)), counts)
    return sum_by_completion(values, owners, counts), owners


def side_of(parts, policy, dtype):
    """One side of the pairs: sums under the policy and the reference, counts, single tokens."""
    reference = flat(parts, "reference", dtype)
    whole, owners = summed(parts, policy)
    places = torch.cat([torch.arange(len(part["policy"])) for part in parts])
    tokens = TokenLogps(policy, reference, owners, places, flat(parts, "concentration", dtype))
    return whole, summed(parts, reference)[0].logps, tokens


def pairs_view(rows, dtype):
    """The view, and the leaf that gradients are taken on: tokens of all chosen completions, then of all rejected ones."""
    parts = [[row[side] for row in rows] for side in ("chosen", "rejected")]
    leaf = flat([part for side in parts for part in side], "policy", dtype).requires_grad_()
    split = sum(len(part["policy"]) for part in parts[0])
    (won, ref_won, won_tokens), (lost, ref_lost, lost_tokens) = (
        side_of(side, values, dtype) for side, values in zip(parts, (leaf[:split], leaf[split:]), strict=True)
    )
    counts = (won.num_tokens, lost.num_tokens)
    view = PairLogps(won.logps, lost.logps, ref_won, ref_lost, *counts, chosen=won_tokens, rejected=lost_tokens)
    return view, leaf


def labelled_view(rows, dtype):
    parts, partners = [row["completion"] for row in rows], [row["partner"] for row in rows]
    leaf = flat(parts, "policy", dtype).requires_grad_()
    whole, _ = summed(parts, leaf)
    mismatched = [summed(partners, flat(partners, key, dtype))[0].logps for key in ("policy", "reference")]
    labels = torch.tensor([row["is_desirable"] for row in rows])
    reference = summed(parts, flat(parts, "reference", dtype))[0].logps
    return UnpairedLogps(whole.logps, reference, whole.num_tokens, labels, *mismatched), leaf


def sequences_view(rows, dtype):
    """Log-probabilities by log-softmax of the logits, which are the leaf; (sequences, width, vocabulary)."""
    given = [row[side]["logits"] for side in ("chosen", "rejected") for row in rows]
    leaf = torch.tensor(given, dtype=dtype).requires_grad_()
    sides, prompts = [[], []], []
    for at, (side, row) in enumerate((side, row) for side in (0, 1) for row in rows):
        ids = torch.tensor(row["prompt_ids"] + row[("chosen", "rejected")[side]]["ids"])
        every = torch.log_softmax(leaf[at, : len(ids) - 1], -1).gather(1, ids[1:, None])[:, 0]
        start = len(row["prompt_ids"]) - 1
        sides[side].append(every[start:])
        if side == 0:
            prompts.append(every[:start])
    sums = [torch.stack([one.sum() for one in side]) for side in (*sides, prompts)]
    counts = [torch.tensor([len(one) for one in side]) for side in (*sides, prompts)]
    zeros = torch.zeros_like(sums[0]).detach()
    return PairLogps(sums[0], sums[1], zeros, zeros, counts[0], counts[1], prompt=SequenceLogps(sums[2], counts[2])), leaf


VIEWS = {"pairs": pairs_view, "labelled": labelled_view, "negative": labelled_view, "sequences": sequences_view}
SHIFT = 1.3


def shifted(rows):
    """The same pairs with the reference of every completion more likely by SHIFT nats."""
    rows = copy.deepcopy(rows)
    for row in rows:
        for side in ("chosen", "rejected"):
            row[side]["reference"][0] += SHIFT
    return rows


ROWS = {
    "pairs": pairs(),
    "shifted": shifted(pairs()),
    "labelled": labelled(),
    "negative": labelled(seed=5, drift=-2.0),
    "sequences": sequences(),
}


def value_of(loss, kind, dtype=torch.float64, state=None):
    """Loss of a step of these rows and its gradient on the leaf, flat: what the loop would make of them."""
    rows = ROWS[kind]
    view, leaf = VIEWS[kind](rows, dtype)
    counts = {"pair": len(rows), "completion": len(rows)}
    if isinstance(view, PairLogps):
        counts |= {"chosen_token": int(view.chosen_tokens.sum()), "token": int(view.chosen_tokens.sum())}
    if isinstance(loss, StatefulLoss):
        loss = loss.at(state or loss.initial_state())
    if loss.view == "demonstrations":
        view = SequenceLogps(view.policy_chosen, view.chosen_tokens)
    total = reduce_terms(loss(view), counts)
    (gradient,) = torch.autograd.grad(total, leaf)
    return total.item(), gradient.double().flatten().tolist()
