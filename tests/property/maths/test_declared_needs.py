"""What a loss says that it reads of a label is what it reads: for every registered loss over pairs, so for the next one too."""

from dataclasses import replace

import pytest
import torch
from pair_cases import Row, logps_of

from preftune.maths.losses.base import losses
from preftune.maths.types import SequenceLogps, TokenLogps

ROWS = [Row(-10.0, -20.0, -12.0, -15.0, 4, 5), Row(-3.0, -1.0, -2.0, -2.5, 2, 9), Row(-12.0, -9.0, -10.0, -12.0, 3, 7)]
OPTIONS = {"sppo_soft": {"slope": 1.0}, "mix": {"parts": {"odpo": {}, "sft": {}}}}
PAIRS = [name for name in losses.names() if losses.factory(name).view == "pairs"]


def tokens_of(sums, frozen, counts):
    """Single tokens that add up to the completions' log-probabilities, with some concentration."""
    segments = torch.repeat_interleave(torch.arange(len(counts)), counts)
    places = torch.cat([torch.arange(int(count)) for count in counts])
    shares = (one / counts for one in (sums, frozen))
    policy, reference = (one.index_select(0, segments) for one in shares)
    return TokenLogps(policy, reference, segments, places, concentration=policy * 0 - 1.0)


def full(x):
    """Everything that any loss may ask for."""
    prompt = SequenceLogps(torch.full_like(x.policy_chosen, -9.0), torch.full_like(x.chosen_tokens, 6))
    return replace(
        x,
        is_tie=torch.tensor([False] * len(x.policy_chosen)),
        chosen=tokens_of(x.policy_chosen, x.reference_chosen, x.chosen_tokens),
        rejected=tokens_of(x.policy_rejected, x.reference_rejected, x.rejected_tokens),
        prompt=prompt,
    )


def values(loss, x):
    return torch.cat([term.values for term in loss(x).terms.values()])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("need", "changed"), [("confidence", [0.7, 0.9, 0.6]), ("strength", [1.0, 2.0, 0.5])])
def test_a_loss_reads_of_a_label_what_it_declares(name, need, changed):
    loss = losses.build(name, OPTIONS.get(name, {}))
    x = full(logps_of(ROWS))
    before, after = values(loss, x), values(loss, replace(x, **{need: torch.tensor(changed, dtype=torch.float64)}))
    assert (not torch.equal(before, after)) is (need in loss.needs), f"{name} declares {sorted(loss.needs)}"


def test_the_losses_that_read_no_confidence_are_known():
    """docs/training.md names them; a new loss is either here with its reason there, or reads confidences."""
    silent = {name for name in PAIRS if "confidence" not in losses.build(name, OPTIONS.get(name, {})).needs}
    assert silent == {"sppo_hard", "aot", "aot_unpaired"}


def swapped(x):
    """The same pairs with their labels the other way round."""
    names = {"policy_chosen": "policy_rejected", "reference_chosen": "reference_rejected", "chosen_tokens": "rejected_tokens"}
    names |= {"chosen": "rejected"}
    both = names | {other: name for name, other in names.items()}
    return replace(x, **{name: getattr(x, other) for name, other in both.items()})


@pytest.mark.parametrize("name", ["wpo", "bco_pair", "davidson", "rao_kupper", "dpo"])
def test_a_doubted_pair_costs_its_expectation_over_the_label(name):
    loss, x = losses.build(name, {}), full(logps_of(ROWS))
    loss = loss.at({"mean": 0.2, "count": 4.0}) if name == "bco_pair" else loss
    c = torch.tensor([0.6, 0.75, 0.9], dtype=torch.float64)
    expected = c * values(loss, x) + (1 - c) * values(loss, swapped(x))
    torch.testing.assert_close(values(loss, replace(x, confidence=c)), expected)


@pytest.mark.parametrize("name", ["davidson", "rao_kupper"])
def test_a_tie_has_no_order_to_doubt(name):
    x = replace(full(logps_of(ROWS)), is_tie=torch.tensor([True] * 3))
    doubted = replace(x, confidence=torch.tensor([0.6, 0.75, 0.9], dtype=torch.float64))
    assert torch.equal(values(losses.build(name, {}), x), values(losses.build(name, {}), doubted))
