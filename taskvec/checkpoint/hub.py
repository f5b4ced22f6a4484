"""The Hub's client and its failures: one HfApi for everything, every error of it one line with the next thing to type."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .._version import __version__
from ..errors import HubError, TaskvecError, show

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN"
_AGAIN = "Run the same command again; what was transferred is not sent twice"
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "hf_xet")  # have error trees of their own
_NO_ROOM = re.compile(r"\b(storage|quota|too large|no space|limit reached)\b", re.IGNORECASE)
_STATUS = {  # of a reply -> what it means, what to do
    401: ("the token was not accepted", _LOG_IN),
    403: ("this user or token may not {what}", "Take a token with write access to it: `hf auth login`"),
    409: ("it exists already, or is changing just now", "Name another repository, or run again"),
    412: ("it was changed by someone else meanwhile", "Look at what was changed, then run the same command again"),
    429: ("too many requests for now", "Wait a few minutes. " + _AGAIN),
}


def hub_api(token: str | None) -> HfApi:
    """The client. `token`: None for the one that HF_TOKEN or `hf auth login` gives."""
    from huggingface_hub import HfApi

    return HfApi(token=token.strip() if token else None, library_name="taskvec", library_version=__version__)


@contextmanager
def talking_about(repo: str, what: str) -> Iterator[None]:
    """Within it, what the Hub's client raises becomes a HubError about `repo`; `what` was being done."""
    try:
        yield
    except TaskvecError:
        raise
    except Exception as error:
        said = _said(repo, what, _cause(error))
        if said is None:
            raise
        raise said from error


def _cause(error: Exception) -> BaseException:
    """What really happened: the client wraps a failed upload in a RuntimeError."""
    return error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error


def _said(repo: str, what: str, error: BaseException) -> HubError | None:
    """The error as one line; None if it is not of the Hub, the network or the disk."""
    import huggingface_hub.errors as hub

    if isinstance(error, hub.GatedRepoError):
        hint = f"Ask for access on its page on the Hub. {_LOG_IN} as that user"
        return HubError(f"{show(repo)}: gated, and this user may not {what}", hint=hint)
    if isinstance(error, hub.RepositoryNotFoundError):
        hint = f"Check the name (a local path would have to exist). {_LOG_IN}"
        return HubError(
            f"{show(repo)}: no such repository on the Hub, or a private one that this user may not see", hint=hint
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return HubError(f"{show(repo)}: no such revision", hint="Name a branch, a tag or a commit of it")
    if isinstance(error, (hub.OfflineModeIsEnabled, hub.RevisionResolutionError, hub.LocalEntryNotFoundError)):
        offline = "HF_HUB_OFFLINE is set" if is_offline() else "the Hub cannot be reached"
        return HubError(f"{show(repo)}: {offline}, and it is not in the cache", hint="Name a local path, or go online")
    if isinstance(error, hub.EntryNotFoundError):
        return HubError(f"{show(repo)}: no such file: {_first_line(error)}")
    if isinstance(error, hub.LocalTokenNotFoundError):
        return HubError(f"{show(repo)}: no token to {what} with", hint=_LOG_IN)
    if isinstance(error, hub.HfHubHTTPError):
        return _refused(repo, what, error)
    if isinstance(error, (hub.HFValidationError, hub.HfUriError)):
        return HubError(f"{show(repo)}: not a name of the Hub: {_first_line(error)}")
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, (OSError, ValueError, RuntimeError)) or type(error).__module__.partition(".")[0] in _TRANSPORTS:
        hint = "Free space where HF_HOME lies" if full else _AGAIN
        return HubError(f"{show(repo)}: could not {what}: {_first_line(error)}", hint=hint)
    return None


def _refused(repo: str, what: str, error: Exception) -> HubError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (400, 403, 413, 507) and _NO_ROOM.search(str(error)):
        hint = "Free some of the quota, or push to another namespace"
        return HubError(f"{show(repo)}: the Hub has no room for it: {_last_line(error)}", hint=hint)
    reason, hint = _STATUS.get(status or 0, ("could not {what}", _AGAIN))
    return HubError(f"{show(repo)}: {reason.format(what=what)}: {_last_line(error)}", hint=hint)


def is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _first_line(error: BaseException) -> str:
    """What the error says, without the lines that repeat the request. Never a header, so never a token."""
    return _line(error, 0)


def _last_line(error: BaseException) -> str:
    """The Hub's own words, which come last in what the client says of a refused request."""
    return _line(error, -1)


def _line(error: BaseException, place: int) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = (lines[place] if lines else type(error).__name__).split()
    words = [word for word in words if "://" not in word and "hf_" not in word and "Bearer" not in word]
    return str(show(" ".join(words), 300)).rstrip(".")
