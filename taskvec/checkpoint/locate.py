"""From what the user typed to the files of a checkpoint or an adapter on disk. Names are checked before anything opens.

A model folder holds `X.safetensors.index.json` and its shards, or one `.safetensors` file; an adapter folder holds
`adapter_config.json` and `adapter_model.safetensors` (the PEFT layout), or is a file like any other, known by its tensors'
names. A name on the Hub is where its files are, or will be, in the Hub's own cache; a local path that exists comes first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from ..errors import CheckpointError, UsageError, listing, show
from .files import exists, is_folder, names_in, os_failure, read_bytes
from .header import read_header
from .repository import is_hub_name, open_repository

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_MODEL, _MODEL_INDEX = "model.safetensors", "model" + _INDEX_SUFFIX  # what transformers looks for
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_FACTORS = re.compile(  # what adapters of kohya, LyCORIS, diffusers and PEFT are made of
    r"\.(lora_(down|up|mid|A|B)(\.default)?\.weight|lora_embedding_[AB]|lora_magnitude_vector(\.weight)?|dora_scale"
    r"|(lora|lora_linear_layer|to_(q|k|v|out)_lora)\.(down|up)\.weight|hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?"
    r"|oft_(blocks|diag)|glora_[ab][12]\.weight)$"
)
LARGEST_CONFIG = 32 << 20  # bytes; a config has a few kB, an adapter's with a rank for every expert about 1 MB
_LARGEST_JSON = 256 << 20  # bytes; the index of a model with a million tensors is about 100 MB
_DEEPEST_JSON = 100  # objects and lists in each other; far less than what makes Python's own functions fail


class Location(NamedTuple):
    """Where a checkpoint lies. `folder` is None when the user named a file: a file is only its weights."""

    path: Path
    folder: Path | None
    shards: list[Path]
    index_file: Path | None
    weight_map: dict[str, str] | None


def locate(source: str | os.PathLike[str]) -> Location:
    """The weight files of `source`, a `.safetensors` file or a model folder.

    Raises CheckpointError when there is none, or more than one candidate.
    """
    path = existing(source)
    if is_folder(path):
        return _locate_folder(path)
    _refuse_pickle(path)
    return Location(path, None, [path], None, None)


def locate_adapter(source: str | os.PathLike[str]) -> Path | None:
    """The adapter that `source` is: a PEFT folder (or the weight file inside one), or a file, or a folder with only that
    file, most of whose tensors have the names of an adapter's factors. None if it is none.

    Raises CheckpointError when the file cannot be read.
    """
    return locate_peft(source) or _locate_single(existing(source))


def locate_peft(source: str | os.PathLike[str]) -> Path | None:
    """The folder of a PEFT adapter if `source` is one (or is the weight file inside one), else None."""
    path = existing(source)
    folder = path if is_folder(path) else path.parent
    if not is_folder(path) and path.name != ADAPTER_WEIGHTS:
        return None
    if not any(exists(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
        return None
    rivals = [n for n in (_MODEL, _MODEL_INDEX) if exists(folder / n)]
    if rivals and is_folder(path):
        raise CheckpointError(
            f"{show(path)}: holds both an adapter and a model ({listing(rivals)})",
            hint=f"Name the one you mean: {ADAPTER_WEIGHTS} or {rivals[0]}",
        )
    return folder


def _locate_single(path: Path) -> Path | None:
    files = [path]
    if is_folder(path):
        try:
            names = names_in(path)
        except OSError:  # opening it says why
            return None
        files = [path / name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
        if any(name.endswith(_INDEX_SUFFIX) for name in names):
            return None
    if len(files) != 1 or files[0].suffix in _PICKLES:
        return None
    return path if _is_adapter([tensor.name for tensor in read_header(files[0]).tensors]) else None


def _is_adapter(names: list[str]) -> bool:
    """Whether most of the names are factors'. A model that keeps adapters of its own is a model: it has the weights that
    they are added to, which PEFT calls base_layer."""
    factors = sum(1 for name in names if _FACTORS.search(name))
    return 0 < len(names) <= 2 * factors and not any(name.endswith(".base_layer.weight") for name in names)


def existing(source: str | os.PathLike[str]) -> Path:
    """The path that was typed. Raises CheckpointError when there is nothing, or it may not be looked at."""
    typed = os.path.expanduser(source)  # not Path's own: that one raises for a ~user unknown here
    try:
        os.stat(typed)
    except (OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise os_failure(error, source, "cannot open") from error
        if os.path.islink(typed):
            raise CheckpointError(f"{show(source)}: a link to nothing (or to itself)") from error
        if isinstance(source, str) and is_hub_name(source):
            return open_repository(source)
        if typed and exists(Path(typed)):  # of a repository whose files are not here yet
            return Path(typed)
        raise CheckpointError(
            f"{show(source)}: no such file or folder",
            hint="Name a .safetensors file, a model folder or an adapter folder",
        ) from error
    return Path(typed)


def on_hub(source: str | os.PathLike[str], revision: str | None, token: str | None) -> str | os.PathLike[str]:
    """`source` at a revision or with a token of the Hub. Raises UsageError for a revision of what is a local path."""
    typed = os.fspath(source)
    if os.path.lexists(os.path.expanduser(typed)) or not is_hub_name(typed):
        if revision is not None:
            raise UsageError(f"{show(source)}: revision {show(revision)} of what is no name on the Hub")
        return source
    return open_repository(typed, revision=revision, token=token)


def read_json(path: Path, limit: int = _LARGEST_JSON) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes. Raises CheckpointError naming the file otherwise."""
    try:
        content = parse_json(read_bytes(path, limit).decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{show(path)}: not JSON ({show(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{show(path)}: found a JSON {type(content).__name__}, expected an object")
    return content


def parse_json(text: str) -> Any:
    """What a JSON text holds. Raises ValueError when it is not JSON, or nests so deeply that walking it could fail."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("nests too deeply") from error
    level = [content]
    for _ in range(_DEEPEST_JSON):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return content
    raise ValueError(f"nests more than {_DEEPEST_JSON} deep")


def _inside(content: Any) -> Iterable[Any]:
    if isinstance(content, dict):
        return content.values()
    return content if isinstance(content, list) else ()


def _refuse_pickle(path: Path) -> None:
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{show(path)}: a pickle, expected .safetensors",
            hint="taskvec never opens pickles; convert it to safetensors first",
        )


def _locate_folder(folder: Path) -> Location:
    try:
        names = names_in(folder)
    except OSError as error:
        raise os_failure(error, folder, "cannot list") from error
    indexes = [name for name in names if name.endswith(_INDEX_SUFFIX) and not name.startswith(".")]
    files = [n for n in names if n.endswith(".safetensors") and not n.startswith(".") and n != ADAPTER_WEIGHTS]
    if _MODEL in files or _MODEL_INDEX in indexes:  # another index is of another copy, like Mistral's consolidated-*
        indexes = [name for name in indexes if name == _MODEL_INDEX]
    if len(indexes) > 1:
        raise CheckpointError(f"{show(folder)}: {len(indexes)} indexes ({listing(indexes)}), expected one")
    if indexes:
        return _locate_sharded(folder, folder / indexes[0], files)
    if len(files) == 1 and (part := re.search(r"-\d{5}-of-(\d{5})\.safetensors$", files[0])) and int(part[1]) > 1:
        raise CheckpointError(
            f"{show(folder)}: {show(files[0])} is one of {int(part[1])} shards, and there is no index", hint="Fetch the rest"
        )
    if _MODEL in files or len(files) == 1:
        path = folder / (_MODEL if _MODEL in files else files[0])
        return Location(folder, folder, [path], None, None)
    if files:
        raise CheckpointError(
            f"{show(folder)}: {len(files)} weight files ({listing(files)}) and no index", hint="Name the file you mean"
        )
    raise CheckpointError(f"{show(folder)}: {_found_instead(folder, names)}")


def _found_instead(folder: Path, names: list[str]) -> str:
    """What a folder without weights holds, and what to do about it."""
    pickles = [name for name in names if Path(name).suffix in _PICKLES]
    below = [name for name in names if is_folder(folder / name) and _holds_weights(folder / name)]
    if ADAPTER_WEIGHTS in names or ADAPTER_CONFIG in names:
        return "an adapter, expected a model here. Name the model first, then the adapter"
    if pickles:
        return f"only pickles ({listing(pickles)}), expected safetensors. taskvec never opens pickles; convert them first"
    if below:
        return f"no .safetensors file, but some in {listing(below)}. Name one of those folders"
    return "no .safetensors file in it. Name a model folder, a .safetensors file or an adapter folder"


def _holds_weights(folder: Path) -> bool:
    return any(name.endswith(".safetensors") for name in names_in(folder))


def _locate_sharded(folder: Path, index: Path, files: list[str]) -> Location:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{show(index)}: no weight_map")
    shards: dict[str, None] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise CheckpointError(
                f"{show(index)}: tensor {show(tensor)} is in {show(shard)}, expected the name of a .safetensors file "
                "beside the index"
            )
        shards[shard] = None
    stray = index.name.removesuffix(_INDEX_SUFFIX) + ".safetensors"
    if stray in files and stray not in shards:
        raise CheckpointError(
            f"{show(folder)}: {stray} lies beside {index.name}; transformers would load it in place of the shards",
            hint=f"Remove the stale one, or name the file itself: {show(folder / stray)}",
        )
    missing = [name for name in shards if not exists(folder / name)]
    if missing:
        raise CheckpointError(
            f"{show(index)}: {len(missing)} of {len(shards)} shards are missing ({listing(missing)})",
            hint="Fetch them again",
        )
    return Location(folder, folder, [folder / name for name in sorted(shards)], index, weight_map)


def _is_plain_name(shard: str) -> bool:
    parsed = PureWindowsPath(shard)  # the stricter reading on every system: no drive, no root, no separator
    return (
        shard.endswith(".safetensors")
        and len(parsed.parts) == 1
        and not parsed.drive
        and not parsed.root
        and shard.isprintable()
        and not shard.startswith(".")
    )
