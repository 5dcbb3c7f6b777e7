"""Every pairing rule and every guard on planted samples."""

import pytest

from preftune.core.recipe import GenerateConfig, GuardsConfig
from preftune.curation.pairing import REASONS, Scored, pair_up

LOOSE = {"min_margin": 0.0, "max_length_ratio": None, "require_complete": True}


def ask(samples, seed=0, tie_margin=0.0, guards=None, **keys):
    config = GenerateConfig(prompts="p", judge="j", guards=GuardsConfig(**{**LOOSE, **(guards or {})}), **keys)
    pairs, refused = pair_up(samples, config, seed, tie_margin)
    assert set(refused) <= set(REASONS)
    return [(pair.chosen.number, pair.rejected.number) for pair in pairs], dict(refused)


def sample(number, score, text=None, is_complete=True):
    return Scored(number, text or f"text number {number}", is_complete, score)


FOUR = [sample(0, 1.0), sample(1, 4.0), sample(2, -2.0), sample(3, 3.5)]


def test_best_and_worst():
    assert ask(FOUR) == ([(1, 2)], {})


def test_all_pairs_are_ordered_by_score():
    pairs, refused = ask(FOUR, pairing="all")
    assert (set(pairs), refused) == ({(1, 2), (3, 2), (1, 0), (0, 2), (3, 0), (1, 3)}, {})


def test_a_threshold_takes_every_pair_that_far_apart():
    assert ask(FOUR, pairing="threshold", threshold=3.0) == ([(1, 2), (3, 2), (0, 2), (1, 0)], {})


def test_best_random_keeps_the_best_and_draws_the_other_by_seed():
    drawn = {ask(FOUR, pairing="best_random", seed=seed)[0][0] for seed in range(40)}
    assert drawn == {(1, 0), (1, 2), (1, 3)}
    assert ask(FOUR, pairing="best_random", seed=3) == ask(FOUR[::-1], pairing="best_random", seed=3)


def test_identical_texts_are_no_pair():
    same = [sample(0, 1.0, "the same"), sample(1, 1.0, "the same")]
    assert ask(same) == ([], {"identical": 1})


def test_no_difference_in_judgement_is_no_pair():
    assert ask([sample(0, 1.0), sample(1, 1.0)]) == ([], {"no_difference": 1})
    near = [sample(0, 1.0), sample(1, 1.4)]
    assert ask(near) == ([(1, 0)], {})
    assert ask(near, guards={"min_margin": 0.5}) == ([], {"no_difference": 1})
    assert ask(near, tie_margin=0.5) == ([], {"no_difference": 1}), "what the judge calls a tie"


def test_a_chosen_one_must_have_ended_by_itself_and_the_rejected_one_need_not():
    cut = [sample(0, 5.0, is_complete=False), sample(1, 3.0), sample(2, 1.0, is_complete=False)]
    assert ask(cut) == ([(1, 2)], {"incomplete_chosen": 2}), "the next best takes its place"
    assert ask(cut, guards={"require_complete": False}) == ([(0, 2)], {})


def test_empty_samples_take_no_part():
    assert ask([sample(0, 9.0, " \n"), sample(1, 1.0), sample(2, 0.0)]) == ([(1, 2)], {"empty": 1})


def test_a_pair_of_unlike_lengths_is_refused_and_the_next_one_taken():
    long = [sample(0, 5.0, "x" * 100), sample(1, 4.0, "y" * 50), sample(2, 0.0, "z" * 40)]
    assert ask(long, guards={"max_length_ratio": 2.0}) == ([(1, 2)], {"length_ratio": 1})
    assert ask(long) == ([(0, 2)], {})


@pytest.mark.parametrize("keys", [{"pairing": "threshold"}, {"threshold": 1.0}, {"samples": 1}, {"pairing": "worst_best"}])
def test_settings_that_make_no_sense_are_refused(keys):
    with pytest.raises(ValueError, match=r"threshold|samples|pairing"):
        GenerateConfig(prompts="p", judge="j", **keys)
