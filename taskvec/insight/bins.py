"""Which bin of a quantiser an element lands in. Only the bins: nothing is quantised here. All in float64.

    int8    code = round(127 · w / max|row|), to even; a row is what is along the last axis
            (absmax per row, LLM.int8(): Dettmers et al. 2022, section 3.1)
    NF4     code = the nearest of 16 levels to w / max|block|, blocks of 64 elements of the tensor laid out flat
            (QLoRA: Dettmers et al. 2023, section 3; the levels are those of appendix E)

A row or block of zeros is all code 0 in int8, and all the code of 0 in NF4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 64
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
_BETWEEN = (NF4[1:] + NF4[:-1]) / 2
Values = NDArray[np.float64]


def int8(rows: Values, largest: Values) -> NDArray[Any]:
    """rows: [n, columns]; largest: [n], max|row| of the whole row, of which `rows` may be a part."""
    codes: NDArray[Any] = np.rint(rows * 127.0 / _nonzero(largest)[:, None])
    return codes


def nf4(run: Values) -> NDArray[np.uint8]:
    """run: [n], from the beginning of a block to the end of one, or of the tensor."""
    padded = np.zeros(-(-len(run) // BLOCK) * BLOCK)
    padded[: len(run)] = run
    blocks = padded.reshape(-1, BLOCK)
    blocks /= _nonzero(np.abs(blocks).max(axis=1))[:, None]
    codes = np.zeros(blocks.shape, np.uint8)
    for threshold in _BETWEEN:
        codes += blocks > threshold
    return codes.reshape(-1)[: len(run)]


def _nonzero(largest: Values) -> Values:
    return np.where(largest == 0, 1.0, largest)
