"""``preftune serve``."""

from __future__ import annotations

import click

from preftune.cli.output import say
from preftune.core.addresses import limit_addresses
from preftune.core.errors import UsageError

EPILOG = """\b
Examples:
  preftune serve
  preftune serve --port 9000 --model my-sft=models/my-sft
  PREFTUNE_API_KEY=... preftune serve --host 0.0.0.0 --allow-host tune.example.org --public-url https://tune.example.org"""


@click.command("serve", epilog=EPILOG)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, help="Port to listen on; 0 takes a free one.")
@click.option("--model", "models", multiple=True, metavar="NAME=FOLDER", help="Offer a model under a name; repeatable.")
@click.option("--allow-host", "allowed", multiple=True, metavar="HOST", help="A further Host header that is answered.")
@click.option("--public-url", help="What absolute URLs begin with, behind a proxy.")
@click.option("--trusted-proxy", "proxies", multiple=True, metavar="ADDRESS", help="A proxy whose X-Forwarded-* are believed.")
@click.option(
    "--allow-url", "reached", multiple=True, metavar="HOST",
    help="What users' URLs (judges, webhooks) may reach: a host, *.HOST, a network, HOST:PORT, or `public`. Nothing by default.",
)  # fmt: skip
@click.option("--log", "log", type=click.Choice(["plain", "json"]), default="plain", show_default=True, help="Log of requests.")
@click.option("--slots", default=1, show_default=True, help="Jobs that the embedded worker runs at once; 0 starts no worker.")
def command(
    host: str,
    port: int,
    models: tuple[str, ...],
    allowed: tuple[str, ...],
    public_url: str | None,
    proxies: tuple[str, ...],
    reached: tuple[str, ...],
    log: str,
    slots: int,
) -> int:
    """Serve the API with an embedded worker: OpenAI's, Together's and SeekrFlow's clients work unchanged."""
    from preftune.app.jobs.platform import Platform
    from preftune.server.observe import write_log
    from preftune.server.run import serve
    from preftune.server.settings import ServerSettings

    limit_addresses(reached)
    write_log(log)
    given: dict[str, str] = {}
    for one in models:
        name, sign, folder = one.partition("=")
        if not sign or not name or not folder:
            raise UsageError(f"--model {one}: write NAME=FOLDER")
        given[name] = folder
    settings = ServerSettings(host=host, port=port, allowed_hosts=allowed, public_url=public_url, trusted_proxies=proxies)
    serve(Platform.open(), settings, given, slots=slots, say=say)
    return 0
