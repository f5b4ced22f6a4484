"""A matrix as the product of two thin ones: its truncated SVD by randomised range finding, alike in numpy and torch.

Δ ≈ U · S · Vᵀ               Δ: [m, n]   U: [m, r]   S: [r], largest first   Vᵀ: [r, n]
range: Q = qr(Δ · Ω)         Ω: [n, l] normal, l = r + a few   Q: [m, l]
       Q ← qr(Δ · qr(Δᵀ · Q)), a few times      (Halko, Martinsson & Tropp 2011, algorithm 4.4)
SVD:   Qᵀ · Δ = Ũ · S · Vᵀ   [l, n];  U = Q · Ũ  (algorithm 5.1)

‖Δ − U_r · S_r · V_rᵀ‖² = ‖Δ‖² − Σ_{i≤r} s_i², because what Q misses is orthogonal to Q: how much a rank reaches is known
without another look at Δ. Where l comes near min(m, n) the SVD of Δ itself costs no more, and is taken.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

_OVERSAMPLED = 10  # columns of Ω beyond the rank (Halko et al., section 4.2: 5 or 10)
_POWER_ITERATIONS = 4  # differences of fine-tunes have slowly falling spectra (section 4.5)
_FIRST = 64  # rank that is tried first when only the energy is known
_SEED = 2011
_ZERO = 2.0**-20  # of the largest singular value: below, it is what float32 made of zero
_TOLD_APART = 1e-4  # of ‖Δ‖²: a smaller rest is lost in the rounding of a sum over a sketch
_ROWS = 1 << 18  # elements of Δ that are looked at in float64 at once, or one row


class Factors(NamedTuple):
    """Δ ≈ left @ right, [m, r] @ [r, n]: U·√S and √S·Vᵀ.

    √S on both sides: their numbers lie closest together, and float16 has the fewest of either to lose (U·S·Vᵀ has entries
    about s/√(mn); of U·S those of the last columns are the first to be subnormal).
    """

    left: Any
    right: Any

    @property
    def rank(self) -> int:
        return int(self.left.shape[1])


def factorise(matrix: Any, rank: int | None, energy: float | None, xp: ModuleType = np) -> Factors:
    """The factors of least rank that hold `energy` of ‖Δ‖², and of `rank` at most. `xp` is numpy or torch.

    `matrix`: [m, n] in float32, finite and not zero. The same matrix, library and device give the same bits.
    """
    left, values, right = truncated_svd(matrix, rank, energy, xp)
    root = xp.sqrt(values)
    return Factors(left * root, root[:, None] * right)


def truncated_svd(matrix: Any, rank: int | None, energy: float | None, xp: ModuleType = np) -> tuple[Any, Any, Any]:
    """U, S, Vᵀ cut as `factorise` says. Singular values that are zero but for rounding are left out whatever was asked."""
    full = min(matrix.shape)
    most = full if rank is None else min(rank, full)
    total = squared_norm(matrix)
    tried = most if energy is None else min(most, _FIRST)
    while sketched(tried, full) and (energy is None or 1 - energy >= _TOLD_APART):
        left, values, right = _sketch(matrix, tried + _OVERSAMPLED, xp)
        needed = _needed(values, energy, total)
        if needed <= tried or tried == most:
            return _cut(left, values, right, min(needed, most))
        tried = min(2 * tried, most)
    left, values, right = xp.linalg.svd(matrix, full_matrices=False)
    return _cut(left, values, right, min(_needed(values, energy, None), most))


def sketched(rank: int, full: int) -> bool:
    """Whether that rank is found by a sketch, not by the SVD of the whole matrix, whose smaller side is `full`."""
    return 2 * (rank + _OVERSAMPLED) < full


def relative_error(matrix: Any, left: Any, right: Any) -> float:
    """‖Δ − left @ right‖ / ‖Δ‖ in the Frobenius norm, some rows at a time. A product that is no number is infinitely far."""
    step = max(1, _ROWS // matrix.shape[1])
    rest = 0.0
    for row in range(0, len(matrix), step):
        rest += _sum_of_squares(matrix[row : row + step] - left[row : row + step] @ right)
    error = (rest / squared_norm(matrix)) ** 0.5
    return error if error == error else float("inf")


def squared_norm(matrix: Any) -> float:
    """‖Δ‖², summed in float64."""
    step = max(1, _ROWS // matrix.shape[1])
    return sum(_sum_of_squares(matrix[row : row + step]) for row in range(0, len(matrix), step))


def working_bytes(rows: int, columns: int, rank: int | None, energy: float | None) -> int:
    """What factorising an [m, n] matrix takes at most beside the matrix itself, in bytes: the arrays above and LAPACK's."""
    full = min(rows, columns)
    most = full if rank is None else min(rank, full)
    checked = 16 * max(_ROWS, columns) + 16 * most * (rows + columns)  # rows in float64; the factors, also as stored
    width = most + _OVERSAMPLED
    if sketched(most, full) and (energy is None or 1 - energy >= _TOLD_APART):
        return checked + 4 * width * (5 * rows + 6 * columns) + 40 * width * width
    return checked + 4 * (2 * rows * columns + 3 * full * (rows + columns)) + 40 * full * full


def _sketch(matrix: Any, width: int, xp: ModuleType) -> tuple[Any, Any, Any]:
    """U, S, Vᵀ of the part of Δ in the range of a sketch of `width` columns."""
    normal = np.random.Generator(np.random.PCG64(_SEED)).standard_normal((matrix.shape[1], width), np.float32)
    basis = xp.linalg.qr(matrix @ _beside(matrix, normal))[0]  # [m, l]
    for _ in range(_POWER_ITERATIONS):
        basis = xp.linalg.qr(matrix @ xp.linalg.qr(matrix.T @ basis)[0])[0]
    left, values, right = xp.linalg.svd(basis.T @ matrix, full_matrices=False)  # of [l, n]
    return basis @ left, values, right


def _needed(values: Any, energy: float | None, total: float | None) -> int:
    """How many singular values reach `energy` of `total`, by default of their own; one more than there are if none do."""
    squares = np.asarray(values.tolist(), np.float64) ** 2
    present = int(np.count_nonzero(squares > _ZERO**2 * squares[0]))
    if energy is None:
        return present
    sums = np.cumsum(squares)
    reached = sums >= energy * (sums[-1] if total is None else total)
    needed = int(np.argmax(reached)) + 1 if reached.any() else len(squares) + 1
    return min(needed, present) if present < len(squares) else needed


def _cut(left: Any, values: Any, right: Any, rank: int) -> tuple[Any, Any, Any]:
    return left[:, :rank], values[:rank], right[:rank]


def _sum_of_squares(block: Any) -> float:
    wide = block.double() if hasattr(block, "double") else block.astype(np.float64)
    return float((wide * wide).sum())


def _beside(matrix: Any, array: Any) -> Any:
    """The numpy array where the matrix is."""
    if isinstance(matrix, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array).to(matrix.device)
