"""`preftune compare`: models and files of completions, with the report of an evaluation."""

import json

import pytest

KIND = {"name": "rules", "rules": [{"kind": "lexicon", "name": "kind", "words": ["kind", "friend"], "weight": 1.0}]}


@pytest.fixture
def written(tmp_path):
    def call(name, texts):
        rows = [{"prompt": f"Question {index}?", "completion": text} for index, text in enumerate(texts)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return name

    return call


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "kind.yaml").write_text(json.dumps(KIND), encoding="utf-8")
    return "kind.yaml"


def test_two_files_are_compared_on_their_prompts(preftune, written, judge, tmp_path):
    ours = written("ours.jsonl", ["my kind friend"] * 30 + ["no"] * 10)
    theirs = written("theirs.jsonl", ["no"] * 30 + ["my kind friend"] * 10)
    done = preftune("compare", ours, theirs, "--judge", judge, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["win_rate"]["wins"], result["win_rate"]["losses"], result["win_rate"]["num_prompts"]) == (30, 10, 40)
    assert result["verdict"] == "better"
    assert result["sentence"].startswith("Better: ours.jsonl wins 75.0 %")
    assert "against theirs.jsonl" in result["sentence"]
    back = json.loads(preftune("compare", theirs, ours, "--judge", judge, "--json").stdout)
    assert back["win_rate"]["rate"] == pytest.approx(1 - result["win_rate"]["rate"])
    assert back["verdict"] == "worse"
    assert (tmp_path / "runs" / "comparison" / "report.html").is_file()


@pytest.mark.slow
def test_a_model_is_compared_with_what_another_wrote(preftune, written, judge):
    theirs = written("theirs.jsonl", ["no"] * 4)
    done = preftune(
        "compare", "starter", theirs, "--prompts", theirs, "--judge", judge, "limit=4", "decoding.max_new_tokens=8", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["win_rate"]["num_prompts"] == 4


def test_mistakes_are_one_line(preftune, written, judge, tmp_path):
    ours, theirs = written("ours.jsonl", ["a", "b", "c"]), written("theirs.jsonl", ["a", "b"])
    for arguments, words in (
        ((ours, theirs, "--judge", judge), "no completion for 1 of 3 prompts"),
        (("starter", theirs, "--judge", judge), "--prompts is missing"),
        (("nothing", theirs, "--prompts", theirs, "--judge", judge), "nothing"),
        ((ours, theirs, "--judge", "none.yaml"), "none.yaml"),
        ((ours, theirs, "--judge", judge, "marging=0.1"), "did you mean 'margin'"),
    ):
        done = preftune("compare", *arguments)
        assert done.returncode in {1, 2}, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
