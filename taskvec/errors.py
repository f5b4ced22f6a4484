"""The one exception tree of taskvec, and how a name from a file is shown to a person.

TaskvecError                          exit 1
├── UsageError (also ValueError)      exit 2   the call itself makes no sense: alpha is nan, two outputs, ...
├── CheckpointError                   exit 1   a file is not what its format promises
│   ├── HeaderError                            the safetensors header is malformed
│   └── SourceChangedError                     an input was truncated or changed under the run
├── MismatchError                     exit 3   the inputs are fine each, but do not fit together
│   ├── NameMismatchError                      tensor names
│   ├── ShapeMismatchError                     shapes or kinds of numbers
│   ├── QuantizedError                         a base whose stored numbers are not its weights
│   └── AdapterError                           an adapter that cannot be applied exactly
├── OutputError                       exit 1   the output cannot be made
│   ├── OutputExistsError
│   ├── OutputOverlapError                     it is, holds or lies in an input
│   └── NotEnoughDiskError
├── HubError                          exit 1   the Hub did not give or take what was asked
└── VerificationError                 exit 3   `taskvec verify` found a difference

The message is for the person: file, tensor, found, expected. `hint` says what to do, and names the flag that allows it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

__all__ = [
    "AdapterError",
    "CheckpointError",
    "HeaderError",
    "HubError",
    "MismatchError",
    "NameMismatchError",
    "NotEnoughDiskError",
    "OutputError",
    "OutputExistsError",
    "OutputOverlapError",
    "QuantizedError",
    "ShapeMismatchError",
    "SourceChangedError",
    "TaskvecError",
    "UsageError",
    "VerificationError",
]

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_MISMATCH = 0, 1, 2, 3
EXIT_HUNG_UP, EXIT_INTERRUPTED, EXIT_TERMINATED = 129, 130, 143  # 128 + SIGHUP, SIGINT, SIGTERM


class TaskvecError(Exception):
    """Base of everything taskvec raises on purpose. `str(error)` is one line."""

    exit_code = EXIT_ERROR

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


class UsageError(TaskvecError, ValueError):
    exit_code = EXIT_USAGE


class CheckpointError(TaskvecError):
    pass


class HeaderError(CheckpointError):
    pass


class SourceChangedError(CheckpointError):
    pass


class MismatchError(TaskvecError):
    exit_code = EXIT_MISMATCH


class NameMismatchError(MismatchError):
    pass


class ShapeMismatchError(MismatchError):
    pass


class QuantizedError(MismatchError):
    pass


class AdapterError(MismatchError):
    pass


class OutputError(TaskvecError):
    pass


class OutputExistsError(OutputError):
    pass


class OutputOverlapError(OutputError):
    pass


class NotEnoughDiskError(OutputError):
    pass


class HubError(TaskvecError):
    pass


class VerificationError(TaskvecError):
    exit_code = EXIT_MISMATCH


def show(name: object, limit: int = 200) -> str:
    """`name` with every control, bidi and unprintable character escaped: names come from files and end in a terminal. What
    is a token of the Hub, or a user and password in an address, is left out."""
    text = "".join(
        c if c.isprintable() and unicodedata.bidirectional(c) not in _BIDI_CONTROLS else ascii(c)[1:-1]
        for c in _shortened(_without_secrets(_shortened(str(name), 20 * limit)), limit)
    )
    return _shortened(text, limit)


def _without_secrets(text: str) -> str:
    return _SECRETS.sub(lambda found: f"{found[1] or found[2] or ''}…", text)


def _shortened(text: str, limit: int) -> str:
    """At most `limit` characters and an ellipsis: of a long path both ends tell, of a long name too."""
    return text if len(text) <= limit else text[: limit // 2] + "…" + text[len(text) - limit + limit // 2 :]


# user:password@, user@ (hf://name@revision has none); the value of ?key=value; a token, whose _ click makes a -
_SECRETS = re.compile(
    r"((?<!\bhf)://|://(?=[^/@\s]{0,200}:))(?:[^/:@\s]{0,200}:[^@\s]{0,200}|[^/@\s]{1,200})(?=@)"
    r"|([?&][\w.%-]{1,100}=)[^&#\s'\"]+"
    r"|(?:hf|api[_-]org)[_-](?:(?:oauth|jwt)[_-][\w.-]{20,}|[A-Za-z0-9]{30,})"
)
_BIDI_CONTROLS = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}


def counted(number: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`, `1,000 tensors`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def listing(names: Iterable[str], limit: int = 5) -> str:
    """The first few of `names`, and how many more there are."""
    shown = [show(name) for name in names]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def tell(error: BaseException, more: str) -> None:
    """Have it say that too: in the hint, or what is no TaskvecError (Ctrl-C, a signal) to the command line, as `kept`."""
    if isinstance(error, TaskvecError):
        error.hint = f"{error.hint}. {more}" if error.hint else more
    else:
        error.kept = more  # type: ignore[attr-defined]
