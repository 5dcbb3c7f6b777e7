"""Hyper-parameters against what is published: a table with a row for each loss, and nothing said inside the ranges."""

import pytest

from preftune.core.recipe import LoraConfig, StageConfig
from preftune.maths.losses.base import losses
from preftune.training.published import LR_RANGE, PUBLISHED, check_published


def codes(method="dpo", is_small=False, **changes):
    return [one.code for one in check_published(StageConfig(name="s", method=method, **changes), is_small=is_small)]


def test_every_loss_with_a_beta_has_a_published_range():
    import dataclasses

    def options(name):
        return {field.name for field in dataclasses.fields(losses.factory(name)) if field.init}

    missing = [name for name in losses.names() if options(name) & {"beta", "tau"} and name not in PUBLISHED]
    assert not missing, f"add rows to training/published.py for {missing}"


@pytest.mark.parametrize("method", losses.names())
def test_the_defaults_of_every_loss_are_usual(method):
    required = {"loss": {"parts": {"dpo": {}}}} if method == "mix" else {}
    assert codes(method, **required) == []
    assert codes(method, adapter="full", **required) == []


def test_the_parts_of_a_mix_are_looked_at():
    assert codes("mix", loss={"parts": {"dpo": {"beta": 30}, "simpo": {"beta": 0.1}}}) == ["unusual_beta", "unusual_beta"]


def test_the_usual_values_lie_in_their_own_ranges():
    for rows in (row for options in PUBLISHED.values() for row in options.values()):
        for row in rows:
            assert row.low <= row.usual <= row.high
            assert row.source


def test_length_normalisation_wants_another_beta():
    assert codes(loss={"beta": 0.1, "length_normalised": True}) == ["unusual_beta"]
    assert codes(loss={"beta": 5.0, "length_normalised": True}) == []
    assert codes(loss={"beta": 5.0}) == ["unusual_beta"]


def test_other_options_are_looked_at():
    assert codes(loss={"label_smoothing": 0.45}) == ["unusual_option"]
    assert codes(loss={"label_smoothing": 0.1}) == []
    assert codes(loss={"rpo_alpha": 50.0}) == ["unusual_option"]


@pytest.mark.parametrize(
    ("method", "far", "near"),
    [
        ("hinge", {"beta": 20.0}, {"beta": 0.5}),
        ("robust", {"label_smoothing": 0.45}, {"label_smoothing": 0.3}),
        ("exo_pair", {"label_smoothing": 0.4}, {"label_smoothing": 1e-4}),
        ("nca_pair", {"beta": 1e-4}, {"beta": 0.01}),
        ("apo_zero", {"beta": 5.0}, {"beta": 0.05}),
        ("apo_down", {"beta": 5.0}, {"beta": 0.05}),
        ("discopop", {"tau": 5.0}, {"tau": 0.1}),
        ("odpo", {"alpha": 10.0}, {"alpha": 0.5}),
        ("r_dpo", {"alpha": 2.0}, {"alpha": 0.1}),
        ("ld_dpo", {"alpha": 0.0}, {"alpha": 0.3}),
        ("dpop", {"lambda_p": 5e3}, {"lambda_p": 500.0}),
        ("sppo_hard", {"beta": 0.5}, {"beta": 0.01}),
        ("sppo_soft", {"slope": 20.0}, {"slope": 2.0}),
        ("cpo", {"alpha": 30.0}, {"alpha": 0.5}),
        ("alphapo", {"beta": 0.1}, {"beta": 10.0}),
        ("alphapo", {"alpha": 5.0}, {"alpha": -0.25}),
    ],
)
def test_the_losses_over_pairs_have_ranges(method, far, near):
    option = next(iter(far))
    assert codes(method, loss=far) == ["unusual_beta" if option == "beta" else "unusual_option"]
    assert codes(method, loss=near) == []


def test_learning_rates_by_adapter():
    assert codes(lr=1e-3) == ["unusual_lr"]
    assert codes(lr=1e-3, is_small=True) == []
    assert codes(lr=1.0, is_small=True) == ["unusual_lr"]
    assert codes(lr=5e-5) == []
    assert codes(lr=5e-5, adapter="full") == ["unusual_lr"]
    assert codes("sft", lr=2e-4) == []
    assert all(low < high for low, high in LR_RANGE.values())


def test_dropout_matters_where_there_is_a_reference():
    dropout = LoraConfig(dropout=0.1)
    assert codes(lora=dropout) == ["dropout"]
    assert codes("sft", lora=dropout) == []
