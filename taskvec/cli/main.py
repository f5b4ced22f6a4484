"""The `taskvec` command: its group of verbs, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click

from .._version import __version__
from ..errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USAGE, TaskvecError, UsageError, show

_COMMANDS = {  # verb -> module, attribute, what it does; a module is imported when its verb is used
    "subtract": ("edit", "subtract", "MODEL − α·(OLD − MODEL): take away what OLD learned."),
    "add": ("edit", "add", "MODEL + α·(OLD − MODEL): put in what OLD learned."),
    "extract": ("extract", "extract", "Save TUNED − BASE as a task vector."),
    "lora": ("lora", "lora", "Merge an adapter, or make one of a fine-tune."),
    "sweep": ("sweep", "sweep", "Try several α, evaluate each, and choose one."),
    "diff": ("diff", "diff", "How far B is from A: norms, cosines, changes."),
    "inspect": ("inspect", "inspect", "What a checkpoint or an adapter holds."),
    "verify": ("verify", "verify", "Check an output: checksums, values, arithmetic."),
    "push": ("push", "push", "Push an output to the Hub, in one commit."),
}


class Terminated(BaseException):
    """SIGTERM, raised in the main thread so that the run cleans up as it does for Ctrl-C."""


class Verbs(click.Group):
    """Loads a verb's module when the verb is asked for, so that --help stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command = getattr(importlib.import_module(f".{module}", __package__), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs, without loading one."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, said) for verb, (_, _, said) in _COMMANDS.items()])


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": lambda s: s.replace("_", "-")},
    epilog="Example: taskvec subtract base.safetensors old.safetensors --alpha 0.3 -o edited",
)
@click.version_option(__version__, "-V", "--version", prog_name="taskvec")
def taskvec() -> None:
    """Add and subtract what a fine-tune taught a model, straight on checkpoint files.

    No model is instantiated, no code from a model runs, no pickle is opened. Exit codes: 0 ok, 1 error, 2 usage, 3 inputs
    that do not fit together (or verify or diff found a difference), 130 interrupted.
    """


def main() -> NoReturn:
    """Run the command line and exit. No traceback unless TASKVEC_DEBUG=1."""
    if not sys.stderr.isatty() or {"-q", "--quiet", "--json"} & set(sys.argv):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its warnings repeat what is said here, with signed URLs
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the run has its own threads; a pool of BLAS only costs start-up
    gc.set_threshold(100_000)  # plans are many small objects without cycles: do not look for some
    signal.signal(signal.SIGTERM, _terminate)
    code = _run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def take_token(ctx: click.Context, param: click.Parameter, token: str | None) -> None:
    """--token: for this process only, and never shown."""
    if token is not None:
        os.environ["HF_TOKEN"] = token.strip()


TOKEN = click.option(
    "--token",
    expose_value=False,
    callback=take_token,
    metavar="TOKEN",
    help="Of the Hub, in place of HF_TOKEN and `hf auth login`.",
)
REVISION = click.option("--revision", metavar="REV", help="Branch, tag or commit of the first model, if it is on the Hub.")


def _run() -> int:
    debug = os.environ.get("TASKVEC_DEBUG") == "1"
    try:
        result = taskvec.main(prog_name="taskvec", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except TaskvecError as error:
        if debug:
            raise
        return _fail(type(error).__name__, error.message, error.hint, error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except click.ClickException as error:
        usage = isinstance(error, click.UsageError)
        hint = f"See {error.ctx.command_path} --help" if isinstance(error, click.UsageError) and error.ctx else None
        return _fail(
            UsageError.__name__ if usage else type(error).__name__,
            show(error.format_message(), 2000).rstrip("."),
            hint,
            EXIT_USAGE if usage else EXIT_ERROR,
        )
    except (KeyboardInterrupt, click.Abort):
        return _fail("Interrupted", "interrupted; no half-made output is left", None, EXIT_INTERRUPTED)
    except Terminated:
        return _fail("Terminated", "terminated; no half-made output is left", None, EXIT_TERMINATED)
    except BrokenPipeError:
        return EXIT_ERROR
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
        return _fail(type(error).__name__, show(what, 2000), "Set TASKVEC_DEBUG=1 to see where", EXIT_ERROR)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _fail(kind: str, message: str, hint: str | None, code: int) -> int:
    """One line on stderr, and with --json one object on stdout."""
    click.echo(f"taskvec: {message}" + (f". {hint}" if hint else ""), err=True)
    if "--json" in sys.argv:
        print_json({"ok": False, "error": {"type": kind, "message": message, "hint": hint}, "exit_code": code})
    return code


def print_json(content: dict[str, Any]) -> None:
    """The one object that --json prints on stdout."""
    click.echo(json.dumps(content, ensure_ascii=True))
