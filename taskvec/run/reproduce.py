"""What a person types to make an output again: a command line where one says it all, else Python. Inputs by what they are
called, on the Hub at their commit; never a path of a machine.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..checkpoint.checkpoint import Checkpoint
from ..delta.dense import FineTune
from ..delta.source import AdapterSource, DeltaSource
from ..delta.stored import StoredVector
from ..delta.weighting import Masked, Scaled, Selected, leaf
from ..errors import show
from .plan import Options, Plan

if TYPE_CHECKING:
    from .lora.plan import LoraPlan, Settings

_LONGEST = 4000  # characters
_TOO_LONG = "By a command that is too long for a card: `taskvec.json` has what it said."


def edit(plan: Plan) -> list[str]:
    """`taskvec subtract` or `add`, as lines of Markdown: one term, weighted as the options can say."""
    weights = _weights(plan)
    if weights is None:
        return _edit_in_python(plan)
    ((coefficient, source),) = plan.vector.terms
    verb = "subtract" if coefficient < 0 else "add"
    words = ["taskvec", verb, typed(plan.base), typed(_input(leaf(source))), *weights]
    origin = _origin(source)
    words += ["--base", typed(origin)] if origin is not None and origin != plan.base else []
    words += ["--force-base"] if _forced(source) else []
    options = plan.options
    words += ["--out-dtype", options.out_dtype] if options.out_dtype != "same" else []
    words += ["--max-shard-size", str(options.max_shard_size)] if options.max_shard_size is not None else []
    words += [*_chosen(options), *([] if options.code else ["--no-code"])]
    return command(*words, "-o", "edited")


def extract(plan: Plan) -> list[str]:
    """`taskvec extract`: a sum of scaled vectors that are all from the base; forced to it all or none."""
    sources = [source for _, source in plan.vector.terms]
    forced = any(map(_forced, sources))
    alike = not forced or all(isinstance(source, StoredVector) for source in sources)
    if not (alike and all(_opened_by_extract(source, plan.base) for source in sources)):
        return _extract_in_python(plan)
    words = ["taskvec", "extract", typed(plan.base), *(typed(_input(source)) for source in sources)]
    coefficients = [coefficient for coefficient, _ in plan.vector.terms]
    words += [word for c in coefficients for word in ("--alpha", f"{c!r}")] if coefficients != [1] else []
    words += ["--force-base"] if forced else []
    options = plan.options
    words += ["--dtype", options.out_dtype] if options.out_dtype != "float32" else []
    words += ["--max-shard-size", str(options.max_shard_size)]
    return command(*words, *_chosen(options), "-o", "vector")


def extract_lora(plan: LoraPlan) -> list[str]:
    """`taskvec lora extract`."""
    settings = plan.settings
    words = ["taskvec", "lora", "extract", typed(plan.base), typed(plan.tuned)]
    words += ["--rank", str(settings.rank)] if settings.rank is not None else []
    words += ["--energy", f"{settings.energy!r}"] if settings.energy is not None else []
    words += ["--dtype", settings.dtype] if settings.dtype != "float32" else []
    words += [] if settings.modules_to_save else ["--no-modules-to-save"]
    words += ["--prefix", settings.prefix.removesuffix(".")] if settings.prefix else []
    return command(*words, *_chosen(settings), "-o", "adapter")


def command(*words: str) -> list[str]:
    """A command line as a block of code in Markdown."""
    return _block([show(shlex.join(words), _LONGEST + 1)])


def typed(checkpoint: Checkpoint) -> str:
    """A name that a person can type: of the Hub, at its commit, or the last part of a path."""
    place = checkpoint.hub
    if place is None:
        return f"./{checkpoint.label}" if checkpoint.label.startswith("-") else checkpoint.label
    return f"hf://{place.id}@{place.commit}/{place.path}" if place.path else f"{place.id}@{place.commit}"


def _weights(plan: Plan) -> list[str] | None:
    """--alpha, --alpha-for, --alpha-layers and --mask; None where they cannot say it, in the same numbers."""
    if len(plan.vector.terms) != 1:
        return None
    ((coefficient, source),) = plan.vector.terms
    mask = [] if not isinstance(source, Masked) else ["--mask", typed(source.masks)]
    source = source.source if isinstance(source, Masked) else source
    if leaf(source) is source:
        return ["--alpha", f"{abs(coefficient)!r}", *mask]
    if not isinstance(source, Scaled) or leaf(source) is not source.source or abs(coefficient) != 1:
        return None
    words = ["--alpha", f"{source.otherwise!r}"]
    words += [word for pattern, value in source.patterns for word in ("--alpha-for", f"{pattern}={value!r}")]
    words += ["--alpha-layers", f"{source.depth.first!r}:{source.depth.last!r}"] if source.depth else []
    return [*words, *mask]


def _edit_in_python(plan: Plan) -> list[str]:
    options = plan.options
    given = [f"out_dtype={options.out_dtype!r}"] if options.out_dtype != "same" else []
    given += [*_sized(options), *_chosen_in_python(options), *([] if options.code else ["code=False"])]
    return _python(plan, "(base + vector).save", '"edited"', *given)


def _extract_in_python(plan: Plan) -> list[str]:
    options = plan.options
    dtype = [f"dtype={options.out_dtype!r}"] if options.out_dtype != "float32" else []
    return _python(plan, "vector.save", '"vector"', "base=base", *dtype, *_sized(options), *_chosen_in_python(options))


def _python(plan: Plan, save: str, *arguments: str) -> list[str]:
    lines = ["import taskvec as tv", "", f"base = tv.Checkpoint.open({typed(plan.base)!r})"]
    for place, (coefficient, source) in enumerate(plan.vector.terms):
        lines.append(f"vector {'+' if place else ''}= {coefficient!r} * {_expression(source, plan.base)}")
    return _block([*lines, f"{save}({', '.join(arguments)})"])


def _expression(source: DeltaSource, base: Checkpoint) -> str:
    """The source as Python; its base by the name `base`."""
    if isinstance(source, Masked):
        return f"{_expression(source.source, base)}.masked({typed(source.masks)!r})"
    if isinstance(source, Selected):
        calls = [f".{verb}({', '.join(map(repr, said))})" for verb, said in _said(source) if said]
        return f"{_expression(source.source, base)}{''.join(calls)}"
    if isinstance(source, Scaled):
        rest = f", otherwise={source.otherwise!r}" if source.otherwise != 1 else ""
        how = f"ramp({source.depth.first!r}, {source.depth.last!r}" if source.depth else f"scaled({dict(source.patterns)!r}"
        return f"{_expression(source.source, base)}.{how}{rest})"
    name, origin = f"{typed(_input(source))!r}", _origin(source)
    named = "base" if origin == base else f"{typed(origin)!r}" if origin is not None else None
    if isinstance(source, FineTune):
        return f"tv.TaskVector.between({named}, {name})"
    if isinstance(source, StoredVector):
        return f"tv.TaskVector.open({name}{', force_base=True' if source.force_base else ''})"
    return f"tv.TaskVector.from_adapter({name}{f', {named}' if named else ''})"


def _said(source: Selected) -> Iterable[tuple[str, tuple[str, ...]]]:
    return ("only", source.only), ("without", source.without)


def _block(lines: Sequence[str]) -> list[str]:
    if sum(map(len, lines)) > _LONGEST:
        return [_TOO_LONG]
    return [f"    {line}" if line else "" for line in lines]


def _chosen(options: Options | Settings) -> Iterable[str]:
    yield from (word for pattern in options.include for word in ("--include", pattern))
    yield from (word for pattern in options.exclude for word in ("--exclude", pattern))


def _sized(options: Options) -> list[str]:
    return [f"max_shard_size={options.max_shard_size!r}"] if options.max_shard_size is not None else []


def _chosen_in_python(options: Options) -> list[str]:
    pairs = (("include", options.include), ("exclude", options.exclude))
    return [f"{what}={list(patterns)!r}" for what, patterns in pairs if patterns]


def _input(source: DeltaSource) -> Checkpoint:
    if isinstance(source, FineTune):
        return source.tuned
    return source.checkpoint if isinstance(source, StoredVector) else source.inputs[0]


def _origin(source: DeltaSource) -> Checkpoint | None:
    """What the input was trained from, if that was said."""
    found = leaf(source)
    return found.origin if isinstance(found, (FineTune, AdapterSource)) else None


def _opened_by_extract(source: DeltaSource, base: Checkpoint) -> bool:
    """Whether it is what `taskvec extract` makes of its arguments."""
    if isinstance(source, FineTune):
        return source.origin == base
    return source.origin is None if isinstance(source, AdapterSource) else isinstance(source, StoredVector)


def _forced(source: DeltaSource) -> bool:
    found = leaf(source)
    return isinstance(found, StoredVector) and found.force_base
