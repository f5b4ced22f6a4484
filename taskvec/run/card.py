"""README.md of an output, be it a model, a vector or an adapter: front matter for the Hub, and what was done in words and
numbers. Names, never paths of a machine; nothing of the base's own evaluation, which is not true of the edit.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import exists, read_bytes
from ..delta.dense import FineTune
from ..delta.source import AdapterSource, DeltaSource
from ..delta.stored import StoredVector
from ..delta.vector import formula
from ..delta.weighting import Masked, Scaled, Selected, leaf
from ..errors import CheckpointError, counted, show
from .kernel import Counts
from .plan import Options, Plan
from .record import changes
from .stream import RunResult

if TYPE_CHECKING:
    from .lora.extract import Extracted
    from .lora.plan import LoraPlan, Settings

_TAGS = ("taskvec", "task-arithmetic")
_LICENCE = ("license_name", "license_link")  # text
_LARGEST_CARD = 4 << 20  # bytes
_LONGEST_LICENCE = 100  # characters: a name
_IN_PYTHON = "In Python, `taskvec.json` says which inputs the terms of the formula are."
_MOST_ROWS = 30  # of the table of module kinds


def card(plan: Plan, result: RunResult) -> bytes:
    """The whole file, of an edited model."""
    inputs = inputs_of(plan)
    own = _card_of(plan.base)
    content = {
        **_models("merge", inputs),
        **_legal(plan.base),
        **{key: own[key] for key in ("library_name", "pipeline_tag") if isinstance(own.get(key), str)},
        "language": _language(own),
    }
    content.setdefault("library_name", _library(plan.base))
    tags = own.get("tags")
    kept = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    content["tags"] = list(dict.fromkeys([*_TAGS, "merge", *kept]))
    return _whole(content, _body(plan, result))


def vector_card(plan: Plan, result: RunResult) -> bytes:
    """That of a folder of a saved vector, which no library loads as a model: none is named."""
    content = {
        **_models("adapter", [plan.base]),
        **_legal(plan.base),
        "language": _language(_card_of(plan.base)),
        "tags": list(_TAGS),
    }
    return _whole(content, _vector_body(plan, result))


def adapter_card(plan: LoraPlan, found: Sequence[Extracted]) -> bytes:
    """That of an extracted adapter."""
    own = _card_of(plan.base)
    content = {
        **_models("adapter", [plan.base]),
        **_legal(plan.base),
        "library_name": "peft",
        **{key: own[key] for key in ("pipeline_tag",) if isinstance(own.get(key), str)},
        "language": _language(own),
        "tags": [*_TAGS, "lora"],
    }
    return _whole(content, _adapter_body(plan, found))


def front_matter(text: str) -> dict[str, Any]:
    """The YAML between the first two `---` lines of a card; empty when there is none, or it is not a plain mapping."""
    import yaml

    class Plain(yaml.SafeLoader):  # type: ignore[misc]
        """Without aliases, a few of which can stand for gigabytes."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias")
            return super().compose_node(parent, index)

    begun = text.lstrip("\ufeff").lstrip()
    found = re.match(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", begun, re.DOTALL | re.MULTILINE)
    try:
        content = yaml.load(found[1], Plain) if found else None  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def licence_note(inputs: Sequence[Checkpoint]) -> str | None:
    """What to say when the inputs, of which the first is the base, do not have one licence."""
    licences = {checkpoint.label: _licence(checkpoint) for checkpoint in inputs}
    named = {licence for licence in licences.values() if licence}
    if len(named) < 2:
        return None
    said = ", ".join(f"{show(label)}: {show(licence or 'none named')}" for label, licence in licences.items())
    return f"the inputs have several licences ({said}); the card names that of {show(inputs[0].label)}"


def inputs_of(plan: Plan) -> list[Checkpoint]:
    """Base first, then what the vector is made of, each once."""
    found = [plan.base]
    for _, source in plan.vector.terms:
        found += [c for c in leaf(source).inputs if c not in found]
    return found


def _whole(content: dict[str, Any], body: Iterable[str]) -> bytes:
    import yaml

    held = {key: value for key, value in content.items() if value}
    matter = str(yaml.safe_dump(held, sort_keys=False, allow_unicode=True)).splitlines()
    return ("\n".join(["---", *matter, "---", "", *body]) + "\n").encode("utf-8", "backslashreplace")


def _models(relation: str, checkpoints: Iterable[Checkpoint]) -> dict[str, Any]:
    """Those of them that are on the Hub, and what the output is to them."""
    names = list(dict.fromkeys(checkpoint.hub.id for checkpoint in checkpoints if checkpoint.hub is not None))
    return {"base_model": names, "base_model_relation": relation} if names else {}


def _legal(base: Checkpoint) -> dict[str, Any]:
    own = _card_of(base)
    return {"license": _licence(base), **{key: own[key] for key in _LICENCE if isinstance(own.get(key), str)}}


def _language(own: dict[str, Any]) -> list[str]:
    languages = own.get("language")
    listed = languages if isinstance(languages, list) else [languages]
    found = ["no" if language is False else language for language in listed]  # YAML reads Norwegian as false
    return [language for language in found if isinstance(language, str)]


def _body(plan: Plan, result: RunResult) -> Iterable[str]:
    did = changes(plan, result)
    yield from (f"# {show(plan.base.label)}, edited", "", f"Made by taskvec {__version__}, without training:", "")
    yield from (f"    {show(plan.formula, 2000)}", "", "## What changed", "")
    yield f"- tensors edited: {did['tensors_edited']}, copied unchanged: {did['tensors_copied']}"
    yield f"- elements changed: {did['elements_changed']} of {did['elements']}"
    yield f"- changes lost to rounding: {did['elements_lost_to_rounding']}, overflows: {did['elements_overflowed']}"
    yield ""
    yield from _kinds(plan, result)
    yield from _code(plan)
    yield from _made_from(inputs_of(plan))
    yield from _again(_command(plan))


def _vector_body(plan: Plan, result: RunResult) -> Iterable[str]:
    did = changes(plan, result)
    yield from ("# A task vector", "", f"Made by taskvec {__version__}, without training:", "")
    yield from (f"    {show(formula(plan.vector).removeprefix('+ '), 2000)}", "")
    yield "Differences of weights, not a model: they are added to one, or subtracted, times a number, as in"
    use = ["taskvec", "subtract", _typed(plan.base), "vector", "--alpha", "0.3", "-o", "edited"]
    yield from ("", _line(use), "", "## What it holds", "")
    yield f"- tensors: {did['tensors_edited']}; those in which nothing changed are left out"
    yield f"- elements that are not zero: {did['elements_changed']} of {did['elements']}, in {plan.options.out_dtype}"
    yield ""
    yield from _kinds(plan, result)
    yield from _made_from(inputs_of(plan))
    yield from _again(_extract_command(plan))


def _adapter_body(plan: LoraPlan, found: Sequence[Extracted]) -> Iterable[str]:
    base, tuned = show(plan.base.label), show(plan.tuned.label)
    yield from (f"# {tuned} − {base}, as a LoRA", "", f"Made by taskvec {__version__}, without training. The difference Δ of")
    yield f"every weight that changed is in it as a product B·A of low rank: added to {base} it gives {tuned} back, but for"
    yield from ("these errors, ‖Δ − BA‖ / ‖Δ‖:", "")
    yield from ("| kind of module | weights | ranks | largest error |", "|---|---|---|---|")
    kinds: dict[str, list[Extracted]] = defaultdict(list)
    for tensor in found:
        kinds[_kind(tensor.layer.module)].append(tensor)
    for kind, held in list(kinds.items())[:_MOST_ROWS]:
        ranks = dict.fromkeys((min(tensor.rank for tensor in held), max(tensor.rank for tensor in held)))
        yield f"| {show(kind)} | {len(held)} | {'–'.join(map(str, ranks))} | {max(tensor.error for tensor in held):.3g} |"
    if len(kinds) > _MOST_ROWS:
        yield f"| {len(kinds) - _MOST_ROWS} more | | | |"
    yield ""
    if plan.layout.values:
        yield from (f"New values of {counted(len(plan.layout.values), 'tensor')} (norms, biases) are in it as they are.", "")
    yield from _made_from([plan.base, plan.tuned])
    yield from _again(_lora_command(plan))


def _made_from(inputs: Iterable[Checkpoint]) -> Iterable[str]:
    yield from ("## Made from", "", "| input | revision | file | bytes | SHA-256 of its header |", "|---|---|---|---|---|")
    for checkpoint in inputs:
        for shard in checkpoint.shards:
            commit = checkpoint.hub.commit if checkpoint.hub else ""
            file = f"{show(shard.path.name)} | {shard.identity.size} | `{shard.header_sha256[:16]}…`"
            yield f"| {show(checkpoint.label)} | {commit} | {file} |"


def _again(command: Iterable[str]) -> Iterable[str]:
    yield from ("", "## Make it again", "", *command, "")
    yield "`taskvec.json` holds the recipe, every input by size and header digest, and a checksum of every weight file:"
    yield "`taskvec verify` checks them."


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
        yield f"| {show(kind)} | {len(sizes)} | {sum(sizes)} | {counts.changed} | {counts.lost} |"
    if len(kinds) > _MOST_ROWS:
        yield f"| {len(kinds) - _MOST_ROWS} more | | | | |"
    yield ""


def _kind(name: str) -> str:
    """The last two parts of a name, numbers left out."""
    return ".".join([part for part in name.split(".") if not part.isdigit()][-2:])


def _command(plan: Plan) -> list[str]:
    """The command line that makes the output again, or the Python where no command line does."""
    if _beyond_a_command(plan):
        return [_IN_PYTHON]
    ((coefficient, source),) = plan.vector.terms
    verb = "subtract" if coefficient < 0 else "add"
    words = ["taskvec", verb, _typed(plan.base), _typed(_tuned(source)), "--alpha", f"{abs(coefficient)!r}"]
    origin = source.origin if isinstance(source, (FineTune, AdapterSource)) else None
    if origin is not None and origin != plan.base:
        words += ["--base", _typed(origin)]
    words += ["--force-base"] if isinstance(source, StoredVector) and source.force_base else []
    options = plan.options
    words += ["--out-dtype", options.out_dtype] if options.out_dtype != "same" else []
    words += ["--max-shard-size", str(options.max_shard_size)] if options.max_shard_size is not None else []
    words += _chosen(options)
    words += [] if options.code else ["--no-code"]
    return [_line([*words, "-o", "edited"])]


def _extract_command(plan: Plan) -> list[str]:
    """As `_command`, of a saved vector."""
    if _beyond_a_command(plan):
        return [_IN_PYTHON]
    ((coefficient, source),) = plan.vector.terms
    origin = source.origin if isinstance(source, (FineTune, AdapterSource)) else None
    if origin is not None and origin != plan.base:
        return [_IN_PYTHON]
    words = ["taskvec", "extract", _typed(plan.base), _typed(_tuned(source))]
    words += ["--alpha", f"{coefficient!r}"] if coefficient != 1 else []
    words += ["--force-base"] if isinstance(source, StoredVector) and source.force_base else []
    options = plan.options
    words += ["--dtype", options.out_dtype] if options.out_dtype != "float32" else []
    words += ["--max-shard-size", str(options.max_shard_size)]
    return [_line([*words, *_chosen(options), "-o", "vector"])]


def _lora_command(plan: LoraPlan) -> list[str]:
    settings = plan.settings
    words = ["taskvec", "lora", "extract", _typed(plan.base), _typed(plan.tuned)]
    words += ["--rank", str(settings.rank)] if settings.rank is not None else []
    words += ["--energy", f"{settings.energy!r}"] if settings.energy is not None else []
    words += ["--dtype", settings.dtype] if settings.dtype != "float32" else []
    words += [] if settings.modules_to_save else ["--no-modules-to-save"]
    words += ["--prefix", settings.prefix.removesuffix(".")] if settings.prefix else []
    return [_line([*words, *_chosen(settings), "-o", "adapter"])]


def _beyond_a_command(plan: Plan) -> bool:
    return len(plan.vector.terms) != 1 or isinstance(plan.vector.terms[0][1], (Scaled, Selected, Masked))


def _chosen(options: Options | Settings) -> Iterable[str]:
    yield from (word for pattern in options.include for word in ("--include", pattern))
    yield from (word for pattern in options.exclude for word in ("--exclude", pattern))


def _line(words: Sequence[str]) -> str:
    return f"    {show(shlex.join(words), 4000)}"


def _tuned(source: DeltaSource) -> Checkpoint:
    if isinstance(source, FineTune):
        return source.tuned
    return source.checkpoint if isinstance(source, StoredVector) else source.inputs[0]


def _typed(checkpoint: Checkpoint) -> str:
    """A name that a person can type: of the Hub, at its commit, or the last part of a path."""
    place = checkpoint.hub
    if place is None:
        return checkpoint.label
    return f"hf://{place.id}@{place.commit}/{place.path}" if place.path else f"{place.id}@{place.commit}"


def _licence(checkpoint: Checkpoint) -> str | None:
    licence = _card_of(checkpoint).get("license")
    return licence if isinstance(licence, str) and len(licence) < _LONGEST_LICENCE else None


def _card_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The front matter of the README.md beside a checkpoint's files."""
    path = checkpoint.readme
    if path is None:
        return {}
    try:
        return front_matter(read_bytes(path, _LARGEST_CARD).decode("utf-8", "replace"))
    except CheckpointError:  # it is too large
        return {}


def _library(base: Checkpoint) -> str | None:
    if base.folder is not None and exists(base.folder / "modules.json"):
        return "sentence-transformers"
    return "transformers" if base.config.get("model_type") else None
