"""Audits: the figures by hand, and the known ones of real files."""

import pytest

from preftune.core.records import Demonstration, Example, Message, Preference, Provenance
from preftune.data.audit import audit, band_of, length_auc, share_longer
from preftune.data.pipeline import read_examples


def pair(prompt, chosen, rejected):
    return Example(
        (Message("user", prompt),),
        ((Message("assistant", chosen),), (Message("assistant", rejected),)),
        Preference("first"),
        Provenance("f", 1),
    )


def test_length_auc_by_hand():
    # differences 1 and -3 against their negatives -1 and 3: 1 > -1, 1 < 3, -3 < -1, -3 < 3: one of four
    assert length_auc([2, 1], [1, 4]) == 0.25
    assert length_auc([1, 2], [4, 1]) == 0.25
    assert length_auc([5, 5], [5, 5]) == 0.5
    assert share_longer([2, 1], [1, 4]) == 0.5


def test_swapping_sides_mirrors_the_auc():
    chosen, rejected = [3, 8, 2, 9, 9], [1, 9, 2, 4, 1]
    assert length_auc(chosen, rejected) == pytest.approx(1 - length_auc(rejected, chosen))


def test_bands():
    assert [band_of(auc) for auc in (0.34, 0.35, 0.41, 0.42, 0.58, 0.59, 0.65, 0.66)] == [
        "red",
        "amber",
        "amber",
        "green",
        "green",
        "amber",
        "amber",
        "red",
    ]


def test_report():
    demonstration = Example((Message("user", "q"),), ((Message("assistant", "abc"),),), Demonstration(), Provenance("f", 1))
    report = audit([pair("q", "aaaa", "b"), pair("Q ", "a", "bb"), demonstration])
    assert report["examples"] == 3
    assert (report["pairs"], report["demonstrations"]) == (2, 1)
    assert (report["prompts"], report["rows_with_repeated_prompt"]) == (1, 2)
    assert report["characters"]["chosen"] == {"mean": 2.5, "median": 2.5, "p95": 3.85, "max": 4.0}
    assert report["characters"]["demonstration"]["max"] == 3
    assert report["length_bias"]["share_chosen_longer"] == 0.5
    assert "length_bias" not in audit([demonstration])
    assert audit([])["examples"] == 0


@pytest.mark.parametrize(
    ("file", "share", "band"),
    [
        ("rasbt-preference/instruction-data-with-preference.json", 0.51, "green"),
        ("tulu3-sample/preference_sample.jsonl", 0.60, "amber"),
        ("orca-system/validation.jsonl", 0.18, "red"),
        ("oasst-trees-en/derived/pairs.jsonl", 0.70, "red"),
        ("hh-rlhf/helpful-base.test.jsonl.gz", 0.59, "amber"),
    ],
)
def test_known_shares_of_real_files(shared_data, file, share, band):
    bias = audit(read_examples([str(shared_data / file)]).examples)["length_bias"]
    assert bias["share_chosen_longer"] == pytest.approx(share, abs=0.015)
    assert bias["band"] == band
