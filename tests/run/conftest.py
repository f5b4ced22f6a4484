from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from taskvec.run import native
from taskvec.run.kernel import NumpyKernel
from taskvec.run.torch_kernel import TorchKernel

from .checkpoints import MakeKernel


@pytest.fixture(scope="session")
def native_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """native.c as it is now, compiled as the package build does it."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = Path(native.__file__).with_name("native.c")
    made = tmp_path_factory.mktemp("native") / "_native.so"
    flags = ["-O3", "-shared", "-fPIC", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]  # hatch_build.py
    subprocess.run([compiler, *flags, "-o", str(made), str(source)], check=True)
    return made


_CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["numpy", "native", "torch", *_CUDA])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakeKernel:
    """What makes the kernel of one worker: every one there is, because all give the same bits."""
    if request.param == "numpy":
        return NumpyKernel
    if request.param == "native":
        return loaded(request.getfixturevalue("native_library"), monkeypatch)
    return functools.partial(TorchKernel, device="cpu" if request.param == "torch" else "cuda")


def loaded(library: Path, monkeypatch: pytest.MonkeyPatch) -> MakeKernel:
    """The compiled kernel of that library."""
    monkeypatch.setattr(native, "LIBRARY", library)
    native._library.cache_clear()
    assert native._library() is not None
    return native.NativeKernel
