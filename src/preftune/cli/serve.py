"""``preftune serve``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from preftune.cli.output import say
from preftune.core.addresses import limit_addresses
from preftune.core.errors import UsageError
from preftune.core.loading import without_collections

if TYPE_CHECKING:
    from preftune.app.serving.service import Capturing
    from preftune.serving.embedded import Dtype

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
@click.option(
    "--upstream", "elsewhere", multiple=True, metavar="NAME=URL",
    help="A base, and all that is tuned on it, that another OpenAI-compatible server answers for: "
    "NAME=URL#model=...&adapters=vllm&key=VARIABLE.",
)  # fmt: skip
@click.option(
    "--capture", type=click.Choice(["off", "asked", "all"]), default="off", show_default=True,
    help="Keep served conversations for feedback: none, those whose request says store: true, or all but those that say false.",
)  # fmt: skip
@click.option(
    "--adapter-folder", metavar="DIR", help="Let admins offer adapters below a folder by /v1/load_lora_adapter, as vLLM does."
)
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True,
    help="Of served weights; auto is bfloat16 on a GPU, else float32.",
)  # fmt: skip
@click.option("--bases", default=2, show_default=True, help="Base models that are kept in memory to be asked.")
@click.option("--answers", default=32, show_default=True, help="Answers of one base that grow at once.")
@click.option("--queue", default=256, show_default=True, help="Requests of one base that may wait; more get a 429.")
@click.option("--kept-gb", default=2.0, show_default=True, help="Memory of one base for keys and values, in GB.")
@click.option("--adapters-gb", default=1.0, show_default=True, help="Memory of one base for adapters, in GB.")
@click.option(
    "--requests-per-minute", "pace", type=click.IntRange(min=0), default=0, show_default=True,
    help="Of one key; more get a 429 that says when to come again. 0 is no limit.",
)  # fmt: skip
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
    elsewhere: tuple[str, ...],
    capture: Capturing,
    adapter_folder: str | None,
    dtype: Dtype,
    bases: int,
    answers: int,
    queue: int,
    kept_gb: float,
    adapters_gb: float,
    pace: int,
    slots: int,
) -> int:
    """Serve the API with an embedded worker: OpenAI's, Together's and SeekrFlow's clients work unchanged."""
    with without_collections():
        from preftune.app.jobs.platform import Platform
        from preftune.app.serving.service import ServingOptions
        from preftune.server.observe import write_log
        from preftune.server.run import serve
        from preftune.server.settings import ServerSettings
        from preftune.serving.embedded import EngineOptions
        from preftune.serving.upstream import parse_upstream

    limit_addresses(reached)
    write_log(log)
    given: dict[str, str] = {}
    for one in models:
        name, sign, folder = one.partition("=")
        if not sign or not name or not folder:
            raise UsageError(f"--model {one}: write NAME=FOLDER")
        given[name] = folder
    settings = ServerSettings(
        host=host, port=port, allowed_hosts=allowed, public_url=public_url, trusted_proxies=proxies,
        adapter_folder=adapter_folder, requests_per_minute=pace,
    )  # fmt: skip
    for name, value in {"--bases": bases, "--answers": answers, "--queue": queue, "--kept-gb": kept_gb}.items():
        if value <= 0:
            raise UsageError(f"{name} {value}: must be more than 0")
    engine = EngineOptions(
        dtype=dtype, rows=answers, waiting=queue, kept_bytes=int(kept_gb * 1e9), adapter_bytes=int(adapters_gb * 1e9)
    )
    upstreams = dict(parse_upstream(one, os.environ) for one in elsewhere)
    options = ServingOptions(engine, bases, capture=capture)
    serve(Platform.open(), settings, given, slots=slots, say=say, serving=options, upstreams=upstreams)
    return 0
