"""``preftune keys``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from preftune.cli.output import print_json, say

if TYPE_CHECKING:
    from preftune.app.jobs.platform import Platform

EPILOG = """\b
Examples:
  preftune keys add alice
  preftune keys add labeller --role annotator --project team-b
  preftune keys list --json
  preftune keys revoke key_0123456789abcdef01234567"""


@click.group("keys", epilog=EPILOG)
def command() -> None:
    """API keys of an installation: make, list and revoke them. A server listens elsewhere than on loopback only with one."""


@command.command("add")
@click.argument("name")
@click.option(
    "--role", type=click.Choice(["admin", "developer", "annotator"]), default="developer", show_default=True,
    help="What the key may do.",
)  # fmt: skip
@click.option("--project", default="default", show_default=True, help="Project by name; made where there is none.")
@click.option("--json", "is_json", is_flag=True, help="Print the key as JSON.")
def add(name: str, role: Literal["admin", "developer", "annotator"], project: str, is_json: bool) -> int:
    """Make a key. Its value is printed once and never kept."""
    from preftune.app.jobs.keys import add_key, check_project_name

    check_project_name(project)
    with _opened() as platform:
        key, value = add_key(platform, platform.project(project).id, name, role)
    if is_json:
        print_json({"id": key.id, "name": key.name, "role": key.role, "project": project, "value": value})
        return 0
    click.echo(value)
    say(f"key {key.id} ({role} of project {project}); its value is shown only now")
    return 0


@command.command("list")
@click.option("--json", "is_json", is_flag=True, help="Print the list as JSON.")
def list_(is_json: bool) -> int:
    """List keys, revoked ones too; never a value."""
    from preftune.app.jobs.keys import list_keys

    with _opened() as platform:
        rows = list_keys(platform)
    if is_json:
        print_json(rows)
        return 0
    for row in rows:
        state = f"revoked {row['revoked_at']}" if row["revoked_at"] else f"last used {row['last_used_at'] or 'never'}"
        click.echo(f"{row['id']}  {row['prefix']}...  {row['role']:<9}  {row['project']}  {row['name']}  {state}")
    if not rows:
        say("no keys; `preftune keys add NAME` makes one")
    return 0


@command.command("revoke")
@click.argument("key_id", metavar="KEY")
def revoke(key_id: str) -> int:
    """Revoke a key by its id: a running server refuses it from its next request on."""
    from preftune.app.jobs.keys import revoke_key

    with _opened() as platform:
        key = revoke_key(platform, key_id)
    say(f"key {key.id} ({key.name}) is revoked")
    return 0


def _opened() -> Platform:
    import logging

    from preftune.app.jobs.platform import Platform

    logging.getLogger("alembic").setLevel(logging.WARNING)
    return Platform.open()
