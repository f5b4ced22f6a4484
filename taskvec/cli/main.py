"""The `taskvec` command: its group of verbs, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

import click

from .._version import __version__
from ..errors import EXIT_ERROR, EXIT_HUNG_UP, EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USAGE, TaskvecError, UsageError, show

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
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Terminated(BaseException):
    """SIGTERM or SIGHUP, raised in the main thread so that the run cleans up as it does for Ctrl-C. Holds the exit code."""


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
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup's
        signal.signal(signal.SIGHUP, _terminate)
    code = _run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _silence()
    except OSError as error:
        code = _unprinted(error)
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
    except (KeyboardInterrupt, click.Abort) as stop:
        return _fail("Interrupted", f"interrupted; {_what_is_left(stop)}", None, EXIT_INTERRUPTED)
    except Terminated as stop:
        return _fail("Terminated", f"terminated; {_what_is_left(stop)}", None, stop.args[0])
    except BrokenPipeError:
        return EXIT_ERROR
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.filename is None and error.errno in _FULL:
            return _unprinted(error)  # errors of files are named: this is from printing
        what = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
        return _fail(type(error).__name__, show(what, 2000), "Set TASKVEC_DEBUG=1 to see where", EXIT_ERROR)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)  # it often comes twice, from the terminal and from the shell
    raise Terminated(EXIT_HUNG_UP if number == signal.SIGHUP else EXIT_TERMINATED)


def _what_is_left(stop: BaseException) -> str:
    """Finished files, if a run was far enough to have some; a click.Abort stands for the KeyboardInterrupt before it."""
    return str(getattr(stop, "kept", getattr(stop.__context__, "kept", "no half-made output is left")))


def _fail(kind: str, message: str, hint: str | None, code: int) -> int:
    """One line on stderr, and with --json one object on stdout."""
    click.echo(f"taskvec: {message}" + (f". {hint}" if hint else ""), err=True)
    if "--json" in sys.argv:
        try:
            print_json({"ok": False, "error": {"type": kind, "message": message, "hint": hint}, "exit_code": code})
        except OSError:  # what failed was said on stderr
            _silence()
    return code


def _unprinted(error: OSError) -> int:
    """What could not be printed is given up, in one line on stderr."""
    _silence()
    click.echo(f"taskvec: stdout: {error.strerror}. Free space, or send what is printed elsewhere", err=True)
    return EXIT_ERROR


def _silence() -> None:
    """Let Python's last flush of stdout go nowhere: it would fail again, with lines of its own."""
    with suppress(OSError):  # it may be no file at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(content: dict[str, Any]) -> None:
    """The one object that --json prints on stdout."""
    click.echo(json.dumps(content, ensure_ascii=True))
