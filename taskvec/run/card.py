"""README.md of an output, be it a model, a vector or an adapter: front matter for the Hub, and what was done in words and
numbers. Names, never paths of a machine; nothing of the base's own evaluation, which is not true of the edit.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import exists
from ..delta.vector import formula
from ..errors import counted, show
from . import reproduce
from .front_matter import FrontMatter, front_matter_of
from .kernel import Counts
from .plan import Options, Plan
from .record import changes
from .stream import RunResult

if TYPE_CHECKING:
    from .lora.extract import Extracted
    from .lora.plan import LoraPlan, Settings

_TAGS = ("taskvec", "task-arithmetic")
_MOST_ROWS = 30  # of the table of module kinds


def card(plan: Plan, result: RunResult) -> bytes:
    """The whole file, of an edited model."""
    own = front_matter_of(plan.base)
    content = {
        **_models("merge", inputs_of(plan)),
        **_legal(own, [file.name for file in plan.side]),
        "pipeline_tag": own.pipeline_tag,
        "library_name": own.library_name or _library(plan.base),
        "language": list(own.language),
        "tags": list(dict.fromkeys([*_TAGS, "merge", *own.tags])),
    }
    return _whole(content, _body(plan, result))


def vector_card(plan: Plan, result: RunResult) -> bytes:
    """That of a folder of a saved vector, which no library loads as a model: none is named."""
    own = front_matter_of(plan.base)
    content = {**_models("adapter", [plan.base]), **_legal(own), "language": list(own.language), "tags": list(_TAGS)}
    return _whole(content, _vector_body(plan, result))


def adapter_card(plan: LoraPlan, found: Sequence[Extracted]) -> bytes:
    """That of an extracted adapter."""
    own = front_matter_of(plan.base)
    content = {
        **_models("adapter", [plan.base]),
        **_legal(own),
        "pipeline_tag": own.pipeline_tag,
        "library_name": "peft",
        "language": list(own.language),
        "tags": [*_TAGS, "lora"],
    }
    return _whole(content, _adapter_body(plan, found))


def licence_note(inputs: Sequence[Checkpoint], *, with_card: bool) -> str | None:
    """What to say when an input has another licence than the first, which is the base."""
    licences = [(checkpoint.label, front_matter_of(checkpoint).license) for checkpoint in inputs]
    ((base, own), *others) = licences
    if not any(licence and licence.casefold() != own.casefold() for _, licence in others):
        return None
    said = ", ".join(f"{show(label)}: {show(licence or 'none named')}" for label, licence in licences)
    named = f"the card names {f'that of {show(base)}' if own else 'none'}" if with_card else "they are not in the file"
    return f"the inputs have several licences ({said}); {named}"


def inputs_of(plan: Plan) -> list[Checkpoint]:
    """Base first, then what the vector is made of, masks too, each once."""
    found: list[Checkpoint] = []
    for checkpoint in plan.inputs:
        found += [checkpoint] if checkpoint not in found else []
    return found


def _whole(content: dict[str, Any], body: Iterable[str]) -> bytes:
    import yaml

    held = {key: value for key, value in content.items() if value}
    matter = yaml.safe_dump(held, sort_keys=False, allow_unicode=True)
    return ("\n".join([f"---\n{matter}---", "", *body]) + "\n").encode("utf-8", "backslashreplace")


def _models(relation: str, checkpoints: Iterable[Checkpoint]) -> dict[str, Any]:
    """Those of them that are on the Hub, and what the output is to them."""
    names = list(dict.fromkeys(checkpoint.hub.id for checkpoint in checkpoints if checkpoint.hub is not None))
    return {"base_model": names, "base_model_relation": relation} if names else {}


def _legal(own: FrontMatter, files: Collection[str] = ()) -> dict[str, str]:
    """The licence. `files`: those of the output; a link to any other file, or into a machine, leads nowhere."""
    link = own.license_link
    leads = re.match(r"https?://[^@]*\Z", link) or link in files
    return {"license": own.license, "license_name": own.license_name, "license_link": link if leads else ""}


def _body(plan: Plan, result: RunResult) -> Iterable[str]:
    did = changes(plan, result)
    yield from (f"# {_shown(plan.base.label)}, edited", "", f"Made by taskvec {__version__}, without training:", "")
    yield from (f"    {show(plan.formula, 2000)}", "", "## What changed", "", *_selection(plan.options))
    yield f"- tensors edited: {did['tensors_edited']}, copied unchanged: {did['tensors_copied']}"
    yield f"- elements changed: {did['elements_changed']} of {did['elements']}"
    yield f"- changes lost to rounding: {did['elements_lost_to_rounding']}, overflows: {did['elements_overflowed']}"
    yield ""
    yield from _kinds(plan, result)
    yield from _code(plan)
    yield from _made_from(inputs_of(plan))
    yield from _again(reproduce.edit(plan))


def _vector_body(plan: Plan, result: RunResult) -> Iterable[str]:
    did = changes(plan, result)
    yield from ("# A task vector", "", f"Made by taskvec {__version__}, without training:", "")
    yield from (f"    {show(formula(plan.vector).removeprefix('+ '), 2000)}", "")
    yield "Differences of weights, not a model: they are added to one, or subtracted, times a number, as in"
    use = reproduce.command("taskvec", "subtract", reproduce.typed(plan.base), "vector", "--alpha", "0.3", "-o", "edited")
    yield from ("", *use, "", "## What it holds", "", *_selection(plan.options))
    yield f"- tensors: {did['tensors_edited']}; those in which nothing changed are left out"
    yield f"- elements that are not zero: {did['elements_changed']} of {did['elements']}, in {plan.options.out_dtype}"
    yield ""
    yield from _kinds(plan, result)
    yield from _made_from(inputs_of(plan))
    yield from _again(reproduce.extract(plan))


def _adapter_body(plan: LoraPlan, found: Sequence[Extracted]) -> Iterable[str]:
    yield from (f"# {_shown(plan.tuned.label)} − {_shown(plan.base.label)}, as a LoRA", "")
    yield f"Made by taskvec {__version__}, without training: the difference Δ of every weight that changed, as a product B·A"
    yield from ("of low rank. Added to the base it gives the tuned model back, within the errors below:", "")
    yield from (*reproduce.command("taskvec", "lora", "merge", reproduce.typed(plan.base), "adapter", "-o", "merged"), "")
    yield from ("## What it holds", "", *_selection(plan.settings))
    if plan.layout.values:
        yield f"- new values of {counted(len(plan.layout.values), 'tensor')} (norms, biases), as they are"
    yield from (f"- factors of {counted(len(found), 'weight')}, in {plan.settings.dtype}", "")
    yield from ("| kind of module | weights | ranks | largest ‖Δ − BA‖ / ‖Δ‖ |", "|---|---|---|---|")
    kinds: dict[str, list[Extracted]] = defaultdict(list)
    for tensor in found:
        kinds[_kind(tensor.layer.module)].append(tensor)
    for kind, held in list(kinds.items())[:_MOST_ROWS]:
        ranks = dict.fromkeys((min(tensor.rank for tensor in held), max(tensor.rank for tensor in held)))
        yield f"| {_shown(kind)} | {len(held)} | {'–'.join(map(str, ranks))} | {max(tensor.error for tensor in held):.3g} |"
    if len(kinds) > _MOST_ROWS:
        yield f"| {len(kinds) - _MOST_ROWS} more | | | |"
    yield ""
    yield from (f"Note: {_shown(note, 2000)}\n" for note in plan.notes)
    yield from _made_from([plan.base, plan.tuned])
    yield from _again(reproduce.extract_lora(plan))


def _made_from(inputs: Iterable[Checkpoint]) -> Iterable[str]:
    yield from ("## Made from", "", "| input | revision | file | bytes | SHA-256 of its header |", "|---|---|---|---|---|")
    for checkpoint in inputs:
        for shard in checkpoint.shards:
            commit = checkpoint.hub.commit if checkpoint.hub else ""
            file = f"{_shown(shard.path.name)} | {shard.identity.size} | `{shard.header_sha256[:16]}…`"
            yield f"| {_shown(_named(checkpoint))} | {commit} | {file} |"


def _selection(options: Options | Settings) -> Iterable[str]:
    """Which tensors were looked at, if not all."""
    for what, patterns in (("only", options.include), ("without", options.exclude)):
        if patterns:
            yield f"- {what} tensors that match {', '.join(_shown(pattern) for pattern in patterns)}"


def _shown(name: str, longest: int = 200) -> str:
    """A name from a file, where Markdown is read."""
    return re.sub(r"[|<>`*\[]", r"\\\g<0>", show(name, longest))


def _again(command: Iterable[str]) -> Iterable[str]:
    yield from ("", "## Make it again", "", *command, "")
    yield "`taskvec.json` holds the recipe, every input by size and header digest, and a checksum of every weight file, which"
    yield "`taskvec verify` checks."


def _code(plan: Plan) -> Iterable[str]:
    """What a person should know before loading it."""
    if plan.code.files:
        yield from (
            "## Code",
            "",
            f"This folder holds code of {show(plan.base.label)}, byte for byte; taskvec ran none of it:",
            "",
        )
        yield from (f"- `{show(name)}`" for name in plan.code.files)
        yield from ("", "Loading with `trust_remote_code=True` runs it: read it first.", "")
    elif plan.code.left:
        yield from ("## Code", "", f"Code of {show(plan.base.label)} was {plan.code}.", "")


def _kinds(plan: Plan, result: RunResult) -> Iterable[str]:
    """A table of what changed by the kind of module: the last parts of the names, numbers left out."""
    kinds: dict[str, tuple[list[int], Counts]] = defaultdict(lambda: ([], Counts()))
    for job in plan.edited:
        sizes, counts = kinds[_kind(job.name)]
        sizes.append(job.base.elements)
        counts.add(result.counts.get(job.name, Counts()))
    yield from ("| kind of tensor | tensors | elements | changed | lost to rounding |", "|---|---|---|---|---|")
    for kind, (sizes, counts) in list(kinds.items())[:_MOST_ROWS]:
        yield f"| {_shown(kind)} | {len(sizes)} | {sum(sizes)} | {counts.changed} | {counts.lost} |"
    if len(kinds) > _MOST_ROWS:
        yield f"| {len(kinds) - _MOST_ROWS} more | | | | |"
    yield ""


def _kind(name: str) -> str:
    """The last two parts of a name, numbers left out."""
    return ".".join([part for part in name.split(".") if not part.isdigit()][-2:])


def _named(checkpoint: Checkpoint) -> str:
    """As in a table that has its commit."""
    place = checkpoint.hub
    return checkpoint.label if place is None else f"{place.id}/{place.path}" if place.path else place.id


def _library(base: Checkpoint) -> str | None:
    if base.folder is not None and exists(base.folder / "modules.json"):
        return "sentence-transformers"
    return "transformers" if base.config.get("model_type") else None
