"""The arithmetic of one tile in torch, for a GPU. The same formula as `kernel`, operation by operation, so that full
fine-tunes give the same bits; low-rank products may differ in the last float32 bit, as between any two BLAS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoint.header import StoredTensor
from ..delta.source import DenseDelta, LowRankDelta
from .floats import FORMATS, Raw, canonical_nan
from .jobs import Job, Tile, unit_bytes
from .kernel import Counts, ReadWhole, difference, single, subtract_scaled

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TorchKernel:
    """One worker's kernel on `device`. Not thread-safe; make one per thread."""

    def __init__(self, read_whole: ReadWhole, device: str) -> None:
        self._read_whole = read_whole
        self._device = torch.device(device)
        self._factors: tuple[Job, list[Any]] | None = None
        torch.backends.cuda.matmul.allow_tf32 = False  # products are float32, not TF32

    @torch.inference_mode()
    def edit(self, job: Job, tile: Tile, raw: Mapping[StoredTensor, Raw]) -> tuple[Raw, Counts]:
        """As NumpyKernel.edit."""
        stored = {t: torch.from_numpy(raw[t]).to(self._device).view(_DTYPES[t.dtype]) for t in job.elementwise}
        compute = torch.float64 if job.base.dtype == "F64" else torch.float32
        base = stored[job.base].to(compute)  # [count]
        values, untouched = base.clone(), None
        for position, (alpha, delta) in enumerate(job.terms):
            if isinstance(delta, DenseDelta):
                tuned, origin = stored[delta.tuned].to(compute), stored[delta.origin].to(compute)
                same = _bits(tuned) == _bits(origin)
                change = torch.empty_like(values)
                alpha = difference(torch, tuned, origin, alpha, change)
            elif isinstance(delta, LowRankDelta):
                change, alpha = self._product(job, position, tile).reshape(-1).to(compute), 1.0
                same = change == 0
            else:
                change = stored[delta.value].to(compute)
                same = change == 0
                change, alpha = change * _rounded(alpha * delta.scale, compute) + 0, 1.0
            subtract_scaled(torch, values, change, _rounded(alpha, compute))
            untouched = same if untouched is None else untouched & same
        if untouched is None:
            untouched = torch.zeros_like(base, dtype=torch.bool)
        return self._finish(job, stored, base, values, untouched)

    def _finish(
        self,
        job: Job,
        stored: dict[StoredTensor, torch.Tensor],
        base: torch.Tensor,
        values: torch.Tensor,
        same: torch.Tensor,
    ) -> tuple[Raw, Counts]:
        reference = _bits(_round(base, job.dtype) if job.dtype != job.base.dtype else stored[job.base])
        rounded = _round(values, job.dtype)
        finite = torch.ones_like(same)
        for tensor in stored.values():
            finite &= torch.isfinite(tensor.to(torch.float64))
        keep = same | (torch.isnan(values) & torch.isnan(base)) if job.terms else same
        out = torch.where(keep, reference, _bits(rounded))
        ends = ~torch.isfinite(out.view(_DTYPES[job.dtype]).to(torch.float64))
        tallies = torch.stack([(~same).sum() if job.terms else same.sum() * 0, (out != reference).sum(),
                               (ends & finite).sum(), ends.sum()])  # fmt: skip
        intended, changed, overflow, nonfinite = (int(n) for n in tallies.tolist())
        data: Raw = out.view(torch.uint8).cpu().numpy()
        return data, Counts(intended, changed, overflow, nonfinite)

    def _product(self, job: Job, position: int, tile: Tile) -> torch.Tensor:
        """α·s·(left @ right), or its transpose, of one tile: [rows, columns] in float32."""
        if self._factors is None or self._factors[0] is not job:
            self._factors = (job, [self._load(alpha, delta) for alpha, delta in job.terms])
        rows, columns = self._factors[1][position]
        left = rows[tile.row : tile.row + tile.rows]
        product: torch.Tensor = left @ columns[:, tile.column : tile.column + tile.columns]
        return product

    def _load(self, alpha: float, delta: object) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not isinstance(delta, LowRankDelta):
            return None
        left = self._whole(delta.left) * single(alpha * delta.scale)  # [out, r]
        right = self._whole(delta.right)  # [r, in]
        return (right.T.contiguous(), left.T.contiguous()) if delta.transposed else (left, right)

    def _whole(self, tensor: StoredTensor) -> torch.Tensor:
        raw = torch.from_numpy(self._read_whole(tensor)).to(self._device)
        return raw.view(_DTYPES[tensor.dtype]).to(torch.float32).reshape(tensor.shape)


def _rounded(number: float, compute: torch.dtype) -> float:
    return number if compute == torch.float64 else single(number)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_WORDS[tensor.element_size()])


def _round(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """One rounding to nearest-even into the stored dtype; overflow to inf (NaN in F8_E4M3), one NaN.

    torch saturates in float8 and rounds float64 to bfloat16 and float8 by way of float32; both are undone here.
    """
    if values.dtype == torch.float64 and unit_bytes(dtype) < 4:
        values = _to_odd(values)
    out = values.to(_DTYPES[dtype])
    bits, nan = _bits(out), canonical_nan(dtype)
    if dtype.startswith("F8"):
        beyond = values.abs() >= FORMATS[dtype].overflow
        infinity = 0x7F if dtype == "F8_E4M3" else 0x7C
        bits[beyond] = infinity
        bits[beyond & (values < 0)] = infinity | 0x80
    bits[torch.isnan(values)] = int(nan.view(nan.dtype.str.replace("u", "i")) if nan.itemsize > 1 else nan)
    return out


def _to_odd(values: torch.Tensor) -> torch.Tensor:
    """float64 -> float32 rounded to odd: a second rounding, to a format two or more bits shorter, is then exact
    (Boldo and Melquiond 2008, theorem 2)."""
    near = values.to(torch.float32)
    bits = near.view(torch.int32)
    error = values - near.to(torch.float64)
    inexact = (error != 0) & torch.isfinite(near)
    away = inexact & ((error > 0) != (values > 0))  # rounded away from zero: step back to the truncated value
    bits = bits - away.to(torch.int32)
    return torch.where(inexact, bits | 1, bits).view(torch.float32)
