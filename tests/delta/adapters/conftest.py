"""One set of tiny bases on disk for the whole folder: they are only read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from . import peft_oracle as oracle

FAMILIES = {"llama": oracle.llama, "gpt2": oracle.gpt2, "bert": oracle.bert}


class Bases:
    """`bases("llama", torch.bfloat16)` -> its folder, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, family: str, dtype: torch.dtype = torch.float32) -> Path:
        folder = self._root / f"{family}-{str(dtype).removeprefix('torch.')}"
        return folder if folder.exists() else oracle.save_model(FAMILIES[family](), folder, dtype)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))
