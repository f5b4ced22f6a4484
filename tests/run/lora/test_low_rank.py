"""The truncated SVD against numpy.linalg.svd in float64, on matrices whose singular values are known."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from taskvec.run.lora import low_rank

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")])
LARGE = (300, 200)  # found by a sketch for small ranks
SMALL = (40, 30)  # always by the SVD of the whole

SPECTRA: dict[str, Callable[[int], Any]] = {
    "geometric": lambda k: 0.9 ** np.arange(k),
    "slow": lambda k: (1.0 + np.arange(k)) ** -0.5,
    "a step": lambda k: np.where(np.arange(k) < 20, 1.0, 1e-3),
}


def with_spectrum(shape: tuple[int, int], spectrum: Any, seed: int = 1) -> Any:
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((size, len(spectrum))))[0] for size in shape)
    return np.ascontiguousarray((left * spectrum @ right.T).astype(np.float32))


def exact_error(matrix: Any, rank: int) -> float:
    """‖Δ − best approximation of that rank‖ / ‖Δ‖ (Eckart and Young 1936)."""
    squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    return float((squares[rank:].sum() / squares.sum()) ** 0.5)


def exact_rank(matrix: Any, energy: float) -> int:
    squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    return int(np.argmax(np.cumsum(squares) >= energy * squares.sum())) + 1


def error(matrix: Any, factors: Any) -> float:
    left, right = (np.asarray(factor, np.float64) for factor in factors)
    return float(np.linalg.norm(matrix - left @ right) / np.linalg.norm(matrix.astype(np.float64)))


@pytest.fixture(params=["numpy", "torch", GPU])
def library(request: pytest.FixtureRequest) -> tuple[ModuleType, Callable[[Any], Any]]:
    """numpy or torch, and what moves a matrix there."""
    if request.param == "numpy":
        return np, lambda matrix: matrix
    return torch, lambda matrix: torch.from_numpy(matrix).to("cpu" if request.param == "torch" else "cuda")


def on_host(factors: Any) -> tuple[Any, Any]:
    left, right = (factor if isinstance(factor, np.ndarray) else factor.cpu().numpy() for factor in factors)
    return left, right


@pytest.mark.parametrize("shape", [LARGE, LARGE[::-1], SMALL, SMALL[::-1]])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_factors_of_a_rank_are_as_near_as_the_best(spectrum: str, shape: tuple[int, int], library: Any) -> None:
    xp, move = library
    matrix = with_spectrum(shape, SPECTRA[spectrum](min(shape)))
    factors = low_rank.factorise(move(matrix), 20, None, xp)
    found, best = error(matrix, on_host(factors)), exact_error(matrix, 20)
    assert factors.rank == 20 and factors.left.shape == (shape[0], 20) and factors.right.shape == (20, shape[1])
    assert best - 1e-6 <= found <= 1.001 * best + 1e-6


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("shape", [LARGE, SMALL])
@pytest.mark.parametrize("spectrum", ["geometric", "slow"])
def test_an_energy_is_reached_by_the_least_rank(spectrum: str, shape: tuple[int, int], energy: float, library: Any) -> None:
    xp, move = library
    matrix = with_spectrum(shape, SPECTRA[spectrum](min(shape)))
    factors = low_rank.factorise(move(matrix), None, energy, xp)
    assert error(matrix, on_host(factors)) ** 2 <= 1 - energy + 1e-6
    least = exact_rank(matrix, energy)
    assert least <= factors.rank <= least + (1 if least > 64 else 0)  # a larger sketch underestimates its last values


def test_the_sketch_grows_until_the_energy_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = with_spectrum((400, 320), np.exp(-np.arange(320) / 100))
    widths: list[int] = []
    plain = low_rank._sketch

    def seen(matrix: Any, width: int, xp: ModuleType) -> Any:
        widths.append(width)
        return plain(matrix, width, xp)

    monkeypatch.setattr(low_rank, "_sketch", seen)
    assert low_rank.factorise(matrix, None, 0.75).rank == exact_rank(matrix, 0.75) > 64
    assert widths == [74, 138]


def test_a_rank_caps_an_energy_and_an_energy_a_rank() -> None:
    matrix = with_spectrum(LARGE, SPECTRA["geometric"](200))
    reached = exact_rank(matrix, 0.9)
    assert low_rank.factorise(matrix, 3, 0.9).rank == 3
    assert low_rank.factorise(matrix, 100, 0.9).rank == reached < 100
    assert low_rank.factorise(matrix, 10_000, None).rank <= 200


@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_a_product_of_thin_matrices_gets_no_larger_rank_than_it_has(shape: tuple[int, int], library: Any) -> None:
    xp, move = library
    matrix = with_spectrum(shape, np.array([3.0, 2.0, 1.0, 0.5, 0.25]))
    for rank, energy in ((12, None), (None, 1.0)):
        factors = low_rank.factorise(move(matrix), rank, energy, xp)
        assert factors.rank == 5 and error(matrix, on_host(factors)) < 1e-6


@pytest.mark.parametrize("shape", [(120, 90), SMALL])
def test_full_rank_gives_the_matrix_back(shape: tuple[int, int], library: Any) -> None:
    xp, move = library
    matrix = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    for rank, energy in ((10_000, None), (None, 1.0)):
        factors = low_rank.factorise(move(matrix), rank, energy, xp)
        assert factors.rank == min(shape)
        assert error(matrix, on_host(factors)) < 3e-6


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (2, 300)])
def test_thin_matrices_are_their_own_factors(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    factors = low_rank.factorise(matrix, 32, None)
    assert factors.rank == min(shape) and error(matrix, factors) < 1e-6


def test_the_same_matrix_gives_the_same_bits(library: Any) -> None:
    xp, move = library
    matrix = with_spectrum(LARGE, SPECTRA["slow"](200))
    one, other = (on_host(low_rank.factorise(move(matrix), 20, None, xp)) for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, other))


def test_both_factors_have_the_root_of_the_singular_values() -> None:
    values = SPECTRA["geometric"](200)
    left, right = low_rank.factorise(with_spectrum(LARGE, values), 20, None)
    np.testing.assert_allclose(np.linalg.norm(left, axis=0), values[:20] ** 0.5, rtol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(right, axis=1), values[:20] ** 0.5, rtol=1e-3)


def test_the_error_is_that_of_the_product(library: Any) -> None:
    _, move = library
    rng = np.random.default_rng(5)
    matrix, left, right = (rng.standard_normal(shape).astype(np.float32) for shape in ((700, 900), (700, 4), (4, 900)))
    expected = np.linalg.norm(matrix.astype(np.float64) - left @ right.astype(np.float64)) / np.linalg.norm(matrix)
    assert low_rank.relative_error(move(matrix), move(left), move(right)) == pytest.approx(expected, rel=1e-5)
    assert low_rank.relative_error(move(matrix), move(left * np.float32("nan")), move(right)) == float("inf")


MEASURE = """
import sys
import numpy as np
from taskvec.run.lora import low_rank

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

rows, columns, rank, energy = eval(sys.argv[1])
matrix = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
low_rank.factorise(np.eye(300, dtype=np.float32), 8, None)  # what the library itself needs once
low_rank.factorise(np.eye(20, dtype=np.float32), 8, None)
before = peak()
factors = low_rank.factorise(matrix, rank, energy)
low_rank.relative_error(matrix, *factors)
print(peak() - before)
"""


@pytest.mark.parametrize("case", [(3000, 2000, 64, None), (900, 10_000, 200, None), (900, 700, None, 0.99)])
def test_factorising_takes_no_more_memory_than_was_said(case: Any) -> None:
    single = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # as the command has it; each thread of BLAS has buffers of its own
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, repr(case)], capture_output=True, text=True, check=True, env=single
    )
    said = low_rank.working_bytes(*case)
    assert 0.1 * said < int(found.stdout) <= said
