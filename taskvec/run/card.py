"""README.md of an output: front matter for the Hub, and what was done in words and numbers. Names, never paths of a machine;
nothing of the base's own evaluation, which is not true of the edit.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from .._version import __version__
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import exists, read_bytes
from ..delta.dense import FineTune
from ..delta.source import AdapterSource, DeltaSource
from ..delta.stored import StoredVector
from ..delta.weighting import Masked, Scaled, Selected, leaf
from ..errors import CheckpointError, show
from .kernel import Counts
from .plan import Plan
from .record import changes
from .stream import RunResult

_TAGS = ("taskvec", "task-arithmetic", "merge")
_CARRIED = ("library_name", "pipeline_tag", "license_name", "license_link")  # text
_LARGEST_CARD = 4 << 20  # bytes
_LONGEST_LICENCE = 100  # characters: a name
_MOST_ROWS = 30  # of the table of module kinds


def card(plan: Plan, result: RunResult) -> bytes:
    """The whole file."""
    lines = ["---", *_front_matter(plan), "---", "", *_body(plan, result)]
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")


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


def licence_note(plan: Plan) -> str | None:
    """What to say when the inputs do not have one licence."""
    licences = {checkpoint.label: _licence(checkpoint) for checkpoint in _inputs(plan)}
    named = {licence for licence in licences.values() if licence}
    if len(named) < 2:
        return None
    said = ", ".join(f"{show(label)}: {show(licence or 'none named')}" for label, licence in licences.items())
    return f"the inputs have several licences ({said}); the card names that of {show(plan.base.label)}"


def _front_matter(plan: Plan) -> list[str]:
    import yaml

    own = _card_of(plan.base)
    content: dict[str, Any] = {}
    models = [checkpoint.hub.id for checkpoint in _inputs(plan) if checkpoint.hub is not None]
    if models:
        content["base_model"] = list(dict.fromkeys(models))
        content["base_model_relation"] = "merge"
    licence = _licence(plan.base)
    if licence:
        content["license"] = licence
    content.update({key: own[key] for key in _CARRIED if isinstance(own.get(key), str)})
    languages = own.get("language")
    listed = languages if isinstance(languages, list) else [languages]
    content["language"] = ["no" if language is False else language for language in listed]  # YAML reads Norwegian as false
    content["language"] = [language for language in content["language"] if isinstance(language, str)]
    content.setdefault("library_name", _library(plan.base))
    tags = own.get("tags")
    kept = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    content["tags"] = list(dict.fromkeys([*_TAGS, *kept]))
    content = {key: value for key, value in content.items() if value}
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True)).splitlines()


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
    yield from ("## Made from", "", "| input | revision | file | bytes | SHA-256 of its header |", "|---|---|---|---|---|")
    for checkpoint in _inputs(plan):
        for shard in checkpoint.shards:
            commit = checkpoint.hub.commit if checkpoint.hub else ""
            file = f"{show(shard.path.name)} | {shard.identity.size} | `{shard.header_sha256[:16]}…`"
            yield f"| {show(checkpoint.label)} | {commit} | {file} |"
    yield from ("", "## Make it again", "", *_command(plan), "")
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
        parts = [part for part in job.name.split(".") if not part.isdigit()]
        sizes, counts = kinds[".".join(parts[-2:])]
        sizes.append(job.base.elements)
        counts.add(result.counts.get(job.name, Counts()))
    yield from ("| kind of tensor | tensors | elements | changed | lost to rounding |", "|---|---|---|---|---|")
    for kind, (sizes, counts) in list(kinds.items())[:_MOST_ROWS]:
        yield f"| {show(kind)} | {len(sizes)} | {sum(sizes)} | {counts.changed} | {counts.lost} |"
    if len(kinds) > _MOST_ROWS:
        yield f"| {len(kinds) - _MOST_ROWS} more | | | | |"
    yield ""


def _command(plan: Plan) -> list[str]:
    """The command line that makes the output again, or the Python where no command line does."""
    if len(plan.vector.terms) != 1 or isinstance(plan.vector.terms[0][1], (Scaled, Selected, Masked)):
        return ["In Python, `taskvec.json` says which inputs the terms of the formula are."]
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
    words += [word for pattern in options.include for word in ("--include", pattern)]
    words += [word for pattern in options.exclude for word in ("--exclude", pattern)]
    words += [] if options.code else ["--no-code"]
    return [f"    {show(shlex.join([*words, '-o', 'edited']), 4000)}"]


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


def _inputs(plan: Plan) -> list[Checkpoint]:
    """Base first, then what the vector is made of, each once."""
    found = [plan.base]
    for _, source in plan.vector.terms:
        found += [c for c in leaf(source).inputs if c not in found]
    return found


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
