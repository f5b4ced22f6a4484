"""What is done with the inputs of a plan before anything runs: what is still on the Hub is fetched, and the small tensors of
adapters, of which headers cannot tell, are looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..checkpoint.files import absent, fetch
from ..checkpoint.header import StoredTensor
from ..delta.source import FLOATS, AdapterSource, FormulaDelta, stored_tensors
from ..delta.weighting import leaf
from ..errors import AdapterError, show
from .plan import Plan

if TYPE_CHECKING:
    from ..checkpoint.files import InputFiles


def download(plan: Plan) -> None:
    """Fetch from the Hub what the plan reads and is not here yet; then what is known only of files that are here."""
    needed = plan.to_download
    if needed:
        fetch(needed)
        check_factors(plan)


def check_factors(plan: Plan) -> None:
    """Raises AdapterError naming the first adapter tensor that holds NaN or inf: the product would spread it. Files that
    are still on the Hub are looked at when they are here."""
    from ..checkpoint.files import InputFiles

    adapters = [found.weights for _, source in plan.vector.terms if isinstance(found := leaf(source), AdapterSource)]
    paths = {shard.path for weights in adapters for shard in weights.shards}
    files = InputFiles(plan.identities)
    try:
        for stored in stored_tensors(delta for job in plan.jobs for _, delta, _ in job.terms):
            known = stored.path in paths and stored.dtype in FLOATS and absent(stored.path) is None
            if known and not _is_finite(stored, files):
                raise AdapterError(
                    f"{show(stored.path)}: tensor {show(stored.name)}: holds NaN or inf, expected finite numbers",
                    hint="The training diverged; take an earlier step of it",
                )
        for job in plan.jobs:
            for _, delta, _ in job.terms:
                if isinstance(delta, FormulaDelta) and delta.formula.judges_tensors:
                    delta.formula.prepare([_values(stored, files) for stored in delta.tensors], lambda: ())
    finally:
        files.close()


def _values(stored: StoredTensor, files: InputFiles) -> Any:
    """A small stored tensor, in float64."""
    import numpy as np

    from ..checkpoint.floats import decode

    raw = np.empty(stored.nbytes, np.uint8)
    files.read(stored.path, raw.data, stored.offset, stored.name)
    return decode(raw, stored.dtype, np.empty(stored.elements, np.float64)).reshape(stored.shape)


def _is_finite(stored: StoredTensor, files: InputFiles) -> bool:
    import numpy as np

    from ..checkpoint.floats import decode
    from .jobs import tiles, unit_bytes

    unit = unit_bytes(stored.dtype)
    for tile in tiles(stored.dtype, stored.shape, stored.nbytes):
        raw = np.empty(tile.units * unit, np.uint8)
        files.read(stored.path, raw.data, stored.offset + tile.start * unit, stored.name)
        if not np.isfinite(decode(raw, stored.dtype, np.empty(tile.units, np.float64))).all():
            return False
    return True
