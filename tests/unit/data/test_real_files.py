"""Every real file beside the checkout is read, with the counts that its notes state."""

import json
from collections import Counter

import pytest

from preftune.core.records import Preference, expand_ranking, pair_of
from preftune.data.formats.base import formats
from preftune.data.formats.voted import PandaLM, majority_of
from preftune.data.pipeline import check_files, read_examples, read_prompts


@pytest.mark.parametrize(
    ("path", "name", "rows", "left_out"),
    [
        ("hh-rlhf/helpful-base.test.jsonl.gz", "hh-rlhf", 2354,
         {"identical": 2, "prompts_differ": 9, "empty_completion": 3, "empty_content": 1, "roles_do_not_alternate": 6}),
        ("hh-rlhf/harmless-base.test.jsonl.gz", "hh-rlhf", 2312,
         {"prompts_differ": 5, "empty_completion": 4, "roles_do_not_alternate": 4}),
        ("llamafactory-demo/dpo_en_demo.json", "llamafactory-sharegpt", 300, {"duplicate": 5}),
        ("llamafactory-demo/dpo_zh_demo.json", "llamafactory-sharegpt", 300, {"duplicate": 11}),
        ("llamafactory-demo/kto_en_demo.json", "llamafactory-kto", 300, {}),
        ("oasst-trees-en/en_100_tree.jsonl", "oasst-trees", 100, {}),
        ("oasst-trees-en/derived/pairs.jsonl", "trl-preference", 754, {}),
        ("orca-system/validation.jsonl", "openai-preference", 284, {}),
        ("pandalm/testset-v1.json", "pandalm", 999, {"duplicate": 100, "empty_completion": 54, "wrong_type": 6}),
        ("rasbt-instruct/instruction-data.json", "alpaca", 1100, {}),
        ("rasbt-preference/instruction-data-with-preference.json", "alpaca-preference", 1100, {"identical": 6}),
        ("tulu3-sample/preference_sample.jsonl", "trl-preference", 100, {}),
    ],
)  # fmt: skip
def test_a_file_is_read_with_the_counts_of_its_notes(shared_data, path, name, rows, left_out):
    file = str(shared_data / path)
    found = check_files([file])
    assert found.formats == {file: name}
    assert found.counts["rows"] == rows
    assert {reason: count for reason, count in found.counts.items() if reason not in {"rows", "kept"}} == left_out


def test_hh_rlhfs_traps_are_counted_over_both_files(shared_data):
    files = [str(shared_data / f"hh-rlhf/{name}-base.test.jsonl.gz") for name in ("helpful", "harmless")]
    counts = check_files(files).counts
    assert counts["identical"] == 2
    assert counts["prompts_differ"] == 14
    assert counts["empty_completion"] + counts["empty_content"] == 8


def test_the_trees_give_every_ranked_pair(shared_data):
    read = read_examples([str(shared_data / "oasst-trees-en/en_100_tree.jsonl")])
    pairs = {
        (pair.prompt, pair.chosen, pair.rejected)
        for example in read.examples
        for one in expand_ranking(example, "all")
        if (pair := pair_of(one)) is not None
    }
    derived = read_examples([str(shared_data / "oasst-trees-en/derived/pairs.jsonl")]).examples
    ours = {(tuple(m.content.strip() for m in prompt), chosen[0].content.strip(), rejected[0].content.strip())
            for prompt, chosen, rejected in pairs}  # fmt: skip
    theirs = {
        (tuple(m.content.strip() for m in pair.prompt), pair.chosen[0].content.strip(), pair.rejected[0].content.strip())
        for pair in map(pair_of, derived)
    }
    assert len(pairs) == 754
    assert ours == theirs


def test_pandalms_majorities_and_booleans(shared_data):
    path = shared_data / "pandalm/testset-v1.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    votes = [[PandaLM._vote(row, f"annotator{number}") for number in (1, 2, 3)] for row in rows]
    assert Counter(majority_of(one).preferred for one in votes) == {"tie": 105, "first": 422, "second": 472}
    read = read_examples([str(path)])
    wrong = [row for row in read.excluded if row.reason == "wrong_type"]
    assert len(wrong) == 6
    assert all("true or false" in row.detail or "boolean" in row.detail for row in wrong)
    ties = sum(isinstance(one.judgement, Preference) and one.judgement.preferred == "tie" for one in read.examples)
    assert ties > 50
    assert {one.judgement.confidence for one in read.examples if one.judgement.preferred != "tie"} == {2 / 3, 1.0}


@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("eval-prompts/ifeval.jsonl", 541),
        ("eval-prompts/mt_bench.jsonl", 80),
        ("safety-prompts/xstest_prompts.csv", 450),
    ],
)
def test_prompts_are_read(shared_data, path, count):
    seen = []
    found = read_prompts(str(shared_data / path), on_repeated=seen.append)
    assert len(found) + len(seen) == count


def test_no_two_formats_claim_a_real_file(shared_data):
    """A file is one format's: the one that is detected fits clearly more rows than any other."""
    for path in ("llamafactory-demo/dpo_en_demo.json", "llamafactory-demo/kto_en_demo.json", "pandalm/testset-v1.json"):
        rows = json.loads((shared_data / path).read_text(encoding="utf-8"))[:50]
        claims = [name for name in formats.names() if all(map(formats.build(name).matches, rows))]
        assert len(claims) == 1, (path, claims)
