"""What the card of a model says that the card of what is made of it carries over: the YAML at the head of its README.md, as
the Hub defines it. It is read as events: text and lists of text are taken, and nothing that a file names is constructed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import read_bytes
from ..errors import TaskvecError

_DEEPEST = 100  # open collections
_LARGEST_CARD = 4 << 20  # bytes
_LONGEST = 200  # characters of one text: a name or an address
_MOST = 1000  # of a list
_NULLS = ("", "~", "null", "Null", "NULL")


class FrontMatter(NamedTuple):
    """Empty where the card says nothing, or something else than expected."""

    license: str = ""
    license_name: str = ""
    license_link: str = ""
    library_name: str = ""
    pipeline_tag: str = ""
    language: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


def front_matter_of(checkpoint: Checkpoint) -> FrontMatter:
    """That of the README.md beside a checkpoint's files."""
    path = checkpoint.readme
    if path is None:
        return FrontMatter()
    try:
        return front_matter(read_bytes(path, _LARGEST_CARD).decode("utf-8", "replace"))
    except TaskvecError:  # it is too large, or cannot be read; the Hub cannot be reached
        return FrontMatter()


def front_matter(text: str) -> FrontMatter:
    """What stands between the first two `---` lines of a card."""
    import yaml

    begun = text.lstrip("\ufeff").lstrip()
    found = re.match(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", begun, re.DOTALL | re.MULTILINE)
    if found is None:
        return FrontMatter()
    try:
        content = _mapping(yaml.parse(found[1], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except (yaml.YAMLError, ValueError):
        return FrontMatter()
    texts = {key: value for key, value in content.items() if isinstance(value, str)}
    lists = {key: (value,) if isinstance(value, str) else tuple(value) for key, value in content.items()}
    return FrontMatter(
        license=texts.get("license", ""),
        license_name=texts.get("license_name", ""),
        license_link=texts.get("license_link", ""),
        library_name=texts.get("library_name", ""),
        pipeline_tag=texts.get("pipeline_tag", ""),
        language=lists.get("language", ()),
        tags=lists.get("tags", ()),
    )


def _mapping(events: Iterable[Any]) -> Mapping[str, str | list[str]]:
    """key -> text or list of texts, of a document that is one mapping; what else is in it is passed over. Raises ValueError
    for any other document; for an alias, as a few of them can stand for gigabytes; and for depth, of which libyaml takes the
    square."""
    import yaml

    found: dict[str, str | list[str]] = {}
    depth = 0  # open collections
    key: str | None = None  # whose value comes
    held: list[str] | None = None  # the list that is open
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("an alias")
        if isinstance(event, yaml.CollectionStartEvent):
            begins = depth == 0 and isinstance(event, yaml.MappingStartEvent)
            if not begins and key is None:
                raise ValueError("not a mapping of names")
            depth += 1
            if depth > _DEEPEST:
                raise ValueError("too deep")
            held = [] if depth == 2 and isinstance(event, yaml.SequenceStartEvent) and event.tag is None else held
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            if depth == 1 and key is not None:
                if held is not None:
                    found[key] = held
                key = held = None
        elif isinstance(event, yaml.ScalarEvent):
            text = _text(event)
            if depth == 1 and key is None:
                key = event.value
            elif depth == 1 and key is not None:
                if text:
                    found[key] = text
                key = None
            elif depth == 2 and held is not None and text and len(held) < _MOST:
                held.append(text)
            elif depth == 0:
                raise ValueError("not a mapping")
    return found


def _text(event: Any) -> str | None:
    """A scalar as it is written: `no` is Norwegian, not false. None for null, for what has a tag, and for what is no name."""
    plain, _ = event.implicit
    if event.tag is not None or (plain and event.value in _NULLS) or len(event.value) > _LONGEST:
        return None
    return str(event.value)
