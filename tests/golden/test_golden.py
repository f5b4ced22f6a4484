"""One tiny edit down to its bytes. The inputs are a formula (exact.inputs); what is written down here was computed with
exact fractions (exact.py) and again by a C program compiled with -ffp-contract=off. It must never change: the same inputs
give the same bytes in every version.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import taskvec as tv
from taskvec.run import device
from taskvec.run.kernel import NumpyKernel

from . import exact

EDITED = {
    "ids": "de0a0200000000008f84399e00000000",
    "norm": "38a7823d15faa4bde30fa73d996c16bec6f0263e",
    "half": "9f34aeaead3665b12c3b8435",
    "brain": "0080817f80ff807f603d263fcebe903e46bef6bdb03d66bfdd3ea43e3ebe0f3e",
}
HEADER = (
    '{"__metadata__":{"format":"pt"},"ids":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
    '"norm":{"dtype":"F32","shape":[5],"data_offsets":[16,36]},"half":{"dtype":"F16","shape":[2,3],"data_offsets":[36,48]},'
    '"brain":{"dtype":"BF16","shape":[4,4],"data_offsets":[48,80]}}'
)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for place, name in enumerate(("base", "tuned")):
        data = [exact.stored(exact.inputs(tensor)[place], dtype) for tensor, dtype, _ in exact.TENSORS]
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(exact.file(HEADER, data))
    return tmp_path


@pytest.fixture(params=["the fastest kernel here", "numpy"])
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(device, "cpu_kernel", NumpyKernel)


def test_what_is_written_down_is_what_exact_fractions_give() -> None:
    assert {name: exact.edited(name, dtype).hex() for name, dtype, _ in exact.TENSORS} == EDITED


@pytest.mark.usefixtures("_kernel")
def test_the_output_file_is_this_one_to_the_last_byte(models: Path) -> None:
    report = tv.subtract(models / "base", models / "tuned", alpha=exact.ALPHA, output=models / "out")
    content = (models / "out" / "model.safetensors").read_bytes()
    padded = HEADER + " " * (-len(HEADER) % 8)
    assert content == exact.file(padded, [bytes.fromhex(data) for data in EDITED.values()])
    assert hashlib.sha256(content).hexdigest() == "2ae0d3a40a67b0110be3d0de5d26e356edb2916f87f37a4b0f07df6e9f52dbd5"
    assert (report.changes["elements_changed"], report.changes["elements_overflowed"]) == (24, 1)


@pytest.mark.usefixtures("_kernel")
def test_adding_the_negative_gives_the_same_file(models: Path) -> None:
    tv.add(models / "base", models / "tuned", alpha=-exact.ALPHA, output=models / "out")
    data = b"".join(bytes.fromhex(data) for data in EDITED.values())
    assert (models / "out" / "model.safetensors").read_bytes().endswith(data)
