"""The files of a model folder that are not weights: which come along to the output, and how config.json changes.

Rule: everything comes along except a deny list, so that a file this version has never heard of is not lost. Never: dot
files, pickles, links that lead out of the model, weights of other frameworks, training state. (Which Python files: code.py.)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from ..errors import CheckpointError, MismatchError, listing, show
from .checkpoint import Checkpoint
from .files import absent, exists, is_folder, names_in, read_bytes, size_of
from .locate import parse_json, read_json

_DENIED_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx",
    ".onnx_data", ".ot", ".tflite", ".nemo", ".mlmodel", ".index.json", ".npz", ".joblib", ".distcp",
)  # fmt: skip
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DENIED_FOLDERS = re.compile(
    r"^(original|onnx|openvino|coreml|gguf|runs|wandb|global_step\d*|checkpoint-\d+|optimizer.*|__pycache__|logs)$"
)
_DENIED_NAMES = re.compile(
    r"^(README\.md|params\.json|consolidated.*|adapter_.*|optimizer.*|scheduler\.pt|rng_state.*|scaler.*"
    r"|trainer_state\.json|training_args\..*|zero_to_fp32\.py|latest|events\.out\.tfevents.*|taskvec\.json)$"
)
_CONFIG = re.compile(r"(.*_)?config(_.*)?\.json|(model_index|modules|special_tokens_map)\.json")
_PLACES = {  # keys of configs that say where what saved it had something
    "_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_name_or_path", "cache_dir", "vocab_file",
    "merges_file", "tokenizer_file", "special_tokens_map_file", "added_tokens_file", "tokenizer_config_file",
}  # fmt: skip
_LARGEST_PLACED = 16 << 20  # bytes
DEEPEST_FOLDERS = 32  # in each other, in a model
_LARGEST_MODULES = 1 << 20  # bytes; a pipeline has a handful of modules
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class SideFile(NamedTuple):
    """A file of the output that is not a weight file. `content` is None when it is copied from `source`."""

    name: str  # relative, with forward slashes
    source: Path
    nbytes: int
    content: bytes | None = None


def side_files(checkpoint: Checkpoint, out_dtype: str | None, changes: Mapping[str, Any]) -> tuple[list[SideFile], list[str]]:
    """What comes along from the model folder, in the order of the names, and notes on what does not.

    `out_dtype` is the dtype of all floats of the output when it is not base's; `changes` are other values of config.json
    that the output changes. It is byte-identical to base's if there are none.
    """
    found: list[SideFile] = []
    notes: list[str] = []
    folder = checkpoint.folder
    if folder is None:
        return found, notes
    if checkpoint.config.get("transformers_weights"):
        raise MismatchError(
            f"{show(folder / 'config.json')}: transformers_weights names the weight file, which the output renames",
            hint="Remove that line from the config",
        )
    modules = _module_folders(folder)
    replaced = {shard.path.name for shard in checkpoint.shards} | {"README.md", "taskvec.json"}
    replaced |= {checkpoint.index.name} if checkpoint.index else set()
    left: list[str] = []
    for name, path in _walk(folder, "", notes, left):
        module_weights = name.endswith(".safetensors") and "/" in name and name.partition("/")[0] in modules
        if not module_weights and _denied(name):
            if "/" in name and name.partition("/")[0] in modules and name.endswith(_PICKLED) and not _has_twin(path):
                notes.append(f"{show(name)}, part of this pipeline, is a pickle: not copied; convert it to safetensors first")
            elif name not in replaced:
                left.append(name)
            continue
        if not _inside(path, folder):
            notes.append(f"{show(name)} is a link out of the model folder: not copied")
            continue
        if module_weights:
            notes.append(f"{show(name)} is copied as it is; to edit it too, subtract that file by itself")
        found.append(SideFile(name, path, size_of(path)))
    if left:
        notes.append(f"not copied, being other weights, training state or the like: {listing(sorted(left))}")
    if out_dtype is not None or changes:
        found = [_changed_config(f, out_dtype, changes) if f.name == "config.json" else f for f in found]
    found = [_without_places(file, notes) if _CONFIG.fullmatch(file.name.rpartition("/")[2]) else file for file in found]
    return found, notes


def _has_twin(pickle: Path) -> bool:
    return any(name.endswith(".safetensors") for name in names_in(pickle.parent))


def _denied(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.lower().endswith(_DENIED_SUFFIXES) or bool(_DENIED_NAMES.match(last)) or bool(_DENIED_FOLDERS.match(last))


def _walk(folder: Path, prefix: str, notes: list[str], left: list[str]) -> Iterator[tuple[str, Path]]:
    if prefix.count("/") > DEEPEST_FOLDERS:
        raise CheckpointError(f"{show(folder)}: more than {DEEPEST_FOLDERS} folders in each other", hint="Remove it")
    for entry in names_in(folder):
        name, path = prefix + entry, folder / entry
        if entry.startswith("."):
            continue
        if is_folder(path) and not path.is_symlink():
            if _DENIED_FOLDERS.match(entry):
                left.append(name + "/")
            else:
                yield from _walk(path, name + "/", notes, left)
        elif absent(path) is not None or os.path.isfile(path):
            yield name, path
        else:
            notes.append(f"{show(name)} is not a regular file: not copied")


def _inside(path: Path, folder: Path) -> bool:
    """Whether a file really lies in the folder, or in the blobs its Hub cache snapshot links to (../../blobs)."""
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return real.is_relative_to(home) or real.is_relative_to(blobs)


def _module_folders(folder: Path) -> set[str]:
    """Sub-folders whose weights are part of the model: the modules of a sentence-transformers pipeline."""
    if not exists(folder / "modules.json"):
        return set()
    try:
        modules = parse_json(read_bytes(folder / "modules.json", _LARGEST_MODULES).decode("utf-8"))
        return {str(module["path"]).partition("/")[0] for module in modules if module.get("path")}
    except (CheckpointError, ValueError, TypeError, AttributeError):
        return set()


def _changed_config(file: SideFile, out_dtype: str | None, changes: Mapping[str, Any]) -> SideFile:
    """config.json of the output; every other value is kept, and so is the order of the keys."""
    config = read_json(file.source)
    if out_dtype in _TORCH_NAMES:
        config.setdefault("torch_dtype" if "torch_dtype" in config else "dtype", None)
        _set_dtype(config, _TORCH_NAMES[out_dtype])
    for part in (config, *(v for k, v in config.items() if k.endswith("_config") and isinstance(v, dict))):
        part.update({key: value for key, value in changes.items() if part is config or key in part})
    return _with_content(file, config)


def _without_places(file: SideFile, notes: list[str]) -> SideFile:
    """Of an absolute path on the machine that saved a config only the last part: loaders set it anew."""
    try:
        content = parse_json((file.content or read_bytes(file.source, _LARGEST_PLACED)).decode("utf-8"))
    except (CheckpointError, ValueError):  # not ours to judge: copied as it is
        return file
    keys = dict.fromkeys(_shorten_places([content]))
    if not keys:
        return file
    notes.append(f"{show(file.name)}: of its {listing(keys)}, an absolute path, only the last part is kept")
    return _with_content(file, content)


def _shorten_places(content: Any) -> Iterator[str]:
    """Change them, at any depth, and yield their keys."""
    for key, value in list(content.items() if isinstance(content, dict) else enumerate(content)):
        if key in _PLACES and _is_place(value):
            content[key] = PureWindowsPath(value).name
            yield key
        elif isinstance(value, (dict, list)):
            yield from _shorten_places(value)


def _is_place(name: object) -> bool:
    return isinstance(name, str) and (
        PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or name.lower().startswith(("~/", "file:"))
    )


def _with_content(file: SideFile, config: Any) -> SideFile:
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    content = text.encode(errors="backslashreplace")  # a lone surrogate is written as its JSON escape again
    return file._replace(content=content, nbytes=len(content))


def _set_dtype(config: dict[str, Any], name: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = name
        elif isinstance(value, dict) and key.endswith("_config"):
            _set_dtype(value, name)
