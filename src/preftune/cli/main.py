"""The command line: verbs are loaded only when called, errors are one line, exit codes mean something.

exit 0 ok, 1 failed, 2 wrong usage, 3 a gate refused, 130 interrupted. stdout is data, stderr is talk.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

from preftune.cli.output import print_error, say
from preftune.core.errors import Blocked, Interrupted, NonFiniteLoss, PreftuneError, RankLost, UsageError
from preftune.core.launch import Launch
from preftune.core.leaving import end
from preftune.core.loading import own_process, without_collections
from preftune.core.version import __version__

SAID_BY_ALL = (Blocked, Interrupted, NonFiniteLoss, UsageError)  # errors that every process of a run meets alike

VERBS = {
    "init": "A recipe and a small data set that run at once.",
    "demo": "Align the embedded starter model and print the verdict.",
    "check": "Validate data files: every bad row with line, field and reason.",
    "convert": "Convert data files between formats.",
    "generate": "Make pairs: sample from a model, judge, pair.",
    "import-config": "A job of TRL, Axolotl, LLaMA-Factory, Together, OpenAI or SeekrFlow as a recipe.",
    "label": "Fill labels by a judge, asked in both orders.",
    "plan": "Say what a recipe would do, and refuse what cannot work.",
    "reference": "Score what a recipe's reference will be asked; kept for every run.",
    "train": "Train every stage of a recipe.",
    "run": "Plan, train, evaluate and report in one go.",
    "sweep": "A grid of settings on one cached reference: drift against win rate.",
    "compare": "Compare two models, or what they wrote, by a judge.",
    "eval": "Prove how much better a trained run got, on unseen prompts.",
    "export": "Write a trained model for other programs, and prove that it is the same.",
    "serve": "Serve the API, with a worker.",
    "worker": "Run queued jobs.",
    "alias": "Movable names of models, such as production: list, set, history.",
    "keys": "API keys of an installation: make, list, revoke.",
    "backup": "Write the whole state of a server to one file.",
    "restore": "Bring a server back from a backup.",
    "chat": "Talk to a model; record which of two answers is better.",
    "schema": "JSON Schema of recipes, judges, examples and reports.",
    "doctor": "Look at the machine: what would stop a run, and what is missing.",
    "gc": "Give disk space back: leftovers, old checkpoints, old caches.",
    "ls": "List runs, jobs, models, files, losses, formats, sources, judges or preset recipes.",
    "show": "Show one run or job: its stages, metrics, verdict and files.",
    "logs": "What happened to a job.",
    "cancel": "Cancel a job.",
    "pause": "Pause a job at its last checkpoint.",
    "resume": "Let a paused job go on.",
}


REMOTE = (
    "train", "eval", "compare", "check", "chat", "export", "ls", "show", "logs", "cancel", "pause", "resume", "alias", "keys",
)  # fmt: skip  # verbs that a server elsewhere can do
_ITS_MACHINE = "it is the operator's: run it on the server's own machine, without --server"
INSTEAD = {
    "generate": "make pairs here without --server; `preftune --server URL check FILE` uploads them",
    "label": "label here without --server; `preftune --server URL check FILE` uploads the result",
    "convert": "convert here without --server; `preftune --server URL check FILE` uploads the result",
    "plan": "a server plans each job before it trains: `preftune --server URL train RECIPE`",
    "reference": "a server scores references when it trains: `preftune --server URL train RECIPE`",
    "run": "`preftune --server URL train RECIPE` trains there, then `preftune --server URL eval MODEL` proves the model",
    "sweep": "train each point there: `preftune --server URL train RECIPE KEY=VALUE`",
    **dict.fromkeys(("serve", "worker", "backup", "restore", "doctor", "gc"), _ITS_MACHINE),
}  # what to do in the place of a verb that no server does; the others work on files of this machine


class LazyGroup(click.Group):
    """A group that imports a verb's module only when the verb is called: --help stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Verbs in the order of the work."""
        del ctx
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command, or None for an unknown one."""
        del ctx
        if cmd_name not in VERBS:
            return None
        with without_collections():
            module = importlib.import_module(f"preftune.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs, from the table above: nothing is imported."""
        del ctx
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Like click's, with a suggestion for a mistyped verb."""
        from preftune.core.registry import suggest

        size = Launch.from_environment().size
        if size > 1 and args and args[0] in VERBS and args[0] != "train":
            raise click.UsageError(f"torchrun started {size} processes, and only train shares its work; run {args[0]} without it")
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            raise click.UsageError(f"no verb {args[0]!r}: {suggest(args[0], list(VERBS))}", ctx)
        return super().resolve_command(ctx, args)


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with `preftune demo`. Each verb has its own --help with examples.",
)
@click.version_option(__version__, "--version", prog_name="preftune")
@click.option("--server", metavar="URL", envvar="PREFTUNE_SERVER", help=f"Do it on a server: {', '.join(REMOTE)}.")
@click.pass_context
def cli(ctx: click.Context, /, server: str | None) -> None:
    """Preference tuning end to end: pairs in, an aligned model and the proof out."""
    is_typed = ctx.get_parameter_source("server") == click.core.ParameterSource.COMMANDLINE
    if server and is_typed and ctx.invoked_subcommand not in REMOTE:
        raise click.UsageError(
            f"{ctx.invoked_subcommand} works on this machine; {INSTEAD.get(str(ctx.invoked_subcommand), 'leave --server out')}"
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    own_process()
    given = sys.argv[1:] if arguments is None else arguments
    is_json = "--json" in given
    try:
        result: Any = cli.main(args=given, prog_name="preftune", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except PreftuneError as error:
        code = _tell(error, is_json=is_json)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        hint = f"; see `{error.ctx.command_path} --help`" if isinstance(error, click.UsageError) and error.ctx else ""
        code = print_error(UserMistake(error.format_message() + hint), 2, is_json=is_json)
    except (KeyboardInterrupt, click.Abort):
        code = print_error(UserMistake("interrupted"), 130, is_json=is_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except MemoryError:
        code = print_error(
            UserMistake("out of memory; lower tokens_per_pack, or use adapter: lora with dtype: bfloat16"), 1, is_json=is_json
        )
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM}:
            raise
        code = print_error(UserMistake(_say(error)), 1, is_json=is_json)
    if arguments is None:  # the process is this verb's alone
        end(code)
    sys.exit(code)


def _tell(error: PreftuneError, *, is_json: bool) -> int:
    """Print an error; of several processes the first speaks, and others where what they say is theirs alone."""
    launch = _launch()
    if launch.is_first:
        print_error(error, error.exit_code, is_json=is_json)
    elif not isinstance(error, SAID_BY_ALL):
        say(f"[rank {launch.rank}] error: {' '.join(str(error).split())}")
    if isinstance(error, RankLost):  # the threads of a broken connection may keep the interpreter from ending
        sys.stdout.flush()
        os._exit(error.exit_code)
    return error.exit_code


def _launch() -> Launch:
    try:
        return Launch.from_environment()
    except UsageError:
        return Launch()


class UserMistake(PreftuneError):
    """An error of click or of the system in our one-line form."""


def _say(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return f"{where}{error.strerror}; free some space and run again with --resume, what was saved before is whole"
    return f"{where}{error.strerror}; choose a folder that can be written, for instance with output=FOLDER"
