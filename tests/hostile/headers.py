"""Files that no reader of the format may accept: what they are, and what the one line about them says."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from typing import NamedTuple

from ..checkpoint.craft import entry, framed

FOUR = bytes(4)
SEVEN_ZEROS = b"\0" * 7


class Bad(NamedTuple):
    """The bytes of a file, and what is said of it beside its name."""

    content: bytes
    words: tuple[str, ...]


def tensors(data: bytes = FOUR, **entries: object) -> bytes:
    return framed(json.dumps(entries), data)


def shaped(shape: str, offsets: str = "[0,4]") -> bytes:
    """One tensor w, its numbers as they stand: for what json.dumps would not write."""
    return framed(f'{{"w":{{"dtype":"U8","shape":{shape},"data_offsets":{offsets}}}}}', FOUR)


def named(name: str) -> bytes:
    """A tensor of that name and of a dtype that does not exist."""
    return tensors(**{name: entry("X1")})


def archive() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as out:
        out.writestr("archive/data.pkl", pickle.dumps({"w": 1}, protocol=2))
    return made.getvalue()


class Exploit:
    """Pickles to what makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return __import__("os").mkdir, ("pwned",)


_ENTRY = '"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
_NUMBERS = "expected lists of whole numbers"
_JSON = "not JSON"
_LARGE = "is larger than any machine"

