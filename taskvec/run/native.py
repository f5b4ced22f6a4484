"""The same kernel compiled from `native.c`, one pass over memory where numpy makes some twenty: used where the library was
built with the package, for float32, float16 and bfloat16. Everything else, and every machine without it, is numpy's; the
bits are equal.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.floats import Raw
from ..checkpoint.header import StoredTensor
from ..delta.source import DenseDelta
from .jobs import Job, Tile, unit_bytes
from .kernel import Counts, NumpyKernel, ReadStored, single

LIBRARY = Path(__file__).with_name("_native.so")
_DTYPES = {"F32": 0, "F16": 1, "BF16": 2}  # as in native.c
_DENSE, _GIVEN = 0, 1
_ABI = 2


class _Term(ctypes.Structure):
    """`Term` of native.c."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("tuned_dtype", ctypes.c_int32),
        ("origin_dtype", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("tuned", ctypes.c_void_p),
        ("origin", ctypes.c_void_p),
    )


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.taskvec_edit.restype = library.taskvec_product.restype = None
        return library if library.taskvec_abi() == _ABI else None
    except (OSError, AttributeError):
        return None


def cpu_kernel(read_stored: ReadStored) -> NumpyKernel:
    """The fastest kernel there is here for the CPU."""
    return NumpyKernel(read_stored) if _library() is None else NativeKernel(read_stored)


class NativeKernel(NumpyKernel):
    """One worker's kernel. The call holds no lock of the interpreter, so that workers run side by side."""

    def edit(self, job: Job, tile: Tile, raw: Mapping[StoredTensor, Raw]) -> tuple[Raw, Counts]:
        """As NumpyKernel.edit."""
        library = _library()
        masked = any(term.masks for term in job.terms)
        if library is None or masked or any(t.dtype not in _DTYPES for t in _weights(job)) or job.dtype not in _DTYPES:
            return super().edit(job, tile, raw)
        terms = (_Term * len(job.terms))(*(self._term(job, position, tile, raw) for position in range(len(job.terms))))
        out = self._buffer("out", "u1", tile.units * unit_bytes(job.dtype))
        counts = (ctypes.c_int64 * 4)()
        library.taskvec_edit(
            ctypes.c_int64(tile.units),
            _pointer(raw[job.base]),
            _DTYPES[job.base.dtype],
            _pointer(out),
            _DTYPES[job.dtype],
            terms,
            len(job.terms),
            counts,
        )
        intended, changed, overflow, nonfinite = counts
        if nonfinite and any(term.kind == _GIVEN for term in terms):  # only numpy looks at what they were made of
            return super().edit(job, tile, raw)
        return out, Counts(intended, changed, overflow, nonfinite)

    def _multiply(self, left: Any, right: Any, out: Any) -> None:
        library = _library()
        if library is None or left.strides[1] != 4 or right.strides[1] != 4 or not out.flags.c_contiguous:
            super()._multiply(left, right, out)
            return
        (rows, rank), columns = left.shape, right.shape[1]
        left = np.ascontiguousarray(left)
        sizes = (ctypes.c_int64(n) for n in (rows, columns, rank))
        stride = ctypes.c_int64(right.strides[0] // 4)
        library.taskvec_product(*sizes, _pointer(left), _pointer(right), stride, _pointer(out))

    def _term(self, job: Job, position: int, tile: Tile, raw: Mapping[StoredTensor, Raw]) -> _Term:
        alpha, delta, _ = job.terms[position]
        if isinstance(delta, DenseDelta):
            own = delta.origin == job.base
            origin = None if own else _pointer(raw[delta.origin])
            tuned = _pointer(raw[delta.tuned])
            return _Term(_DENSE, _DTYPES[delta.tuned.dtype], _DTYPES[delta.origin.dtype], single(alpha), tuned, origin)
        product = self._buffer(f"given {position}", "f4", tile.units)
        with np.errstate(all="ignore"):
            self._delta(job, position, tile, raw, product, None)
        return _Term(_GIVEN, 0, 0, 0.0, _pointer(product), None)


def _weights(job: Job) -> list[StoredTensor]:
    """What the compiled loop itself reads: base, and the terms of fine-tunes."""
    dense = [delta for _, delta, _ in job.terms if isinstance(delta, DenseDelta)]
    return [job.base, *(stored for delta in dense for stored in (delta.tuned, delta.origin))]


def _pointer(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
