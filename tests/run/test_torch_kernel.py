"""What is torch's own. That its kernel keeps the numeric contract is in test_kernel.py, as for every other kernel."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from taskvec.delta.source import DenseDelta, LowRankDelta, ScaledDelta
from taskvec.run.jobs import Term
from taskvec.run.kernel import NumpyKernel
from taskvec.run.torch_kernel import TorchKernel, _round, _to_odd

from .checkpoints import Memory, bits, make_job, run_job, tensor
from .reference import DTYPES, Stored, numbers, pairs, rounded, unsigned

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")])


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_and_numpy_give_the_same_bits_and_counts(device: str, dtype: str) -> None:
    for other in DTYPES:
        memory = Memory()
        base, tuned = (memory.store(Stored(d, words)) for d, words in zip((dtype, other), pairs(dtype, other, 3000, 20)))
        rng = np.random.default_rng(21)
        value = memory.store(Stored("F32", rounded(rng.standard_normal(base.elements), "F32")))
        terms = [Term(0.3, DenseDelta(tuned, base)), Term(-0.7, ScaledDelta(value, 0.5)), Term(2.0, DenseDelta(base, tuned))]
        for out in dict.fromkeys([dtype, "F64", "F32", "F16", "BF16"]):
            job = make_job(base, terms, out)
            ours, counts = run_job(functools.partial(TorchKernel, device=device), job, memory)
            theirs, expected = run_job(NumpyKernel, job, memory)
            assert np.array_equal(ours, theirs)
            assert counts == expected


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_low_rank_edits_of_torch_and_numpy_have_the_same_bits(device: str, dtype: str, transposed: bool) -> None:
    rng = np.random.default_rng(22)
    memory, rank, rows, columns = Memory(), 16, 320, 200
    left = memory.store(Stored("F32", rounded(rng.standard_normal(rows * rank) * 0.2, "F32")), (rows, rank))
    right = memory.store(Stored("F32", rounded(rng.standard_normal(rank * columns) * 0.2, "F32")), (rank, columns))
    weights = rng.standard_normal(rows * columns)
    base = memory.store(Stored(dtype, rounded(weights, dtype)), (columns, rows) if transposed else (rows, columns))
    job = make_job(base, [Term(0.7, LowRankDelta(left, right, 2.0, transposed))])
    ours, _ = run_job(functools.partial(TorchKernel, device=device), job, memory)
    theirs, _ = run_job(NumpyKernel, job, memory)
    assert np.array_equal(ours, theirs)
    assert np.count_nonzero(ours != memory.read_whole(base).view(unsigned(dtype))) > 0


@pytest.mark.parametrize("source", ["F32", "F64"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rounding_is_to_nearest_even_and_one(device: str, dtype: str, source: str) -> None:
    words = np.concatenate(pairs(source, source, 50_000, 23))
    values = tensor(source, words).to(device)
    if source == "F64" and dtype == "F64":
        words = np.where(np.isnan(numbers(Stored("F64", words))), np.uint64(0x7FF8 << 48), words)
    found = np.frombuffer(bits(_round(values, dtype).cpu()), unsigned(dtype))
    assert np.array_equal(found, rounded(numbers(Stored(source, words)), dtype))


def test_rounding_to_odd_leaves_the_last_bit_set_exactly_where_something_was_cut_off() -> None:
    values = np.array([1.0, 1 + 2.0**-30, 1 + 2.0**-23 - 2.0**-40, -1 - 2.0**-30, 2.0**-160, -(2.0**-160), 0.0])
    found = _to_odd(torch.from_numpy(values)).view(torch.int32).numpy().view(np.uint32)
    assert found.tolist() == [0x3F800000, 0x3F800001, 0x3F800001, 0xBF800001, 1, 0x80000001, 0]


def test_a_host_buffer_has_the_size_asked_for_and_can_be_written(device: str) -> None:
    buffer = TorchKernel(Memory().read_stored, device).host_buffer(10)
    buffer[:] = 7
    assert (buffer.dtype, buffer.tolist()) == (np.uint8, [7] * 10)
