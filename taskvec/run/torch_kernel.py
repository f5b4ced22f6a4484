"""The arithmetic of one tile in torch, for a GPU. The same formula as `kernel`, operation by operation, so that the
bits are the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..checkpoint.floats import FORMATS, Raw, canonical_nan
from ..checkpoint.header import StoredTensor
from ..delta.source import DenseDelta, FormulaDelta, LowRankDelta, ScaledDelta
from .jobs import Job, Tile, unit_bytes
from .kernel import Counts, NumpyKernel, ReadStored, difference, single, subtract_scaled

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8,
}  # fmt: skip
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TorchKernel:
    """One worker's kernel on `device`, on a stream of its own: while one worker computes, others copy in and out. Not
    thread-safe; make one per thread."""

    def __init__(self, read_stored: ReadStored, device: str) -> None:
        self._host_kernel = NumpyKernel(read_stored)  # for what an adapter's small tensors are made into
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._fused = _fused() if self._device.type == "cuda" else None
        self._factors: tuple[Job, dict[int, Any]] | None = None
        self._out = self._host(0)

    def host_buffer(self, nbytes: int) -> Raw:
        """Pinned memory, which copies to and from the GPU without a stop."""
        held: Raw = self._host(nbytes).numpy()
        return held

    @torch.inference_mode()
    def edit(self, job: Job, tile: Tile, raw: Mapping[StoredTensor, Raw]) -> tuple[Raw, Counts]:
        """As NumpyKernel.edit."""
        with torch.cuda.stream(self._stream):
            words, tallies = self._compute(job, tile, raw, {})
            data = words.view(torch.uint8)
            if len(self._out) < len(data):
                self._out = self._host(len(data))
            out = self._out[: len(data)].copy_(data, non_blocking=True)
            counts = self._counted(tallies)
        held: Raw = out.numpy()
        return held, counts

    @torch.no_grad()
    def edit_in_place(self, job: Job, tile: Tile, raw: Mapping[StoredTensor, Raw], base: torch.Tensor) -> Counts:
        """Edit the bytes of one tile of base where they are, on this kernel's device. `raw` holds those of the others."""
        with torch.cuda.stream(self._stream):
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.default_stream(self._device))  # whatever made the parameter
            words, tallies = self._compute(job, tile, raw, {job.base: base.view(_DTYPES[job.base.dtype])})
            base.copy_(words.view(torch.uint8))
            return self._counted(tallies)

    def _compute(
        self, job: Job, tile: Tile, raw: Mapping[StoredTensor, Raw], resident: Mapping[StoredTensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output words and tallies; `resident` tensors are on the device already."""
        stored = {t: resident[t] if t in resident else self._upload(raw[t], t.dtype) for t in job.elementwise}
        if self._fused is not None and not resident and _fits(job):
            return self._edit_fused(job, stored)
        return self._edit_stepwise(job, tile, stored, raw)

    def _counted(self, tallies: torch.Tensor) -> Counts:
        numbers = tallies.to("cpu", non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        intended, changed, overflow, nonfinite = (int(number) for number in numbers.tolist())
        return Counts(intended, changed, overflow, nonfinite)

    def _host(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _upload(self, raw: Raw, dtype: str) -> torch.Tensor:
        return torch.from_numpy(raw).to(self._device, non_blocking=True).view(_DTYPES[dtype])

    def _edit_fused(self, job: Job, stored: dict[StoredTensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Output words and tallies of one dense term against base, in one pass over the GPU's memory."""
        alpha, delta, _ = job.terms[0]
        assert self._fused is not None and isinstance(delta, DenseDelta)
        base, tallies = stored[job.base], self._fused.counts_on(self._device)
        self._fused.edit(base, stored[delta.tuned], single(alpha), base, tallies)
        return _bits(base), tallies

    def _edit_stepwise(
        self, job: Job, tile: Tile, stored: dict[StoredTensor, torch.Tensor], raw: Mapping[StoredTensor, Raw]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output words and tallies of any job, operation by operation."""
        compute = torch.float64 if job.base.dtype == "F64" else torch.float32
        base = stored[job.base].to(compute)  # [units]
        values, untouched = base.clone(), None
        for position in range(len(job.terms)):
            if isinstance(job.terms[position].delta, FormulaDelta):
                change, same, alpha = self._evaluated(job, position, tile, raw, compute)
            else:
                change, same, alpha = self._delta(job, position, tile, stored, compute)
            for mask in job.terms[position].masks:
                weight = stored[mask].to(compute)
                change, same = change * weight + 0, same | (weight == 0)
            change = change.masked_fill_(same, 0) if job.terms[position].masks else change
            subtract_scaled(torch, values, change, alpha)
            untouched = same if untouched is None else untouched & same
        if untouched is None:
            untouched = torch.zeros_like(base, dtype=torch.bool)
        return _rounded_output(job, stored, base, values, untouched)

    def _delta(
        self, job: Job, position: int, tile: Tile, stored: dict[StoredTensor, torch.Tensor], compute: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Δ of one term, where it is nothing, and the factor that is still to be multiplied in."""
        alpha, delta, masks = job.terms[position]
        if isinstance(delta, LowRankDelta):
            change = self._product(job, position, tile).reshape(-1).to(compute)
            return change, change == 0, 1.0
        if isinstance(delta, ScaledDelta):
            return _scaled(stored[delta.value].to(compute), alpha * delta.scale, bool(masks))
        assert isinstance(delta, DenseDelta)
        tuned, origin = stored[delta.tuned].to(compute), stored[delta.origin].to(compute)
        if delta.tuned.dtype == delta.origin.dtype:
            same = _bits(stored[delta.tuned]) == _bits(stored[delta.origin])
        else:
            same = (_bits(tuned) == _bits(origin)) | (torch.isnan(tuned) & torch.isnan(origin))
        change = torch.empty_like(tuned)
        alpha = difference(torch, tuned, origin, alpha, change)
        change.masked_fill_(same, 0)  # also where both are inf or NaN
        return change, same, _rounded(alpha, compute)

    def _evaluated(
        self, job: Job, position: int, tile: Tile, raw: Mapping[StoredTensor, Raw], compute: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """As `_delta`, of a term with a formula, which is evaluated on the host."""
        delta = np.empty(tile.units, np.float32)
        self._host_kernel.evaluate(job, position, tile, raw, delta)
        alpha, _, masks = job.terms[position]
        return _scaled(torch.from_numpy(delta).to(self._device).to(compute), alpha, bool(masks))

    def _product(self, job: Job, position: int, tile: Tile) -> torch.Tensor:
        """α·s·(left @ right), or its transpose, of one tile: [rows, columns] in float32, added in order as on the CPU."""
        if self._factors is None or self._factors[0] is not job:
            self._factors = (job, {})
        held = self._factors[1]
        if position not in held:
            held[position] = [torch.from_numpy(f).to(self._device) for f in self._host_kernel.prepared(job, position)]
        rows, columns = held[position]
        left = rows[tile.row : tile.row + tile.rows]
        right = columns[:, tile.column : tile.column + tile.columns]
        if self._fused is not None:
            product: torch.Tensor = self._fused.product(left, right)
            return product
        total = torch.zeros((len(left), right.shape[1]), dtype=torch.float32, device=left.device)
        for k in range(left.shape[1]):
            total += left[:, k, None] * right[k]
        return total


def _fused() -> ModuleType | None:
    """The Triton kernel, where Triton came with torch."""
    try:
        return importlib.import_module(".fused", __package__)
    except ImportError:
        return None


def _fits(job: Job) -> bool:
    """Whether the job is the common one: one fine-tune of base itself, in dtypes the fused kernel knows."""
    if len(job.terms) != 1 or job.terms[0].masks or job.dtype != job.base.dtype:
        return False
    delta = job.terms[0].delta
    known = ("F32", "F16", "BF16")
    return isinstance(delta, DenseDelta) and delta.origin == job.base and {delta.tuned.dtype, job.dtype} <= set(known)


def _rounded_output(
    job: Job, stored: dict[StoredTensor, torch.Tensor], base: torch.Tensor, values: torch.Tensor, same: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output words, and [4]: intended, changed, overflowed, not finite. `same`: where no term changes anything."""
    reference = _bits(_round(base, job.dtype) if job.dtype != job.base.dtype else stored[job.base])
    finite = torch.ones_like(same)
    for tensor in stored.values():
        finite &= torch.isfinite(tensor.to(torch.float64))
    keep = same | (torch.isnan(values) & torch.isnan(base)) if job.terms else same
    out = torch.where(keep, reference, _bits(_round(values, job.dtype)))
    ends = ~torch.isfinite(out.view(_DTYPES[job.dtype]).to(torch.float64))
    intended = (~same).sum() if job.terms else same.sum() * 0
    return out, torch.stack([intended, (out != reference).sum(), (ends & finite).sum(), ends.sum()])


def _scaled(change: torch.Tensor, alpha: float, masked: bool) -> tuple[torch.Tensor, torch.Tensor, float]:
    """α·Δ, where it is nothing, and 1; of a Δ that is masked before, ±Δ and |α|. No −0, as in numpy."""
    if masked:
        return -change if alpha < 0 else change, change == 0, _rounded(abs(alpha), change.dtype)
    change = change * _rounded(alpha, change.dtype) + 0
    return change, change == 0, 1.0


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
