"""``preftune chat``."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from preftune.cli.installation import typed_server
from preftune.cli.output import say
from preftune.core.errors import PreftuneError

if TYPE_CHECKING:
    from preftune.app.chat import Chat, Contest

CHOICES: dict[str, Literal["first", "second", "tie"]] = {"1": "first", "2": "second", "t": "tie"}
COMMANDS = """\
/reset            forget the conversation
/system TEXT      set the system message (without TEXT: remove it)
/save FILE        write the conversation as a row of the format messages
/compare MODEL    answer with both models from now on; 1, 2, t (tie) or s (skip) records which is better
/quit             leave, as Ctrl-D does; Ctrl-C stops an answer"""

EPILOG = """\b
Examples:
  preftune chat RUN
  preftune chat RUN@40 --compare starter --record preferences.jsonl
  preftune chat starter --prompt "Write a short story about a fox." --seed 3
  preftune --server https://tune.example.org chat production
  printf 'Hello\\n/save talk.jsonl\\n' | preftune chat RUN

Answers go to stdout. /help in a conversation lists its commands. Recorded rows have the format comparison."""


@click.command("chat", epilog=EPILOG)
@click.argument("model")
@click.option("--prompt", help="Say this, print the answer and leave.")
@click.option("--system", help="The system message.")
@click.option("--compare", metavar="MODEL", help="A second model whose answers stand beside.")
@click.option(
    "--record",
    type=click.Path(path_type=Path),
    default=Path("preferences.jsonl"),
    show_default=True,
    help="Where preferences go.",
)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True, help="0 is greedy.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of an answer.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed and words give the same answers.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"), help="Where runs are.")
@click.option("--json", "is_json", is_flag=True, help="Print each answer as a JSON line.")
def command(model: str, **given: Any) -> int:
    """Talk to a model (run, RUN@STEP, folder or starter), and record which of two answers is better."""
    from preftune.core.recipe import DecodingConfig

    decoding = DecodingConfig(temperature=given["temperature"], max_new_tokens=given["max_new_tokens"])
    address = typed_server()
    if address is None:
        from preftune.app.chat import Chat

        return _talk(Chat(model, given["output"], decoding, given["seed"], given["system"]), given)
    from preftune.cli.remote_model import RemoteChat
    from preftune.sdk import Client

    with Client(address) as client:
        return _talk(RemoteChat(client, model, decoding, given["seed"], given["system"]), given)


def _talk(chat: Chat, given: dict[str, Any]) -> int:
    if given["compare"]:
        chat.compare_with(given["compare"])
    talk = _Talk(chat, given["record"], is_json=given["is_json"])
    if given["prompt"] is not None:
        talk.say(given["prompt"])
        return 0
    if talk.is_live:
        say(f"{chat.name}; /help lists the commands, Ctrl-D leaves")
    talk.run()
    return 0


class _Talk:
    """The loop: lines in, commands and answers out."""

    def __init__(self, chat: Chat, record: Path, *, is_json: bool) -> None:
        self.chat, self.record, self.is_json = chat, record, is_json
        self.is_live = sys.stdin.isatty()

    def run(self) -> None:
        for line in self._lines("> "):
            try:
                if line in {"/quit", "/exit"}:
                    return
                if line.startswith("/"):
                    self._command(*line.partition(" ")[::2])
                elif line.strip():
                    self.say(line)
            except PreftuneError as error:
                say(f"error: {' '.join(str(error).split())}")
                self.chat.take_back()

    def say(self, text: str) -> None:
        """Put one message, and write the answer while it grows; what is stopped before its first word is taken back."""
        self.chat.ask(text)
        if self.chat.baseline is not None:
            self._compare()
            return
        pieces: list[str] = []
        try:
            for piece in self.chat.answer():
                pieces.append(piece)
                self._write("" if self.is_json else piece)
        except KeyboardInterrupt:
            say("\n(stopped)")
        answer = "".join(pieces)
        self._write(json.dumps({"prompt": text, "answer": answer}, ensure_ascii=False) + "\n" if self.is_json else "\n")
        if answer:
            self.chat.keep(answer)
        else:
            self.chat.take_back()

    def _compare(self) -> None:
        try:
            contest = self.chat.contest()
        except KeyboardInterrupt:
            say("\n(stopped)")
            self.chat.take_back()
            return
        self._show(contest)
        if contest.first == contest.second or not (contest.first.strip() and contest.second.strip()):
            say(
                "an answer is empty"
                if contest.first != contest.second
                else "both answers are the same: there is nothing to choose"
            )
            if contest.own():
                self.chat.keep(contest.own())
            else:
                self.chat.take_back()
            return
        for line in self._lines("better: 1, 2, t (tie), s (skip) > "):
            word = line.strip().lower()
            if word in CHOICES:
                self.chat.record(contest, CHOICES[word], self.record)
                say(f"recorded in {self.record}")
                return
            if word == "s":
                break
            say("write 1, 2, t (tie) or s (skip)")
        self.chat.keep(contest.own())

    def _show(self, contest: Contest) -> None:
        if self.is_json:
            self._write(json.dumps({"first": contest.first, "second": contest.second}, ensure_ascii=False) + "\n")
            return
        width = max((shutil.get_terminal_size((100, 24)).columns - 3) // 2, 20)
        sides = [_wrapped(text, width) for text in ("1\n" + contest.first, "2\n" + contest.second)]
        for index in range(max(map(len, sides))):
            left, right = (side[index] if index < len(side) else "" for side in sides)
            self._write(f"{left:<{width}} | {right}".rstrip() + "\n")

    def _command(self, name: str, rest: str) -> None:
        rest = rest.strip()
        match name:
            case "/help":
                say(COMMANDS)
            case "/reset":
                self.chat.reset()
                say("forgotten")
            case "/system":
                self.chat.system = rest or None
                say("system message set" if rest else "no system message")
            case "/save" if rest:
                self.chat.save(Path(rest))
                say(f"saved in {rest}")
            case "/compare" if rest:
                self.chat.compare_with(rest)
                say(f"both answer from now on: {self.chat.name} and {rest}")
            case _:
                say(f"no command {name!r} of that form\n{COMMANDS}")

    def _lines(self, mark: str) -> Iterator[str]:
        while True:
            try:
                if self.is_live:
                    sys.stderr.write(mark)
                    sys.stderr.flush()
                line = sys.stdin.readline()
            except KeyboardInterrupt:
                say("\n(/quit or Ctrl-D leaves)")
                continue
            if not line:
                return
            yield line.rstrip("\r\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]
