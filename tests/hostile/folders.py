"""Folders, links and special files that may not be read as a model: what they are, and what the one line about them says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import taskvec as tv

from ..checkpoint.craft import entry, framed
from .good import (
    FIRST,
    INDEX,
    SECOND,
    Make,
    file,
    files,
    link,
    listening,
    one,
    pipe,
    sparse,
    together,
    with_index,
    with_index_of,
)


class Bad(NamedTuple):
    """How it is made, what is said beside the name `bad`, what is named on the command line, and where it is hostile."""

    make: Make
    words: tuple[str, ...]
    model: str = "bad"
    places: tuple[str, ...] = ("model", "old", "inspect")
    code: int = 1


def elsewhere(shard: object) -> Bad:
    """An index that names a file which is not one beside it; `outside` is there."""
    outside = file(framed({"a": entry()}, bytes(4)), "outside.safetensors")
    shown = shard if isinstance(shard, str) and shard.isprintable() else ""
    words = (INDEX, "tensor a", shown, "expected the name of a .safetensors file beside the index")
    return Bad(together(outside, with_index({"a": shard})), words)


def index(content: bytes | str, *words: str) -> Bad:
    return Bad(with_index_of(content), (INDEX, *words))


def shard(make: Make, *words: str) -> Bad:
    """A folder of two shards, with another thing in place of the second."""
    return Bad(together(with_index({"a": FIRST, "b": SECOND}, FIRST, SECOND), make), words)


def whole(make: Make, *words: str) -> Bad:
    """A file `bad.safetensors`."""
    return Bad(make, ("bad.safetensors", *words), "bad.safetensors")


def vector(story: str, *words: str) -> Bad:
    """A saved task vector whose metadata say this, named where a vector may be."""
    content = framed({"__metadata__": {"taskvec": story}, "w": entry("F32", [1])}, bytes(4))
    return Bad(file(content), ("bad.safetensors", *words), "bad.safetensors", places=("old",))


def retold(*words: str, **changes: object) -> Bad:
    """The same, but made by taskvec, and its metadata changed afterwards."""

    def make(here: Path) -> None:
        tv.extract(here / "model.safetensors", here / "old.safetensors", output=here / "bad.safetensors")
        made = (here / "bad.safetensors").read_bytes()
        end = 8 + int.from_bytes(made[:8], "little")
        header = json.loads(made[8:end])
        header["__metadata__"]["taskvec"] = json.dumps({**json.loads(header["__metadata__"]["taskvec"]), **changes})
        (here / "bad.safetensors").write_bytes(framed(header, made[end:]))

    return Bad(make, ("bad.safetensors", *words), "bad.safetensors", places=("old",))


_BROKEN = "a link to nothing (or to itself)"
_MISSING = ("1 of 2 shards are missing", "Fetch")
_DEEP = '{"weight_map":{"a":"%s"},"x":%s%s}'
_IRREGULAR = "not a regular file"

FOLDERS: dict[str, Bad] = {
    "an index that leads upwards": elsewhere("../outside.safetensors"),
    "an index that leads upwards from below": elsewhere("x/../../outside.safetensors"),
    "an index that leads upwards as on Windows": elsewhere("..\\outside.safetensors"),
    "an index with an absolute name": elsewhere("/etc/passwd"),
    "an index with an absolute name that looks right": elsewhere("/tmp/outside.safetensors"),
    "an index with a drive": elsewhere("C:outside.safetensors"),
    "an index with a network name": elsewhere("\\\\host\\share\\outside.safetensors"),
    "an index with an address": elsewhere("https://example.org/outside.safetensors"),
    "an index of a folder below": elsewhere("below/a.safetensors"),
    "an index of a pickle": elsewhere("pytorch_model.bin"),
    "an index of a hidden file": elsewhere(".hidden.safetensors"),
    "an index of dots": elsewhere("..safetensors"),
    "an index with a NUL": elsewhere("a\0.safetensors"),
    "an index that draws": elsewhere("\x1b[2J.safetensors"),
    "an index read backwards": elsewhere("a\u202e.safetensors"),
    "an index of half a character": elsewhere("\ud800.safetensors"),
    "an index of nothing": elsewhere(""),
    "an index of a number": elsewhere(1),
    "an index of null": elsewhere(None),
    "an index of a list": elsewhere([FIRST]),
    "an index that is cut off": index('{"weight_map": {"a": "model', "not JSON"),
    "an index that is empty": index("", "not JSON"),
    "an index of NULs": index(bytes(4096), "not JSON"),
    "an index that is not UTF-8": index(b'{"weight_map":{"\xff":"x"}}', "not JSON", "utf-8"),
    "an index in UTF-16": index('{"weight_map":{}}'.encode("utf-16"), "not JSON"),
    "an index that is a list": index("[]", "list", "expected an object"),
    "an index that is a pickle": index(b"\x80\x04N.", "not JSON"),
    "an index of lists in each other": index("[" * 10**6, "not JSON", "deep"),
    "an index of objects in each other": index('{"a":' * 10**5 + "1" + "}" * 10**5, "not JSON", "deep"),
    "an index that is deep, and closed": index(_DEEP % (FIRST, "[" * 500, "]" * 500), "not JSON", "deep"),
    "an index with a number of 5000 digits": index('{"weight_map":{"a":%s}}' % ("9" * 5000), "not JSON"),
    "an index without a map": index("{}", "no weight_map"),
    "an index with an empty map": index('{"weight_map":{}}', "no weight_map"),
    "an index with a list for a map": index('{"weight_map":[["a","b"]]}', "no weight_map"),
    "a map without the tensor": Bad(with_index({"x": FIRST}, FIRST), (FIRST, "tensor x")),
    "a map without a tensor of the file": Bad(with_index({"a": FIRST, "b": FIRST}, FIRST), (FIRST, "tensor b")),
    "a tensor in another shard": Bad(with_index({"a": SECOND, "b": FIRST}, FIRST, SECOND), ("tensor a",)),
    "a tensor in two shards": shard(
        file(framed({"a": entry(), "b": entry(begin=4, end=8)}, bytes(8)), f"bad/{SECOND}"), "tensor a"
    ),
    "a missing shard": Bad(with_index({"a": FIRST, "b": SECOND}, FIRST), (INDEX, SECOND, *_MISSING)),
    "a shard that is a link to nothing": shard(link(f"bad/{SECOND}", "gone"), SECOND, *_MISSING),
    "a shard that is a link to itself": shard(link(f"bad/{SECOND}", SECOND), SECOND, *_MISSING),
    "a shard that is a pipe": shard(pipe(f"bad/{SECOND}"), SECOND, _IRREGULAR),
    "a shard that is a socket": shard(listening(f"bad/{SECOND}"), SECOND),
    "a shard that is an endless device": shard(link(f"bad/{SECOND}", "/dev/zero"), SECOND, _IRREGULAR),
    "a shard that is an empty device": shard(link(f"bad/{SECOND}", "/dev/null"), SECOND, _IRREGULAR),
    "a shard that is a full device": shard(link(f"bad/{SECOND}", "/dev/full"), SECOND, _IRREGULAR),
    "a shard that is this process": shard(link(f"bad/{SECOND}", "/proc/self/mem"), SECOND),
    "a shard that is a folder": shard(link(f"bad/{SECOND}", "."), SECOND, _IRREGULAR),
    "a shard that is a secret": shard(
        together(file(b"root:x:0:0:secret", "secret"), link(f"bad/{SECOND}", "../secret")), SECOND, "header of"
    ),
    "an index that is a pipe": Bad(together(with_index({"a": FIRST}, FIRST), pipe(f"bad/{INDEX}")), (INDEX, _IRREGULAR)),
    "an index that is a device": Bad(
        together(with_index({"a": FIRST}, FIRST), link(f"bad/{INDEX}", "/dev/zero")), (INDEX, _IRREGULAR)
    ),
    "an index that is a folder": Bad(together(files({FIRST: one(1)}), files({f"{INDEX}/x": ""})), (INDEX, _IRREGULAR)),
    "an index that is a link to nothing": Bad(
        together(with_index({"a": FIRST}, FIRST), link(f"bad/{INDEX}", "gone")), (INDEX, "No such file")
    ),
    "an index of a gigabyte": Bad(
        together(with_index({"a": FIRST}, FIRST), sparse(f"bad/{INDEX}", 1 << 30)), (INDEX, "1073741824 bytes", "at most")
    ),
    "two indexes": Bad(
        files({f"{name}.safetensors.index.json": "{}" for name in "ab"}),
        ("2 indexes", "a.safetensors.index.json", "expected one"),
    ),
    "one file beside the shards": Bad(
        together(with_index({"a": FIRST}, FIRST), files({"model.safetensors": one(1)})),
        ("model.safetensors lies beside", "Remove"),
    ),
    "one shard and no index": Bad(files({FIRST: one(1)}), (FIRST, "one of 2 shards", "no index", "Fetch")),
    "files that nothing holds together": Bad(
        files({"a.safetensors": one(1), "b.safetensors": one(1)}), ("2 weight files", "no index", "Name the file")
    ),
    "an empty folder": Bad(files({"x/config.json": "{}"}), ("no .safetensors file in it",)),
    "pickles only": Bad(
        files({"pytorch_model.bin": b"\x80\x04N."}), ("only pickles", "pytorch_model.bin", "never opens pickles")
    ),
    "a model inside a model's name": Bad(files({"unet/x.safetensors": one(1)}), ("unet", "Name one of those folders")),
    "an adapter and a model": Bad(
        files({"adapter_config.json": "{}", "adapter_model.safetensors": one(1), "model.safetensors": one(1)}),
        ("both an adapter and a model", "Name the one"),
        places=("old", "inspect"),  # a model is what stands in the first place
    ),
    "a folder that is a link to itself": Bad(link("bad", "bad"), (_BROKEN,)),
    "links in a ring": Bad(together(link("bad", "other"), link("other", "bad")), (_BROKEN,)),
    "a link to nothing": Bad(link("bad", "gone"), (_BROKEN,)),
    "a file that is a pipe": whole(pipe("bad.safetensors"), _IRREGULAR),
    "a file that is an endless device": whole(link("bad.safetensors", "/dev/zero"), _IRREGULAR),
    "a file that is a terminal": whole(link("bad.safetensors", "/dev/ptmx"), "bad.safetensors"),
    "a folder that is called a file": whole(files({"x": ""}, "bad.safetensors"), "no .safetensors file"),
    "a file of a terabyte of nothing": whole(sparse("bad.safetensors", 1 << 40), "header of 0 bytes"),
    "a header of 100 MB of nothing": whole(sparse("bad.safetensors", 1 << 30, (10**8).to_bytes(8, "little")), "begins with"),
    "a header of 100 MB of nothing in braces": whole(
        sparse("bad.safetensors", 1 << 30, (10**8).to_bytes(8, "little") + b"{"), "not JSON"
    ),
    "a pickle": Bad(file(b"\x80\x04N.", "bad.bin"), ("bad.bin", "a pickle", "never opens pickles"), "bad.bin"),
    "a vector whose story is no JSON": vector("{", "metadata", "damaged"),
    "a vector whose story is deep": vector("[" * 10**5, "metadata", "damaged"),
    "a vector whose story is a list": vector("[]", "metadata", "damaged"),
    "a vector of no base": vector('{"kind":"vector"}', "name no base"),
    "a vector of other tensors": retold("not the tensors", tensors_sha256="0"),
    "a vector that adds what it likes": retold("damaged (added)", added={"evil": "w"}),
    "a vector that sets a config": retold(
        "auto_map", "expected at most tie_word_embeddings", config={"auto_map": {"AutoModel": "evil.Model"}}
    ),
    "a vector whose base draws": retold("\\x1b[2J", shapes_sha256="0", base={"name": "\x1b[2J"})._replace(code=3),
}
