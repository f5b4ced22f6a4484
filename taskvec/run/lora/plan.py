"""What will be extracted as a LoRA, decided before anything is written: which tensors changed (both models are read, each
tensor to its first difference), where they go, and what no LoRA carries, which is refused by name.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ...checkpoint.checkpoint import Checkpoint, same_bytes
from ...checkpoint.files import InputFiles, fetch
from ...checkpoint.header import DTYPE_BITS, StoredTensor, encode_header
from ...checkpoint.locate import locate_adapter
from ...delta.adapters.tied import Ties
from ...delta.source import FLOATS, DenseDelta
from ...delta.stored import told
from ...delta.vector import TaskVector
from ...errors import AdapterError, UsageError, counted, listing, show
from ..edited import PathLike
from ..extract import vector_plan
from ..jobs import Job, tiles
from ..name_filter import patterns
from ..output import Target, check_space, check_target
from ..plan import OUT_DTYPES, Options, Plan, human_bytes, match
from .layout import Layout, lay_out, value_key

if TYPE_CHECKING:
    from ...checkpoint.floats import Raw

_DTYPES = ("float32", "bfloat16", "float16")
_WITH_HEAD = ("CausalLM", "LMHead", "MaskedLM", "PreTraining", "ConditionalGeneration", "Classification", "Answering")
# names on disk that transformers 5 has others for in memory, as in delta/adapters/names.py: experts fused, modules renamed
_RENAMED = re.compile(
    r"\.experts\.\d+\.|\.block_sparse_moe\.|\battention\.attention\.(query|key|value)\."
    r"|(^|\.)(visual|language_model\.model|vision_tower\.vision_model)\.|^(backbone|embed_out)\."
)
_HEADS = {"lm_head", "embed_out", "score", "classifier", "cls", "qa_outputs"}

Entry = tuple[str, str, tuple[int, ...], int]  # name, dtype, shape, bytes: a line of a safetensors header


class Settings(NamedTuple):
    """What changes the adapter. `prefix` ends in a dot, unless it is empty."""

    rank: int | None
    energy: float | None
    dtype: str
    modules_to_save: bool
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    prefix: str


@dataclass(frozen=True)
class LoraPlan:
    """What will be extracted. `differences`: how Δ of every factored tensor is computed; sizes in bytes. `print` it for a
    dry run."""

    base: Checkpoint
    tuned: Checkpoint
    settings: Settings
    layout: Layout
    differences: Plan
    unchanged: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def worker_bytes(self) -> int:
        """What one worker takes at most: the whole Δ of a tensor in float32, and what factorising it takes."""
        from .low_rank import working_bytes

        rank, energy = self.settings.rank, self.settings.energy
        largest = max(4 * m * n + working_bytes(m, n, rank, energy) for m, n in (layer.shape for layer in self.layout.layers))
        return largest + self.differences.buffer_bytes()

    @property
    def bytes_to_write(self) -> int | None:
        """At most so many; None when only the energy is given: the ranks are not known then."""
        if self.settings.rank is None:
            return None
        return len(self.header(self.most())) + sum(size for *_, size in self.entries(self.most()))

    def most(self) -> dict[str, int]:
        """The largest rank every module can get."""
        return {layer.module: min(*layer.shape, self.settings.rank or layer.shape[0]) for layer in self.layout.layers}

    def entries(self, ranks: Mapping[str, int]) -> Iterator[Entry]:
        """The tensors of the adapter's file in their order: A and B of every layer, then the new values."""
        dtype = OUT_DTYPES[self.settings.dtype] or "F32"
        for layer in self.layout.layers:
            for key, shape in zip(layer.keys(self.settings.prefix), layer.shapes(ranks[layer.module])):
                yield key, dtype, shape, shape[0] * shape[1] * DTYPE_BITS[dtype] // 8
        for name, stored in self.layout.values.items():
            yield value_key(name, self.settings.prefix), stored.dtype, stored.shape, stored.nbytes

    def header(self, ranks: Mapping[str, int]) -> bytes:
        """The header of the adapter's file. No longer for smaller ranks."""
        return encode_header(list(self.entries(ranks)), {"format": "pt"})

    def summary(self) -> dict[str, Any]:
        """As plain data, JSON-ready."""
        return {
            "base": self.base.label,
            "tuned": self.tuned.label,
            "factored": {layer.name: layer.kind for layer in self.layout.layers},
            "new_values": list(self.layout.values),
            "unchanged_tensors": len(self.unchanged),
            "bytes_to_write_at_most": self.bytes_to_write,
            "bytes_of_memory_per_worker": self.worker_bytes,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        size = self.bytes_to_write
        lines = [
            f"lora ≈ {show(self.tuned.label)} − {show(self.base.label)}",
            f"factor {counted(len(self.layout.layers), 'weight')}, carry {counted(len(self.layout.values), 'new value')}, "
            f"{counted(len(self.unchanged), 'tensor')} unchanged",
            *([] if size is None else [f"write at most {human_bytes(size)}"]),
            f"at most {human_bytes(self.worker_bytes)} of memory per worker",
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def plan_lora(
    base: Checkpoint | PathLike,
    tuned: Checkpoint | PathLike,
    *,
    output: PathLike,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "float32",
    modules_to_save: bool = True,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    prefix: str = "",
    overwrite: bool = False,
) -> LoraPlan:
    """What `extract_lora` with the same arguments would do, and every refusal of it that can be known before."""
    settings = _settings(rank, energy, dtype, modules_to_save, patterns(include), patterns(exclude), prefix)
    target = Target.of(output)
    if target.single_file:
        raise UsageError(f"output {show(output)}: an adapter is a folder", hint="Name one without .safetensors")
    opened = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    other = _open_tuned(tuned)
    check_target(target, [opened, other], overwrite)
    plan = _plan(opened, other, settings)
    check_space(target, plan.bytes_to_write or 0)
    return plan


def difference(plan: Plan, job: Job) -> Iterator[tuple[int, Raw, int]]:
    """Δ of one tensor in float32, tile by tile: the first element of the tile, its bytes (valid until the next), and how
    many of its elements are not zero."""
    from ..native import cpu_kernel
    from ..worker import Worker

    inputs = InputFiles(plan.identities)
    try:
        worker = Worker(inputs, cpu_kernel)
        for tile in tiles(job.dtype, job.shape, job.nbytes):
            raw, counts = worker.compute(job, (tile,), worker.read(job, (tile,)))
            yield tile.start, raw, counts.intended
    finally:
        inputs.close()


def _settings(
    rank: int | None,
    energy: float | None,
    dtype: str,
    modules_to_save: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    prefix: str,
) -> Settings:
    if rank is None and energy is None:
        raise UsageError("neither rank nor energy is given", hint="Say --rank 32, --energy 0.95, or both")
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank}, expected at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy {energy}, expected a share of the squared norm, above 0 and at most 1")
    if dtype not in _DTYPES:
        raise UsageError(f"dtype {show(dtype)}, expected one of {', '.join(_DTYPES)}")
    stripped = prefix.strip(".")
    rank, energy = None if rank is None else int(rank), None if energy is None else float(energy)  # of numpy they may be
    return Settings(rank, energy, dtype, modules_to_save, include, exclude, f"{stripped}." if stripped else "")


def _open_tuned(tuned: Checkpoint | PathLike) -> Checkpoint:
    if not isinstance(tuned, Checkpoint):
        if locate_adapter(tuned) is not None:
            raise UsageError(f"{show(tuned)}: is an adapter already, expected a fine-tuned model")
        tuned = Checkpoint.open(tuned)
    if told(tuned) is not None:
        raise UsageError(
            f"{show(tuned.path)}: a saved vector, expected a fine-tuned model",
            hint="Add it to its base with `taskvec add`, and extract from that",
        )
    return tuned


def _plan(base: Checkpoint, tuned: Checkpoint, settings: Settings) -> LoraPlan:
    from ..card import licence_note

    fetch(checkpoint.readme for checkpoint in (base, tuned) if checkpoint.readme is not None)  # for the card
    options = Options("float32", None, settings.include, settings.exclude)
    vector = TaskVector.between(base, tuned)
    matched = match(base, vector, options)
    everything = vector_plan(base, vector, options, single_file=True)
    changed = [job.name for job in everything.jobs if any(count for *_, count in difference(everything, job))]
    _refuse_no_floats(base, tuned, settings, matched.compared)
    stored = {job.name: _tuned_tensor(job) for job in everything.jobs}
    layout = lay_out(base, {name: stored[name] for name in changed}, lambda name: stored.get(name, base.tensors[name]))
    layout, notes = _settle_ties(base, layout, stored)
    _refuse(base, tuned, layout, settings)
    names = {layer.name for layer in layout.layers}
    licences = licence_note((base, tuned), with_card=True)
    notes += [licences] if licences else []
    return LoraPlan(
        base=base,
        tuned=tuned,
        settings=settings,
        layout=layout,
        differences=vector_plan(base, vector, options, single_file=True, names=names),
        unchanged=tuple(name for name in base.tensors if name not in changed),
        notes=(*(n.replace(", copied: ", ", left out: ") for n in matched.notes), *notes, *_notes(base, layout, settings)),
    )


def _tuned_tensor(job: Job) -> StoredTensor:
    ((_, delta, _),) = job.terms
    assert isinstance(delta, DenseDelta)
    return delta.tuned


def _settle_ties(base: Checkpoint, layout: Layout, tuned: Mapping[str, StoredTensor]) -> tuple[Layout, list[str]]:
    """No factors for a head that base stores beside the embeddings it is tied to. Raises AdapterError if tuned unties it."""
    ties = Ties(base)
    names = [layer.name for layer in layout.layers]
    if ties.embedding not in names and ties.head not in names:
        return layout, []
    if ties.head is not None and ties.embedding is not None:
        head, embedding = (tuned.get(name, base.tensors[name]) for name in (ties.head, ties.embedding))
        if (head.dtype, head.shape) != (embedding.dtype, embedding.shape) or not same_bytes(head, embedding):
            raise AdapterError(
                f"{show(head.path)}: tensor {show(ties.head)}: base ties it to {show(ties.embedding)}, and here they differ: "
                "factors of either would change both",
                hint=f"Leave one out with --exclude '{show(ties.head)}'",
            )
        layout = replace(layout, layers=tuple(layer for layer in layout.layers if layer.name != ties.head))
    return layout, [
        f"the head is tied to {show(ties.embedding)}: once merged, the adapter changes both, as the fine-tune did; not "
        "merged, PEFT and vLLM add it to the embeddings alone"
    ]


def _refuse_no_floats(
    base: Checkpoint, tuned: Checkpoint, settings: Settings, compared: Mapping[str, tuple[StoredTensor, ...]]
) -> None:
    """Raises AdapterError for tensors that are no floats, and others in tuned."""
    other = []
    for name, tensor in base.tensors.items():
        if tensor.dtype in FLOATS or name not in tuned.tensors or not _kept(name, settings):
            continue
        if name not in compared or not all(same_bytes(tensor, twin) for twin in compared[name]):
            other.append(name)
    if other:
        raise AdapterError(
            f"{show(tuned.path)}: {counted(len(other), 'tensor')} of no floats, and other than in {show(base.path)}: "
            f"{listing(other)}; no adapter carries them",
            hint=f"Leave them as they are in the base with {_excluding(other)}",
        )


def _refuse(base: Checkpoint, tuned: Checkpoint, layout: Layout, settings: Settings) -> None:
    """Raises AdapterError for what cannot be carried, or may not, and when nothing is left."""
    where = show(tuned.path)
    if layout.refused:
        found = [f"{name} ({why})" for name, why in layout.refused.items()]
        raise AdapterError(
            f"{where}: {counted(len(found), 'tensor')} changed that a LoRA cannot carry: {listing(found)}",
            hint=f"Leave them as they are in the base with {_excluding(layout.refused)}",
        )
    if layout.values and not settings.modules_to_save:
        raise AdapterError(
            f"{where}: {counted(len(layout.values), 'tensor')} of norms and biases would have to be carried as they are: "
            f"{listing(layout.values)}",
            hint=f"Allow --modules-to-save (PEFT loads it, vLLM does not), or leave out: {_excluding(layout.values)}",
        )
    if not layout.layers:
        raise AdapterError(f"{where}: no weight of two axes differs from {show(base.path)}: a LoRA needs at least one")


def _excluding(names: Iterable[str]) -> str:
    """The options that leave these out, by the ends of their names."""
    ends = dict.fromkeys(".".join(name.replace(".base_layer.", ".").split(".")[-2:]) for name in names)
    more = " …" if len(ends) > 3 else ""
    return " ".join(f"--exclude '*{show(end)}'" for end in list(ends)[:3]) + more


def _kept(name: str, settings: Settings) -> bool:
    included = not settings.include or any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.include)
    return included and not any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.exclude)


def _notes(base: Checkpoint, layout: Layout, settings: Settings) -> Iterator[str]:
    if layout.values:
        yield (
            f"{counted(len(layout.values), 'tensor')} of norms and biases carried as they are (modules_to_save, bias): PEFT "
            f"loads them, vLLM refuses the adapter; without: {_excluding(layout.values)}"
        )
    renamed = [layer.module for layer in layout.layers if _RENAMED.search(layer.name)]
    if renamed:
        yield (
            f"{counted(len(renamed), 'module')} named as in the files, like {show(renamed[0])}: transformers 4, vLLM and "
            "taskvec know them; transformers 5 calls them otherwise in memory, and PEFT on it does not find them"
        )
    classes = base.config.get("architectures")
    firsts = {name.partition(".")[0] for name in base.tensors} - _HEADS
    if not settings.prefix and len(firsts) > 1 and any(kind in str(classes) for kind in _WITH_HEAD):
        yield (
            f"modules are named as in {show(base.label)}, where names begin with {listing(sorted(firsts), 3)}; if the model "
            "in memory has a component before that (transformer, model), PEFT finds none of them: say --prefix"
        )


__all__ = ["Entry", "LoraPlan", "Settings", "difference", "plan_lora"]
