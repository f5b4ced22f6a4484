"""The files of an output folder that are no weight files: whether they are those that were written, whether the index says
what the shards say, and whether something lies there that a loader would take with the model, or in its place.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import exists, is_folder, names_in
from ..checkpoint.folder import DEEPEST_FOLDERS
from ..checkpoint.locate import read_json
from ..errors import CheckpointError, listing, show
from .output import RECORD
from .record import CARD, FORMAT, SEAL, hashed, index, index_name, sealed, small_files

_IN_PLACE = re.compile(  # weights that some loader prefers to ours, or takes for those of the model
    r"(pytorch_|tf_|flax_|rust_|adapter_|diffusion_pytorch_)?model[\w.-]*\.(bin|pt|pth|ckpt|h5|msgpack|ot|onnx)"
    r"|consolidated.*|adapter_config\.json|.*\.gguf|.*\.index\.json",
    re.IGNORECASE,
)
_ALONG = re.compile(  # what is read with any weights: configs, tokenizers, templates, code
    r"((generation|tokenizer|audio_tokenizer|quantize|quant|hf_quant|sentence_bert)_)?config\.json"
    r"|((video_|image_)?p(rep)?rocessor_config|config_sentence_transformers|tokenizer|special_tokens_map|added_tokens)\.json"
    r"|(vocab|merges|chat_template|params|tekken|modules|model_index)\.json|(vocab|merges)\.txt"
    r"|.*\.(model|tiktoken|py)|chat_template.*\.jinja|additional_chat_templates/.*|custom_generate/.*"
)


class SideFindings(NamedTuple):
    """`noted`: what is no fault of the output, or could not be checked."""

    checks: list[str]
    problems: list[str]
    noted: list[str]


def check_side(checkpoint: Checkpoint, content: dict[str, Any], beside: bool) -> SideFindings:
    """Everything in the folder of an output but its weights; `beside`: also what is not of the output."""
    folder = checkpoint.folder
    if folder is None:
        return SideFindings([], [], [])
    problems, noted = [], []
    old = content.get("format") == 1 and not {SEAL, "files"} & content.keys()
    if not old and (content.get("format") != FORMAT or content.get(SEAL) != sealed(content)[SEAL]):
        problems.append(f"{RECORD}: is not the record that was written: it was edited")
    if old:
        noted.append(f"contents of side files: {RECORD} is of an older taskvec and has no checksums of them")
    expected = {str(entry["name"]): (int(entry["bytes"]), str(entry["sha256"])) for entry in content.get("files") or []}
    own = dict.fromkeys([*small_files(content), *expected])
    for name in own:
        fault = _fault(folder, name, expected.get(name))
        if fault is None and not old and name not in expected and exists(folder / name):
            fault = "the record has no checksum of it"
        if fault and name == CARD:
            noted.append(f"{CARD}: {fault}, as people may")
        elif fault:
            problems.append(f"{show(name)}: {fault}")
    problems += _index_faults(checkpoint, content)
    if beside:
        problems += intruders(folder, content)
        noted += [f"{show(name)}: not of this output" for name in _foreign(folder, own) if not _is_taken(name, own)]
    present = [name for name in own if exists(folder / name)]
    return SideFindings([f"side files: {listing(present) or 'none'}"], problems, noted)


def intruders(folder: Path, content: dict[str, Any]) -> list[str]:
    """Files that are not of the output of this record, and that a loader of its folder would take."""
    listed = [str(entry["name"]) for entry in content.get("files") or []]
    own = dict.fromkeys([*small_files(content), *listed])
    taken = (name for name in _foreign(folder, own) if _is_taken(name, own))
    return [f"{show(name)}: not of this output, and loaders would take it: remove it" for name in taken]


def _is_taken(name: str, own: Iterable[str]) -> bool:
    """`own`: a linked folder in which files of the output should be is taken for theirs."""
    if name.endswith("/") and any(file.startswith(name) for file in own):
        return True
    return bool(_IN_PLACE.fullmatch(name) or _ALONG.fullmatch(name))


def _fault(folder: Path, name: str, expected: tuple[int, str] | None) -> str | None:
    if ".." in Path(name).parts or Path(name).is_absolute():
        return "a name of the record that leads out of the folder"
    if not exists(folder / name):
        return "missing" if name != CARD or expected else None
    if expected is None:
        return None
    try:
        nbytes, sha256 = hashed(folder / name)
    except CheckpointError as error:
        return f"cannot be read: {error}"
    if nbytes != expected[0]:
        return f"{nbytes} bytes, expected {show(expected[0])}: it was changed"
    return None if sha256 == expected[1] else f"SHA-256 {sha256}, expected {expected[1]}: it was changed"


def _index_faults(checkpoint: Checkpoint, content: dict[str, Any]) -> Iterator[str]:
    """What the index says other than the headers of the shards."""
    name = index_name(content)
    if checkpoint.folder is None or name is None or not exists(checkpoint.folder / name):
        return
    found = read_json(checkpoint.folder / name)
    tensors = checkpoint.tensors
    weight_map = {tensor: stored.path.name for tensor, stored in tensors.items()}
    expected = index(weight_map, sum(stored.elements for stored in tensors.values()), checkpoint.nbytes)
    if found.get("weight_map") != expected["weight_map"]:
        yield f"{show(name)}: its weight_map is not that of the shards"
    elif found != expected:
        yield f"{show(name)}: metadata {show(found.get('metadata'))}, expected {show(expected['metadata'])}"


def _foreign(folder: Path, own: Collection[str], prefix: str = "") -> Iterator[str]:
    """What is in the folder and not of the output, hidden things left out: no loader takes those. Of a folder that is a
    link, or deeper than those of any model, the name alone: where it leads is not the output's."""
    for entry in names_in(folder):
        name = prefix + entry
        if entry.startswith(".") or name in own or name == RECORD:
            continue
        if is_folder(folder / entry):
            if (folder / entry).is_symlink() or prefix.count("/") >= DEEPEST_FOLDERS:
                yield name + "/"
            else:
                yield from _foreign(folder / entry, own, name + "/")
        elif prefix or not entry.endswith(".safetensors"):  # of those it is said elsewhere
            yield name
