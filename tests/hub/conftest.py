"""A Hub on loopback for every test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import close_session
from safetensors.torch import save

from taskvec.checkpoint import files, repository

from .client import Client, adopt
from .small_models import JUNK, SIDE, adapter, sharded, tensors
from .stand_in import Hub
from .stand_in.xet import installed

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The client's own LFS upload warns about how it calls its HTTP library."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"))


@contextmanager
def opened(folder: Path, monkeypatch: pytest.MonkeyPatch, *, xet: bool) -> Iterator[Hub]:
    """A Hub, and this process and its children as the client of it; a failure of the stand-in itself fails the test."""
    for known in (files.REMOTE, repository._resolved):  # of the process
        known.clear()
    hub = Hub(folder / "stand-in", xet=xet)
    hub.client = Client(hub, folder, monkeypatch)
    adopt(monkeypatch, hub, hub.client)
    yield hub
    close_session()
    hub.settle()
    hub.stop()
    assert hub.crashes == []
    assert str(hub.requests.of("unsupported")) == ""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub whose large files go by LFS."""
    with opened(tmp_path, monkeypatch, xet=False) as hub:
        yield hub


@pytest.fixture
def xet_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub whose large files go by Xet."""
    if not installed():
        pytest.skip("hf_xet is not installed")
    with opened(tmp_path, monkeypatch, xet=True) as hub:
        yield hub


@pytest.fixture(params=["lfs", "xet"])
def either_hub(request: pytest.FixtureRequest) -> Hub:
    """The test runs twice: by LFS and by Xet."""
    found: Hub = request.getfixturevalue("hub" if request.param == "lfs" else "xet_hub")
    return found


@pytest.fixture
def models(hub: Hub) -> Hub:
    """A Hub with a model, a fine-tune of it and an adapter."""
    hub.add_model("org/base", {**sharded(1), **SIDE, **JUNK})
    hub.add_model("org/old", {"model.safetensors": save(tensors(2)), "config.json": b"{}", "tokenizer.json": b"{}" * 999})
    hub.add_model("me/lora", adapter())
    return hub
