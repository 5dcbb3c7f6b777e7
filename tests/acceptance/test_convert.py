"""`preftune convert` and `check` with declared columns, as a user runs them."""

import json


def test_pairs_to_another_format_and_back(preftune, pairs, tmp_path):
    done = preftune("convert", pairs, "--to", "openai-preference", "--style", "chat", "--out", "o.jsonl.gz", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_written"] == 60
    checked = preftune("check", "o.jsonl.gz", "--json")
    report = json.loads(checked.stdout)
    assert (report["num_good"], list(report["formats"].values())) == (60, ["openai-preference"])


def test_what_the_target_cannot_hold_is_counted_and_named(preftune, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"prompt": "q", "chosen": " x", "rejected": " y"}\n' * 1, encoding="utf-8")
    done = preftune("convert", "texts.jsonl", "--to", "seekrflow", "--out", "s.jsonl")
    assert done.returncode == 1
    assert "cannot_hold/raw_text 1" in done.stderr
    assert "--style chat" in done.stderr


def test_votes_of_no_known_format(preftune, tmp_path):
    (tmp_path / "votes.csv").write_text("question,a,b,who\nq,x,y,2\nq2,x,y,0\n", encoding="utf-8")
    columns = ("--columns", "prompt=question,first=a,second=b,label=who", "--labels", "1=first,2=second,0=tie")
    assert preftune("check", "votes.csv", *columns).returncode == 0
    done = preftune("convert", "votes.csv", *columns, "--to", "comparison", "--out", "-")
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == ["second", "tie"]
    assert "did you mean 'prompt'" in preftune("check", "votes.csv", "--columns", "promt=question").stderr


def test_mistakes_are_one_line(preftune, pairs, tmp_path):
    for arguments, words in (
        ((pairs, "--to", "trl-preferense"), "did you mean 'trl-preference'"),
        ((pairs, "--to", "trl-preference", "--out", "x.txt"), "change the ending"),
        ((pairs, "--to", "trl-preference", "--out", pairs), "would be written over"),
        (("nothing.jsonl", "--to", "trl-preference"), "no such file"),
    ):
        done = preftune("convert", *arguments)
        assert done.returncode in {1, 2}
        assert words in done.stderr
        assert "Traceback" not in done.stderr
