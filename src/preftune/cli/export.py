"""``preftune export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from preftune.cli.installation import typed_server
from preftune.cli.output import print_json, print_result
from preftune.core.errors import UsageError

EPILOG = """\b
Examples:
  preftune export tiny-20260101-120000-ab12 --to my-model
  preftune export runs/tiny@40 --to my-adapter --form adapter
  preftune export RUN --to my-model --dtype bfloat16 --json
  preftune export RUN --to my-model.gguf --gguf q8_0
  preftune --server https://tune.example.org export starter-mine-1 --to my-model
  HF_TOKEN=... preftune export RUN --to my-model --push-to-hub me/my-model --private

Exit code 1, and nothing at DIR, where the export does not compute what the run's model does."""


@click.command("export", epilog=EPILOG)
@click.argument("model")
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The folder, or .gguf file, to write.")
@click.option(
    "--form", type=click.Choice(["merged", "adapter"]), default="merged", show_default=True, help="Whole weights, or LoRA."
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True, help="Of the weights.")
@click.option("--gguf", type=click.Choice(["f32", "f16", "q8_0"]), help="One file for llama.cpp, matrices of this type.")
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"), show_default=True, help="Where runs are."
)
@click.option("--push-to-hub", "repo", metavar="OWNER/NAME", help="Push the folder to the model hub (HF_ENDPOINT).")
@click.option("--private", "is_private", is_flag=True, help="Make a new repository private.")
@click.option(
    "--token-env", default="HF_TOKEN", show_default=True, metavar="VARIABLE", help="Variable that holds the hub's token."
)
@click.option("--json", "is_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    to: Path,
    *,
    gguf: Any,
    is_json: bool,
    repo: str | None,
    is_private: bool,
    token_env: str,
    **how: Any,
) -> int:
    """Write a trained model (run, RUN@STEP or folder) for other programs, and prove that it is the same model."""
    address = typed_server()
    if address is not None:
        from preftune.cli.remote_model import export_there

        for name, option in (("dtype", "--dtype"), ("gguf", "--gguf"), ("output", "--output"), ("repo", "--push-to-hub")):
            if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
                raise UsageError(f"{option} does not go with --server; fetch the folder, then run `preftune export` on it here")
        folder = export_there(address, model, to, how["form"])
        print_json({"folder": str(folder), "form": how["form"]}) if is_json else click.echo(str(folder))
        return 0
    from preftune.app.export import check_push, export_gguf, export_model, push

    if gguf is not None:
        for name, option in (("form", "--form"), ("dtype", "--dtype"), ("repo", "--push-to-hub")):
            if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
                raise UsageError(f"{option} does not go with --gguf, which writes one file of whole weights")
        print_result(export_gguf(model, to, gguf, how["output"]), is_json=is_json)
        return 0
    if repo is not None:
        check_push(repo, token_env)
    exported = export_model(model, to, **how)
    if repo is not None:
        exported = push(exported, repo, is_private=is_private, token_variable=token_env)
    print_result(exported, is_json=is_json)
    return 0
