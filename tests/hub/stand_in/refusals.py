"""The ways the Hub says no: status, X-Error-Code and words.

The words marked "seen" were taken from error messages that people report; the others are ours, in the Hub's manner.
"""

from __future__ import annotations


class Refusal(Exception):
    """An error reply. `code` goes into X-Error-Code, `message` into X-Error-Message and the JSON body."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: object) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.extra = extra  # further keys of the JSON body
        self.headers: dict[str, str] = {}


def no_credentials() -> Refusal:
    """Something that needs a token, asked for without one. Seen."""
    return Refusal(401, "Invalid username or password.")


def no_repo_anonymous() -> Refusal:
    """A private or missing repository, asked for without a token: the Hub does not say which. Seen, but for the code: the
    client takes every 401 of an https Hub for a missing repository, and of an http one only those with the code.
    """
    return Refusal(401, "Invalid username or password.", "RepoNotFound")


def bad_token() -> Refusal:
    """A token that is wrong or expired fails on public repositories too. Seen."""
    return Refusal(401, "Invalid credentials in Authorization header")


def no_repo() -> Refusal:
    """A private or missing repository, asked for with somebody's token. Seen."""
    return Refusal(404, "Repository not found", "RepoNotFound")


def gated_anonymous(repo: str) -> Refusal:
    """Seen."""
    message = (
        f"Access to model {repo} is restricted. You must have access to it and be authenticated to access it. Please log in."
    )
    return Refusal(401, message, "GatedRepo")


def gated(repo: str, endpoint: str) -> Refusal:
    """Seen."""
    message = f"Access to model {repo} is restricted and you are not in the authorized list."
    return Refusal(403, f"{message} Visit {endpoint}/{repo} to ask for access.", "GatedRepo")


def no_revision(revision: str) -> Refusal:
    """Seen."""
    return Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def no_entry(commit: str) -> Refusal:
    """Seen. The client caches that the file is missing, for this commit."""
    refusal = Refusal(404, "Entry not found", "EntryNotFound")
    refusal.headers["X-Repo-Commit"] = commit
    return refusal


def no_file_to_delete() -> Refusal:
    """Seen."""
    return Refusal(404, "A file with this name doesn't exist", "EntryNotFound")


def namespace_forbidden(namespace: str) -> Refusal:
    """A token that may not create repositories there: read-only, fine-grained, or another's namespace. Seen."""
    return Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')


def read_token() -> Refusal:
    """Seen."""
    return Refusal(403, "Forbidden: you must use a write token to upload to a repository.")


def not_a_writer() -> Refusal:
    """A write token of somebody who is not a member of the namespace. Seen."""
    return Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")


def stale_parent() -> Refusal:
    """Seen."""
    return Refusal(412, "A commit has happened since. Please refresh and try again.")


def repo_exists(url: str) -> Refusal:
    """Seen; `url` is what create_repo(exist_ok=True) reads."""
    return Refusal(409, "You already created this model repo", url=url)


def ref_exists(ref: str) -> Refusal:
    return Refusal(409, f"Reference already exists: {ref}")


def dangling_lfs(path: str) -> Refusal:
    """A commit that names a large file nobody uploaded. Seen."""
    return Refusal(
        400,
        "Your push was rejected because an LFS pointer pointed to a file that does not exist. For instance, this can happen"
        f" if you used git push --no-verify to push your changes. Offending file: - {path}",
    )


def storage_limit(status: int = 403) -> Refusal:
    """Out of private storage. Seen on `commit`, as 403 and as 400; the words are the same."""
    return Refusal(
        status, "Private repository storage limit reached, please upgrade your plan to increase your private storage limit"
    )


def storage_pattern() -> Refusal:
    """Out of public storage. Seen."""
    return Refusal(
        403,
        "Your storage patterns tripped our internal systems! Please contact us at website@huggingface.co so we can verify"
        " your account and unlock more storage for your use-case.",
    )


def too_large() -> Refusal:
    """Seen."""
    return Refusal(413, "Payload Too Large")


def no_space() -> Refusal:
    """A proxy or a mirror whose disk is full."""
    return Refusal(507, "Insufficient Storage")


def rate_limit(seconds: int = 1) -> Refusal:
    """The client waits `seconds` + 1 and asks again."""
    refusal = Refusal(429, "We had to rate limit you")
    refusal.headers |= {"RateLimit": f'"api";r=0;t={seconds}', "RateLimit-Policy": '"fixed window";"api";q=1000;w=300'}
    return refusal
