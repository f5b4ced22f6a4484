"""Who may do what: users, their namespaces, their tokens, and what the Hub answers to those who may not."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from . import refusals
from .store import Repo


@dataclass(frozen=True)
class Token:
    """An access token. `role` is "read", "write" or "fineGrained"; the last may write to `repos` only."""

    user: str
    role: str
    repos: tuple[str, ...] = ()


class Access:
    """The users and tokens of one stand-in, and its rules."""

    def __init__(self, endpoint: str) -> None:
        self.orgs: dict[str, tuple[str, ...]] = {}
        self.tokens: dict[str, Token] = {}
        self._endpoint = endpoint

    def add_user(self, name: str, orgs: tuple[str, ...] = ()) -> str:
        """A user and their write token."""
        self.orgs[name] = orgs
        return self.add_token(name, "write")

    def add_token(self, user: str, role: str, repos: tuple[str, ...] = ()) -> str:
        text = f"hf_{secrets.token_hex(17)}"
        self.tokens[text] = Token(user, role, repos)
        return text

    def token(self, text: str | None) -> Token | None:
        """The token a request came with; a wrong one is refused whatever is asked for."""
        if text is None:
            return None
        if text not in self.tokens:
            raise refusals.bad_token()
        return self.tokens[text]

    def owns(self, token: Token | None, namespace: str) -> bool:
        return token is not None and namespace in (token.user, *self.orgs[token.user])

    def see(self, token: Token | None, repo: Repo | None) -> Repo:
        """The repository, if the holder of the token may know of it."""
        if repo is None or (repo.private and not self._may_read(token, repo)):
            raise refusals.no_repo_anonymous() if token is None else refusals.no_repo()
        return repo

    def read(self, token: Token | None, repo: Repo | None) -> Repo:
        """The repository, if the holder of the token may read its files. (Listings of gated repositories are open to all.)"""
        found = self.see(token, repo)
        if found.gated and not self._may_read(token, found):
            raise refusals.gated_anonymous(found.name) if token is None else refusals.gated(found.name, self._endpoint)
        return found

    def write(self, token: Token | None, repo: Repo | None, *, pull_request: bool = False) -> Repo:
        """The repository, if the holder of the token may write to it: members do, everybody may open a pull request."""
        found = self.see(token, repo)
        if token is None:
            raise refusals.no_credentials()
        if token.role == "read" or (token.role == "fineGrained" and found.name not in token.repos):
            raise refusals.read_token()
        if not pull_request and not self.owns(token, found.name.split("/")[0]):
            raise refusals.not_a_writer()
        return found

    def create(self, token: Token | None, namespace: str) -> None:
        """Refuses those who may not create a repository there."""
        if token is None:
            raise refusals.no_credentials()
        if token.role != "write" or not self.owns(token, namespace):
            raise refusals.namespace_forbidden(namespace)

    def _may_read(self, token: Token | None, repo: Repo) -> bool:
        return token is not None and (self.owns(token, repo.name.split("/")[0]) or token.user in repo.granted)
