"""What holds of the pairs of any samples under any rule and guards."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from preftune.core.recipe import GenerateConfig, GuardsConfig
from preftune.curation.pairing import Pair, Scored, pair_up, why_not

SCORES = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 3.25])
TEXTS = st.text("ab ", max_size=8)


@st.composite
def samples(draw: st.DrawFn) -> list[Scored]:
    rows = draw(st.lists(st.tuples(TEXTS, st.booleans(), SCORES), max_size=6))
    return [Scored(number, *row) for number, row in enumerate(rows)]


@st.composite
def settings(draw: st.DrawFn) -> GenerateConfig:
    rule = draw(st.sampled_from(["best_worst", "best_random", "all", "threshold"]))
    guards = GuardsConfig(
        min_margin=draw(st.sampled_from([0.0, 0.5, 1.0])),
        max_length_ratio=draw(st.sampled_from([None, 1.5, 3.0])),
        require_complete=draw(st.booleans()),
    )
    return GenerateConfig(prompts="p", judge="j", pairing=rule, threshold=1.0 if rule == "threshold" else None, guards=guards)


@given(samples(), settings(), st.integers(0, 99))
def test_every_pair_passes_every_guard(given_samples: list[Scored], config: GenerateConfig, seed: int) -> None:
    pairs, refused = pair_up(given_samples, config, seed)
    guards = config.guards
    for pair in pairs:
        assert pair.chosen.score - pair.rejected.score >= max(guards.min_margin, config.threshold or 0.0)
        assert pair.chosen.score > pair.rejected.score
        assert pair.chosen.text != pair.rejected.text
        assert pair.chosen.text.strip()
        assert pair.rejected.text.strip()
        assert pair.chosen.is_complete or not guards.require_complete
        if guards.max_length_ratio is not None:
            assert len(pair.chosen.text) <= guards.max_length_ratio * len(pair.rejected.text)
            assert len(pair.rejected.text) <= guards.max_length_ratio * len(pair.chosen.text)
    assert all(count > 0 for count in refused.values())
    assert len({frozenset((pair.chosen.number, pair.rejected.number)) for pair in pairs}) == len(pairs)


@given(samples(), settings(), st.integers(0, 99), st.randoms())
def test_the_order_of_samples_does_not_matter(
    given_samples: list[Scored], config: GenerateConfig, seed: int, shuffler: object
) -> None:
    shuffled = list(given_samples)
    shuffler.shuffle(shuffled)  # type: ignore[attr-defined]
    assert pair_up(shuffled, config, seed) == pair_up(given_samples, config, seed)


@given(samples(), settings(), st.integers(0, 99))
def test_one_pair_rules_take_one_of_all_pairs(given_samples: list[Scored], config: GenerateConfig, seed: int) -> None:
    everything = config.model_copy(update={"pairing": "all", "threshold": None})
    pairs, _ = pair_up(given_samples, config, seed)
    allowed, refused = pair_up(given_samples, everything, seed)
    assert {(pair.chosen.number, pair.rejected.number) for pair in pairs} <= {
        (one.chosen.number, one.rejected.number) for one in allowed
    }
    if config.pairing in {"best_worst", "best_random"}:
        assert len(pairs) == min(1, len(allowed))
    if config.pairing == "best_worst" and pairs:
        assert pairs[0].margin == max(pair.margin for pair in allowed)
    count = len([one for one in given_samples if one.text.strip()])
    assert len(allowed) + sum(refused.values()) - refused["empty"] == count * (count - 1) // 2


@given(samples(), settings())
def test_a_pair_the_wrong_way_round_is_never_kept(given_samples: list[Scored], config: GenerateConfig) -> None:
    for pair in pair_up(given_samples, config, 0)[0]:
        assert why_not(Pair(pair.rejected, pair.chosen), config) is not None
