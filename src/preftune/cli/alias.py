"""``preftune alias``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import click

from preftune.cli.installation import event_line, reached
from preftune.cli.output import print_json, say
from preftune.core.errors import UsageError

if TYPE_CHECKING:
    from preftune.app.jobs.platform import Platform
    from preftune.core import api
    from preftune.sdk import Client

EPILOG = """\b
Examples:
  preftune alias list
  preftune alias set production starter-mine-0e9c0065 --reason "won 61 % on the held-out prompts"
  preftune alias history production
  preftune --server https://tune.example.org alias delete production"""
json_option = click.option("--json", "is_json", is_flag=True, help="Print the result as JSON.")


@click.group("alias", epilog=EPILOG)
def command() -> None:
    """Movable names of models, such as production, that clients ask by: list, set, delete; where each one pointed."""


@command.command("list")
@json_option
def list_(is_json: bool) -> int:
    """List aliases and where they point."""
    with _aliases() as aliases:
        rows = [one for one in aliases.every() if one.model]
    if is_json:
        print_json([one.model_dump(mode="json") for one in rows])
        return 0
    for one in rows:
        click.echo(f"{one.name}  {one.model_name or one.model}  {one.updated_at:%Y-%m-%d %H:%M}")
    if not rows:
        say("no aliases; `preftune alias set NAME MODEL` makes one")
    return 0


@command.command("set")
@click.argument("name")
@click.argument("model")
@click.option("--reason", default="", help="Why; kept in the history.")
@json_option
def set_(name: str, model: str, reason: str, is_json: bool) -> int:
    """Point an alias to a model, by its name or id."""
    with _aliases() as aliases:
        made = aliases.point(name, model, reason)
    if is_json:
        print_json(made.model_dump(mode="json"))
    else:
        click.echo(f"{made.name}  {made.model_name or made.model}")
    return 0


@command.command("delete")
@click.argument("name")
def delete(name: str) -> int:
    """Let an alias point nowhere; its history stays."""
    with _aliases() as aliases:
        aliases.clear(name)
    say(f"alias {name} points nowhere")
    return 0


@command.command("history")
@click.argument("name")
@json_option
def history(name: str, is_json: bool) -> int:
    """Where an alias pointed, newest first."""
    with _aliases() as aliases:
        events = list(aliases.history(name))
    if is_json:
        print_json([one.model_dump(mode="json") for one in events])
        return 0
    for one in events:
        why = one.data.get("reason")
        click.echo(event_line(one) + (f"  ({why})" if why else ""))
    return 0


class _Aliases(Protocol):
    def every(self) -> Iterator[api.Alias]: ...
    def point(self, name: str, model: str, reason: str) -> api.Alias: ...
    def clear(self, name: str) -> None: ...
    def history(self, name: str) -> Iterator[api.Event]: ...


def _aliases() -> AbstractContextManager[_Aliases]:
    """Those of a server's project, or of this machine's default project."""
    return reached(_There, _Here)


class _There:
    def __init__(self, client: Client) -> None:
        self._aliases = client.aliases

    def every(self) -> Iterator[api.Alias]:
        return self._aliases.list()

    def point(self, name: str, model: str, reason: str) -> api.Alias:
        return self._aliases.set(name, model, reason=reason)

    def clear(self, name: str) -> None:
        self._aliases.delete(name)

    def history(self, name: str) -> Iterator[api.Event]:
        return self._aliases.history(name)


class _Here:
    def __init__(self, platform: Platform) -> None:
        from preftune.server.native import shown

        self._platform, self._shown = platform, shown
        self._project = platform.project("default").id

    def every(self) -> Iterator[api.Alias]:
        from preftune.server.lookup import every
        from preftune.store.records import Alias

        return (self._shown.alias(self._platform, one) for one in every(self._platform, Alias, self._project, {}))

    def point(self, name: str, model: str, reason: str) -> api.Alias:
        import re

        from preftune.app.jobs.aliases import set_alias
        from preftune.core.api import NAME

        if not re.fullmatch(NAME, name) or len(name) > 64:
            raise UsageError(f"alias {name!r}: write at most 64 letters, digits, dots, dashes or underscores")
        made = set_alias(self._platform, self._project, name, model, reason=reason, actor="operator")
        return self._shown.alias(self._platform, made)

    def clear(self, name: str) -> None:
        from preftune.app.jobs.aliases import clear_alias, find_alias

        found = find_alias(self._platform, self._project, name)
        if found is None:
            raise UsageError(f"there is no alias {name!r}; `preftune alias list` lists them")
        clear_alias(self._platform, found, actor="operator")

    def history(self, name: str) -> Iterator[api.Event]:
        from preftune.server.lookup import every
        from preftune.store.base import Query
        from preftune.store.records import Alias, Event

        found = self._platform.store.page(Alias, Query(self._project, {"name": name}, limit=1)).items
        if not found:
            raise UsageError(f"there is no alias {name!r}; `preftune alias list` lists them")
        return map(self._shown.event, every(self._platform, Event, self._project, {"subject": found[0].id}))
