"""A conversation through pipes and at a terminal."""

import json
import os
import pty
import select
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from preftune import read
from preftune.cli.chat import command


@pytest.fixture
def chat():
    """The verb in this process: loading the libraries is most of the time of a call."""

    def call(*arguments, **options):
        return CliRunner().invoke(command, [*map(str, arguments)], standalone_mode=False, **options)

    return call


def test_one_prompt_is_one_answer_and_the_seed_decides_it(chat):
    given = ("starter", "--prompt", "Write a short story about a fox.", "--max-new-tokens", 30)
    one, two, other = chat(*given), chat(*given, "--json"), chat(*given, "--seed", 4)
    assert len(one.stdout) > 40
    assert json.loads(two.stdout)["answer"] == one.stdout.rstrip("\n")
    assert other.stdout != one.stdout


def test_a_piped_conversation_is_saved_and_a_preference_is_a_row_that_check_reads(preftune, environment, tmp_path, shared_data):
    environment["COLUMNS"] = "100"
    other = shared_data / "models" / "stories260K" / "hf"
    lines = [
        "Hello.", "/system Be kind.", "Write a story about a hen.", "/save talk.jsonl", f"/compare {other}",
        "Write a story about a dog.", "both", "2", "Once upon a time a cat", "t", "/nonsense", "/reset",
        "/save none.jsonl",
        "/quit", "never read",
    ]  # fmt: skip
    done = preftune("chat", "starter", "--max-new-tokens", 25, "--record", "mine.jsonl", input="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    assert "never" not in done.stdout
    for words in ("write 1, 2, t (tie) or s (skip)", "recorded in mine.jsonl", "no command '/nonsense'", "nothing to save"):
        assert words in done.stderr, words
    assert "1" + " " * 48 + "| 2" in done.stdout, "two columns"
    assert not (tmp_path / "none.jsonl").exists()
    (talk,) = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert [turn["role"] for turn in talk["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    rows = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == ["second", "tie"]
    assert sorted(rows[0]["models"]) == sorted(["starter", str(other)])
    assert rows[1]["prompt"][-2]["content"] == rows[0]["second"], "the better answer goes on"
    checked = read([str(tmp_path / "mine.jsonl")])
    assert (checked.formats[str(tmp_path / "mine.jsonl")], checked.excluded) == ("comparison", [])


def test_a_model_without_template_goes_on_with_the_text(chat, shared_data):
    model = shared_data / "models" / "stories260K" / "hf"
    done = chat(model, "--temperature", 0, "--max-new-tokens", 20, input="Once upon a time, there was\nThe end\n")
    assert len(done.stdout.strip().splitlines()) >= 2


def test_an_unknown_model_and_a_turn_that_is_too_long_are_one_line(chat):
    assert "no run or folder of that name" in str(chat("nobody", "--prompt", "x").exception)
    done = chat("starter", "--max-new-tokens", 10, input="word " * 600 + "\nHello.\n")
    assert "the model has 512 positions" in done.stderr
    assert done.stdout.strip(), "the next question is answered"


def read_until(terminal, words, seconds=60):
    seen, end = "", time.monotonic() + seconds
    while words not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                seen += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # the other side has closed
                break
    assert words in seen, seen
    return seen


def test_control_c_stops_the_answer_and_not_the_program(environment, tmp_path):
    script = str(Path(sys.executable).with_name("preftune"))
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execve(script, [script, "chat", "starter", "--max-new-tokens", "400", "--temperature", "1.5"], environment)
    try:
        read_until(terminal, "> ")
        os.write(terminal, b"\x03")
        read_until(terminal, "Ctrl-D leaves)\r\n> ")  # a Ctrl-C that comes before the line is read throws the line away
        os.write(terminal, b"Write a long story about a fox and a hen and a dog.\n")
        read_until(terminal, "a dog.")
        read_until(terminal, " ")
        os.write(terminal, b"\x03")
        read_until(terminal, "(stopped)")
        os.write(terminal, b"/save talk.jsonl\n")
        read_until(terminal, "saved in talk.jsonl")
        os.write(terminal, b"/quit\n")
        end = time.monotonic() + 20
        status = (0, 0)
        while status[0] == 0 and time.monotonic() < end:
            status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.05)
        assert status == (child, 0)
        child = 0
    finally:
        if child:
            os.kill(child, 9)
            os.waitpid(child, 0)
        os.close(terminal)
    assert json.loads((tmp_path / "talk.jsonl").read_text())["messages"][1]["content"]
