"""``preftune keys``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import click

from preftune.cli.installation import server
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
    address = server()
    if address is not None:
        from preftune.sdk import Client

        with Client(address) as client:
            made = client.keys.add(name, role, project=project)
        key_id, value = made.id, made.value
    else:
        with _opened() as platform:
            key, value = add_key(platform, platform.project(project).id, name, role)
        key_id = key.id
    if is_json:
        print_json({"id": key_id, "name": name, "role": role, "project": project, "value": value})
        return 0
    click.echo(value)
    say(f"key {key_id} ({role} of project {project}); its value is shown only now")
    return 0


@command.command("list")
@click.option("--json", "is_json", is_flag=True, help="Print the list as JSON.")
def list_(is_json: bool) -> int:
    """List keys, revoked ones too; never a value."""
    from preftune.app.jobs.keys import list_keys

    address = server()
    if address is not None:
        rows = _rows_of(address)
    else:
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

    address = server()
    if address is not None:
        from preftune.sdk import Client

        with Client(address) as client:
            name = client.keys.revoke(key_id).name
    else:
        with _opened() as platform:
            name = revoke_key(platform, key_id).name
    say(f"key {key_id} ({name}) is revoked")
    return 0


def _rows_of(address: str) -> list[dict[str, Any]]:
    """Keys of a server's project, as rows like those of this machine."""
    from preftune.sdk import Client

    with Client(address) as client:
        names = {project.id: project.name for project in client.access.projects()}
        fields = ("id", "name", "role", "prefix", "created_at", "last_used_at", "revoked_at")
        return [
            {**{name: one.model_dump(mode="json")[name] for name in fields}, "project": names.get(one.project, one.project)}
            for one in client.keys.list()
        ]


def _opened() -> Platform:
    import logging

    from preftune.app.jobs.platform import Platform

    logging.getLogger("alembic").setLevel(logging.WARNING)
    return Platform.open()
