"""What a ledger says of a pair: how far its margin lies from its neighbours', in the spread of its own step."""

import pytest

from preftune.core.records import Provenance, TokenisedCompletion, TokenisedExample
from preftune.training.ledger import Ledger, read_ledger


def test_deviations_are_counted_in_the_spread_of_each_step(tmp_path):
    side = TokenisedCompletion((2,), (True,))
    pairs = [TokenisedExample(f"pair-{at}", (1,), (side, side), provenance=Provenance("rows.jsonl", at + 1)) for at in range(3)]
    ledger = Ledger(tmp_path / "ledger.jsonl", pairs)
    ledger.add(1, pairs, [0.0, 3.0, 6.0])  # mean 3, standard deviation 6 ** 0.5
    ledger.add(2, pairs, [40.0, 20.0, 30.0])  # further apart: mean 30, (200 / 3) ** 0.5
    ledger.add(3, pairs[:2], [5.0, 5.0])  # no spread says nothing
    low, high = 3 / 6**0.5, 10 / (200 / 3) ** 0.5  # both are 1.2247
    assert low == pytest.approx(high)
    found = {one.example_id: one for one in read_ledger(tmp_path / "ledger.jsonl")}
    assert found["pair-0"].deviation == pytest.approx((-low + high + 0) / 3, abs=1e-4)
    assert found["pair-1"].deviation == pytest.approx((0 - high + 0) / 3, abs=1e-4)
    assert found["pair-2"].deviation == pytest.approx((low + 0) / 2, abs=1e-4)
    assert [one.example_id for one in read_ledger(tmp_path / "ledger.jsonl")] == ["pair-1", "pair-0", "pair-2"]
    assert (found["pair-0"].margins, found["pair-0"].steps) == ((0.0, 40.0, 5.0), (1, 2, 3))
