"""The clients' side: the environment that leads huggingface_hub to the stand-in, in child processes and in this one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import close_session, constants, file_download, hf_api
from huggingface_hub.utils import _detect_agent, _http, _xet

from .stand_in import Hub

ROOT = Path(__file__).parents[2]
TIMEOUT = 120  # seconds for a child process
PROGRAMS = {
    "hf": ("-c", "from huggingface_hub.cli.hf import main; main()"),
    "taskvec": ("-m", "taskvec"),
    "python": (),
}
_FOREIGN = (
    "HF_",
    "HUGGING",
    "TRANSFORMERS_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
)


class Client:
    """Runs commands as a user of the stand-in. `env` is their whole environment, `home` their HF_HOME."""

    def __init__(self, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = folder / "hf-home"
        self.here = folder / "here"
        self.here.mkdir()
        self._monkeypatch = monkeypatch
        self.settings = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(self.home),
            "HF_TOKEN": hub.token,
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "0" if hub.xet.enabled else "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    @property
    def cache(self) -> Path:
        """The folder of downloaded models."""
        return self.home / "hub"

    @property
    def env(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        return {**own, **self.settings, "PYTHONPATH": os.pathsep.join(paths)}

    def log_in(self, token: str | None) -> None:
        """From now on commands, and this process, use this token, or none."""
        self.settings.pop("HF_TOKEN", None)
        self._monkeypatch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            self.settings["HF_TOKEN"] = token
            self._monkeypatch.setenv("HF_TOKEN", token)

    def go_offline(self) -> None:
        """From now on commands, and this process, have HF_HUB_OFFLINE=1."""
        self.settings["HF_HUB_OFFLINE"] = "1"
        self._monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        self._monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def start(self, program: str, *arguments: str | Path, **env: str) -> subprocess.Popen[str]:
        """Starts "hf", "taskvec" or "python" in a child process, in the folder `here`; `env` adds to the environment."""
        command = [sys.executable, *PROGRAMS[program], *map(str, arguments)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(command, env={**self.env, **env}, cwd=self.here, text=True, **pipes)

    def run(self, program: str, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs it to its end; the caller looks at `returncode`, `stdout` and `stderr`."""
        with self.start(program, *arguments, **env) as process:
            try:
                out, err = process.communicate(timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def python(self, code: str, *arguments: str | Path, **env: str) -> str:
        """Runs a snippet and returns what it printed; fails with its stderr where it fails."""
        done = self.run("python", "-c", code, *arguments, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout


def adopt(monkeypatch: pytest.MonkeyPatch, hub: Hub, client: Client) -> None:
    """Leads this process to the stand-in too, though huggingface_hub read its environment long ago.

    Here the client does not wait between its retries; an unreachable Hub would cost 23 seconds a file. Children do wait.
    """
    for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
        monkeypatch.delenv(name)
    for name, value in client.settings.items():
        monkeypatch.setenv(name, value)
    home = client.home
    for name, setting in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": frozenset({*constants.HF_URL_HOSTS, "127.0.0.1"}),
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(client.cache),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        "HF_HUB_DISABLE_XET": not hub.xet.enabled,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, setting, raising=False)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(_detect_agent, "_registry", None, raising=False)
    monkeypatch.setattr(_xet, "XET_CONNECTION_INFO_CACHE", {}, raising=False)
    if hasattr(_http, "_url_origin"):
        monkeypatch.setattr(_http, "_HUB_ORIGINS", frozenset({*_http._HUB_ORIGINS, _http._url_origin(hub.endpoint)}))
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    if transformers := sys.modules.get("transformers.utils.hub"):
        monkeypatch.setattr(transformers, "_hf_api", None, raising=False)
    close_session()
