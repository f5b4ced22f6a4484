"""What a plan consists of: per output shard the header bytes and per tensor a job; and how a tensor is cut into tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..checkpoint.header import DTYPE_BITS, StoredTensor
from ..delta.source import FLOATS, Delta, DenseDelta, FormulaDelta, LowRankDelta, ScaledDelta

TILE_BYTES = 1 << 20  # of output; larger writes make ext4 ask for large folios, which costs more than it saves
KEPT_FACTORS, LARGE_FACTOR = 2, 1 << 20  # an adapter's tensors of so many decoded bytes are kept for the next job
CHECKSUM_PLACE = "the-checksum-of-a-file-goes-here"  # in a planned header; the run puts its 32 hex digits there


class Term(NamedTuple):
    """One Δ and the finite α it is subtracted with: edited = base − α·Δ, or − α·(mask ⊙ Δ), of as many masks as there are."""

    alpha: float
    delta: Delta
    masks: tuple[StoredTensor, ...] = ()


class Job(NamedTuple):
    """One output tensor. No terms and base's own dtype: copied as bytes. Otherwise: edited (or cast).

    `offset` is absolute in the output file; `compared` are tuned tensors whose bytes are only compared with base's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    base: StoredTensor
    terms: tuple[Term, ...]
    compared: tuple[StoredTensor, ...] = ()

    @property
    def copied(self) -> bool:
        return not self.terms and self.dtype == self.base.dtype

    @property
    def elementwise(self) -> tuple[StoredTensor, ...]:
        """Every stored tensor that is read tile by tile, base first, each once."""
        found = {self.base: None}
        for _, delta, masks in self.terms:
            found.update(dict.fromkeys(masks))
            if isinstance(delta, DenseDelta):
                found[delta.tuned] = found[delta.origin] = None
            elif isinstance(delta, ScaledDelta):
                found[delta.value] = None
            elif isinstance(delta, FormulaDelta) and delta.formula.uses_weight:
                found[delta.origin] = None
        found.update(dict.fromkeys(self.compared))
        return tuple(found)

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """Every stored tensor of an adapter that is read whole."""
        found = (d.tensors for _, d, _ in self.terms if isinstance(d, (LowRankDelta, FormulaDelta)))
        return tuple(dict.fromkeys(tensor for tensors in found for tensor in tensors))

    @property
    def surveyed(self) -> tuple[StoredTensor, ...]:
        """What has to be read before the first tile can be computed: then one worker carries the whole tensor."""
        formulas = [delta for _, delta, _ in self.terms if isinstance(delta, FormulaDelta)]
        return tuple(delta.origin for delta in formulas if delta.formula.surveys_weight)


class ShardPlan(NamedTuple):
    """One output file: its header bytes, jobs in the order of their offsets, size in bytes."""

    name: str
    header: bytes
    jobs: tuple[Job, ...]
    size: int

    @property
    def bytes_to_read(self) -> int:
        return sum(t.nbytes for job in self.jobs for t in (*job.elementwise, *job.factors, *job.surveyed))


class Tile(NamedTuple):
    """A run of units (elements; bytes, if not floats) of one tensor, row-major: whole rows, or a part of one row.

    `row`, `rows`, `column`, `columns` say where it lies in the tensor seen as [shape[0], the rest].
    """

    start: int
    units: int
    row: int
    rows: int
    column: int
    columns: int


def unit_bytes(dtype: str) -> int:
    """What a tile counts in, in bytes: elements of a float dtype, else single bytes."""
    return DTYPE_BITS[dtype] // 8 if dtype in FLOATS else 1


def matrix_shape(tensor: StoredTensor) -> tuple[int, int]:
    """Rows and columns of a float tensor: all axes but the first are one; a single axis is one row."""
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    return rows, tensor.elements // max(1, rows)


def tile_height(dtype: str, columns: int) -> int:
    """How many whole rows a tile has, or 1."""
    return max(1, TILE_BYTES // unit_bytes(dtype) // max(1, columns))


def tiles(dtype: str, shape: tuple[int, ...], nbytes: int) -> Iterator[Tile]:
    """Cut an output tensor into tiles of at most TILE_BYTES: floats by rows, everything else as a run of bytes.

    A function of the output's header alone, never of memory or threads: matrix products and checksums depend on it, and
    the same inputs must give the same bytes however they are run.
    """
    if nbytes == 0:
        return
    rows = shape[0] if len(shape) > 1 and dtype in FLOATS else 1
    columns = nbytes // unit_bytes(dtype) // rows
    most = TILE_BYTES // unit_bytes(dtype)
    if columns <= most:
        step = tile_height(dtype, columns)
        for row in range(0, rows, step):
            height = min(step, rows - row)
            yield Tile(row * columns, height * columns, row, height, 0, columns)
        return
    for row in range(rows):
        for column in range(0, columns, most):
            width = min(most, columns - column)
            yield Tile(row * columns + column, width, row, 1, column, width)


def batches(job: Job, limit: int) -> Iterator[tuple[Tile, ...]]:
    """Consecutive tiles of one tensor that are moved together: at most `limit` bytes of output, but at least one tile,
    and either whole rows or parts of one row."""
    held: list[Tile] = []
    nbytes = 0
    for tile in tiles(job.dtype, job.shape, job.nbytes):
        size = tile.units * unit_bytes(job.dtype)
        part_of_row = tile.units < tile.rows * _row_units(job)
        if held and (nbytes + size > limit or (part_of_row and tile.row != held[0].row)):
            yield tuple(held)
            held, nbytes = [], 0
        held.append(tile)
        nbytes += size
    if held:
        yield tuple(held)


def merged(held: tuple[Tile, ...]) -> Tile:
    """The run of units that a batch covers, as one tile."""
    first, last = held[0], held[-1]
    units = last.start + last.units - first.start
    if first.row == last.row:
        return first._replace(units=units, columns=last.column + last.columns - first.column)
    return first._replace(units=units, rows=last.row + last.rows - first.row)


def _row_units(job: Job) -> int:
    rows = job.shape[0] if len(job.shape) > 1 and job.dtype in FLOATS else 1
    return job.nbytes // unit_bytes(job.dtype) // max(1, rows)
