"""init: what it writes runs at once, with the starter's pairs and with the user's own."""

import json
import shlex

import pytest

SHORT = ["max_steps=2", "checkpoints=0", "evaluation.limit=4", "evaluation.decoding={max_new_tokens: 8}"]


def follow(preftune, environment, commands):
    """Run the printed commands; the last one on a few steps and prompts."""
    environment["PREFTUNE_PROBE"] = "off"
    for command in commands:
        cd, _, verb = command.partition(" && ")
        words = shlex.split(verb)
        assert words[0] == "preftune"
        folder = shlex.split(cd)[1]
        arguments = [f"{folder}/{word}" if "." in word else word for word in words[1:]]
        done = preftune(*arguments, *(SHORT if arguments[0] == "run" else []))
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_the_printed_commands_work(preftune, environment, tmp_path):
    done = preftune("init", "first", "--json")
    started = json.loads(done.stdout)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == sorted(started["written"])
    follow(preftune, environment, started["commands"])
    again = preftune("init", "first")
    assert (again.returncode, "never overwrites" in again.stderr) == (2, True)


@pytest.mark.slow
def test_with_the_users_own_pairs(preftune, environment, tmp_path, shared_data):
    started = json.loads(
        preftune("init", "mine", "--from", shared_data / "llamafactory-demo" / "kto_en_demo.json", "--json").stdout
    )
    recipe = (tmp_path / "mine" / "recipe.yaml").read_text(encoding="utf-8")
    assert "method: kto" in recipe
    assert any("good rows" in fact for fact in started["facts"])
    lines = (tmp_path / "mine" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = (tmp_path / "mine" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    assert set(json.loads(lines[0])) == {"prompt", "completion", "label"}
    assert prompts
    follow(preftune, environment, started["commands"][:2])