HEADERS: dict[str, Bad] = {
    "nothing": Bad(b"", ("0 bytes", "at least the 8")),
    "seven bytes": Bad(SEVEN_ZEROS, ("7 bytes", "at least the 8")),
    "only zeros": Bad(bytes(4096), ("header of 0 bytes", "at least 2")),
    "a length of 16 exabytes": Bad(b"\xff" * 8 + b"{}", ("18446744073709551615", "at most 100000000")),
    "a length that is negative when signed": Bad(struct.pack("<Q", 1 << 63) + b"{}", ("9223372036854775808",)),
    "a length one above the limit": Bad(struct.pack("<Q", 100_000_001) + b"{}", ("100000001", "at most 100000000")),
    "a length past the end": Bad(framed("{}", length=99), ("header of 99 bytes", "only 2 bytes follow")),
    "a million lists in each other": Bad(framed('{"w":' + "[" * 10**6), ("nests too deeply",)),
    "closed lists in each other": Bad(framed('{"w":' + "[" * 10**5 + "]" * 10**5 + "}"), ("nests too deeply",)),
    "objects in each other": Bad(framed('{"w":' * 10**5 + "1" + "}" * 10**5), ("nests too deeply",)),
    "a list that is too deep for safetensors": Bad(framed('{"w":' + "[" * 150 + "]" * 150 + "}"), ("tensor w", "fields")),
    "a name twice": Bad(framed(f"{{{_ENTRY},{_ENTRY}}}", FOUR), ("tensor w", "occurs twice")),
    "a name twice, once escaped": Bad(
        framed("{" + _ENTRY + "," + _ENTRY.replace('"w"', '"\\u0077"') + "}", FOUR), ("tensor w", "occurs twice")
    ),
    "a field twice": Bad(framed('{"w":{"dtype":"U8",' + _ENTRY[5:] + "}", FOUR), ("tensor w", "dtype", "occurs twice")),
    "two tensors that overlap": Bad(
        tensors(bytes(6), v=entry(end=4), w=entry(begin=2, end=6)), ("tensor w", "byte 2", "expected 4", "overlaps")
    ),
    "two tensors in one place": Bad(tensors(v=entry(), w=entry()), ("tensor w", "byte 0", "expected 4", "overlaps")),
    "a hole": Bad(tensors(bytes(9), v=entry(), w=entry(begin=5, end=9)), ("tensor w", "byte 5", "expected 4", "hole")),
    "a hole at the start": Bad(tensors(bytes(5), w=entry(begin=1, end=5)), ("tensor w", "byte 1", "expected 0", "hole")),
    "bytes after the last tensor": Bad(tensors(bytes(7), w=entry()), ("3 bytes follow", "expected none")),
    "data cut off": Bad(tensors(bytes(3), w=entry()), ("tensor w", "[0, 4]", "data is 3 bytes")),
    "no data at all": Bad(tensors(b"", w=entry()), ("tensor w", "data is 0 bytes")),
    "offsets that run backwards": Bad(shaped("[4]", "[4,0]"), ("tensor w", "[4, 0]")),
    "a negative offset": Bad(shaped("[4]", "[-4,0]"), ("tensor w", "[-4", _NUMBERS)),
    "an offset above 2**64": Bad(shaped("[4]", "[18446744073709551616,18446744073709551620]"), ("tensor w", "4 bytes")),
    "a petabyte": Bad(shaped("[1000000000000000]", "[0,1000000000000000]"), ("tensor w", "1000000000000000", "4 bytes")),
    "a negative dimension": Bad(shaped("[-4]"), ("tensor w", "[-4", _NUMBERS)),
    "negative dimensions whose product is right": Bad(shaped("[-2,-2]"), ("tensor w", _NUMBERS)),
    "dimensions whose product wraps to 0": Bad(shaped("[4294967296,4294967296]"), ("tensor w", "4294967296", _LARGE)),
    "dimensions whose product wraps to 4": Bad(shaped("[4611686018427387905,4]"), ("tensor w", _LARGE)),
    "bits that wrap": Bad(shaped("[2305843009213693952]"), ("tensor w", "2305843009213693952")),
    "a zero before what is too large": Bad(tensors(b"", w=entry(shape=[0, 2**64 - 1, 2], end=0)), ("tensor w", _LARGE)),
    "a number of 5000 digits": Bad(shaped("[%s]" % ("9" * 5000)), (_JSON,)),
    "NaN for a dimension": Bad(shaped("[NaN]"), ("tensor w", "nan", _NUMBERS)),
    "Infinity for an offset": Bad(shaped("[4]", "[0,Infinity]"), ("tensor w", "inf", _NUMBERS)),
    "true for a dimension": Bad(shaped("[4,true]"), ("tensor w", "True", _NUMBERS)),
    "a fraction": Bad(shaped("[4.0]"), ("tensor w", "[4.0]", _NUMBERS)),
    "an exponent": Bad(shaped("[4e0]"), ("tensor w", _NUMBERS)),
    "minus zero": Bad(shaped("[4]", "[-0,4]"), ("tensor w", _NUMBERS)),
    "a million dimensions too many bytes": Bad(shaped("[%s2]" % ("2," * 10**5)), ("tensor w", _LARGE)),
    "bytes that are not UTF-8": Bad(framed(b'{"\xff":1}'), ("not UTF-8", "byte 2")),
    "an overlong NUL": Bad(framed(b'{"\xc0\x80":1}'), ("not UTF-8",)),
    "UTF-16": Bad(framed("{}".encode("utf-16-le")), (_JSON,)),
    "a byte order mark": Bad(framed(b"\xef\xbb\xbf{}"), ("begins with",)),
    "half a character": Bad(framed('{"\\ud83e":' + _ENTRY[4:] + "}", FOUR), ("\\ud83e", "surrogate")),
    "half a character in the metadata": Bad(framed('{"__metadata__":{"k":"\\ud83e"}}'), ("surrogate",)),
    "a blank before the brace": Bad(framed(" {}"), ("begins with", "expected '{'")),
    "NUL padding": Bad(framed(b"{}\0\0\0\0\0\0"), (_JSON,)),
    "a second object": Bad(framed("{}{}"), (_JSON,)),
    "a list for a header": Bad(framed("[]"), ("begins with b'['",)),
    "an unknown dtype": Bad(tensors(w=entry("F33")), ("tensor w", "F33", "expected one of F4")),
    "a dtype that draws": Bad(tensors(w=entry("\x1b[2J\x1b]0;owned\x07")), ("tensor w", "\\x1b[2J")),
    "a list for a dtype": Bad(tensors(w={**entry(), "dtype": ["U8"]}), ("tensor w", "['U8']")),
    "half a byte": Bad(tensors(bytes(2), w=entry("F4", [3], 0, 2)), ("tensor w", "F4 [3]", "whole bytes")),
    "fewer bytes than the shape": Bad(tensors(w=entry(shape=[5])), ("tensor w", "takes 5 bytes", "span 4")),
    "an unknown field": Bad(tensors(w={**entry(), "strides": [1]}), ("tensor w", "exactly the fields")),
    "a tensor called __metadata__": Bad(tensors(__metadata__=entry()), ("__metadata__", "text to text")),
    "null for metadata": Bad(framed('{"__metadata__":null}'), ("__metadata__", "text to text")),
    "a number in the metadata": Bad(framed('{"__metadata__":{"step":3}}'), ("__metadata__", "text to text")),
    "a key of the metadata twice": Bad(framed('{"__metadata__":{"k":"1","k":"2"}}'), ("__metadata__", "k twice")),
    "a name that clears the screen": Bad(named("\x1b[2J\x1b[1;31mw"), ("tensor \\x1b[2J",)),
    "a name that is read backwards": Bad(named("w\u202egnp.exe"), ("tensor w\\u202egnp.exe",)),
    "a name in isolates": Bad(named("\u2066w\u2069"), ("tensor \\u2066w\\u2069",)),
    "a name with C1 controls": Bad(named("w\x9b2J\x85"), ("tensor w\\x9b2J\\x85",)),
    "a name of rich markup": Bad(named("[/red][bold]:smile:[link=file:///etc]"), ("tensor [/red][bold]:smile:[link=",)),
    "a name of two lines": Bad(named("w\ntaskvec: done"), ("tensor w\\ntaskvec: done",)),
    "a name of line separators": Bad(named("w\u2028x\u2029\x0b\x0c"), ("tensor w\\u2028x\\u2029\\x0b\\x0c",)),
    "a name with a NUL": Bad(named("w\0x"), ("tensor w\\x00x",)),
    "a name of a million characters": Bad(named("w" * 10**6), ("tensor www", "…")),
    "a name of a million escapes": Bad(named("\x1b" * 10**6), ("tensor \\x1b", "…")),
    "a pickle in an archive": Bad(archive(), ("pickle", "never opens pickles", "convert")),
    "a pickle that runs a command": Bad(pickle.dumps(Exploit(), protocol=4), ("pickle", "never opens pickles")),
    "a pickle in text": Bad(pickle.dumps(Exploit(), protocol=0), ("header of",)),
    "a GGUF file": Bad(b"GGUF\x03\0\0\0" + bytes(64), ("header of",)),
    "a page of a proxy": Bad(b"<!DOCTYPE html><html>404</html>", ("header of",)),
    "a pointer of Git LFS": Bad(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", ("header of",)),
}
