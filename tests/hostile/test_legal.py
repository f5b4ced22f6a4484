"""What is legal works, however odd: the result is read by safetensors' own library and has the bytes it must have."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ..checkpoint.craft import hub_cache, library_reads
from .conftest import Command, Told, everything
from .good import FIRST, INDEX, SECOND
from .legal import BASE, EDITED, LEGAL, OLD, Tricky, content


def expected(tricky: Tricky) -> dict[str, tuple[str, list[int], bytes]]:
    return {name: (dtype, shape, content(dtype, shape, EDITED)) for name, (dtype, shape) in tricky.tensors.items()}


def expect_success(told: Told) -> None:
    assert told.code == 0, told.err
    assert all(line.isprintable() for line in (told.out + told.err).splitlines()), "it may draw on the terminal"
    assert all(len(line) < 3000 for line in (told.out + told.err).split("\n"))


@pytest.mark.parametrize("case", LEGAL)
def test_a_tricky_file_is_edited_like_any_other(case: str, taskvec: Command, here: Path) -> None:
    tricky = LEGAL[case]
    (here / "m.safetensors").write_bytes(tricky.file(BASE))
    (here / "o.safetensors").write_bytes(tricky.file(OLD))
    assert library_reads((here / "m.safetensors").read_bytes()) is not None, "not legal"
    expect_success(taskvec("subtract", "m.safetensors", "o.safetensors", "-a", "1", "-o", "out.safetensors"))
    assert library_reads((here / "out.safetensors").read_bytes()) == expected(tricky)


@pytest.mark.parametrize("case", sorted(LEGAL.keys() - {"a header just under the limit"}))
@pytest.mark.parametrize("verb", ["inspect", "diff"])
def test_a_tricky_file_can_be_looked_at(verb: str, case: str, taskvec: Command, here: Path) -> None:
    tricky = LEGAL[case]
    (here / "m.safetensors").write_bytes(tricky.file(BASE))
    (here / "o.safetensors").write_bytes(tricky.file(OLD))
    inputs = ("m.safetensors", "o.safetensors") if verb == "diff" else ("m.safetensors",)
    told = taskvec(verb, *inputs)
    assert told.code in ((0, 3) if verb == "diff" else (0,)), told.err
    assert all(line.isprintable() for line in (told.out + told.err).splitlines())
    told = taskvec(verb, *inputs, "--json")
    assert isinstance(json.loads(told.out), dict) and told.out.isascii()


# --- where files lie --------------------------------------------------------------------------------------------------

A, B = Tricky({"a": ("F32", [2])}), Tricky({"b": ("BF16", [3])})


def index() -> str:
    return json.dumps({"metadata": {"total_size": "wrong", "x": None}, "weight_map": {"b": SECOND, "a": FIRST}, "x": []})


def contents(which: int) -> dict[str, bytes]:
    return {FIRST: A.file(which), SECOND: B.file(which), INDEX: index().encode()}


def put(folder: Path, which: int) -> Path:
    folder.mkdir(parents=True)
    for name, raw in contents(which).items():
        (folder / name).write_bytes(raw)
    return folder


def in_a_hub_cache(here: Path, which: int) -> str:
    found = hub_cache(here / f"cache{which}", contents(which))
    (found / "refs").symlink_to("../../refs")  # to nothing
    return str(found.relative_to(here))


def by_links_to_elsewhere(here: Path, which: int) -> str:
    real = put(here / "elsewhere" / str(which), which)
    folder = here / f"links{which}"
    folder.mkdir()
    for name in contents(which):
        (folder / name).symlink_to(real / name)
    return folder.name


def by_links_to_links(here: Path, which: int) -> str:
    put(here / f"real{which}", which)
    for at in range(8):
        (here / f"link{which}.{at}").symlink_to(f"link{which}.{at - 1}" if at else f"real{which}")
    return f"link{which}.7"


def below_a_name_that_draws(here: Path, which: int) -> str:
    return str(put(here / f"\x1b[2J\u202e[red]{which}\n", which).relative_to(here))


def in_a_deep_folder(here: Path, which: int) -> str:
    return str(put(here.joinpath(*["d" * 100] * 8, str(which)), which).relative_to(here))


def with_a_stranger_beside(here: Path, which: int) -> str:
    folder = put(here / f"strangers{which}", which)
    os.mkfifo(folder / "pipe.json")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "passwd.json").symlink_to("/etc/passwd")
    (folder / "zero.json").symlink_to("/dev/zero")
    (folder / "up").symlink_to("..")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    (folder / ".env").write_text("HF_TOKEN=secret")
    (folder / "sub").mkdir()
    (folder / "sub" / "again").symlink_to("..")
    return folder.name


def that_nobody_may_write(here: Path, which: int) -> str:
    folder = put(here / f"locked{which}", which)
    for name in contents(which):
        (folder / name).chmod(0o444)
    return folder.name


def by_hard_links(here: Path, which: int) -> str:
    put(here / f"one{which}", which)
    folder = here / f"other{which}"
    folder.mkdir()
    for name in contents(which):
        os.link(here / f"one{which}" / name, folder / name)
    return folder.name


def with_an_empty_shard(here: Path, which: int) -> str:
    folder = put(here / f"empty{which}", which)
    (folder / "model-00003-of-00003.safetensors").write_bytes(Tricky({}).file(which))
    return folder.name


PLACES: list[Callable[[Path, int], str]] = [
    in_a_hub_cache, by_links_to_elsewhere, by_links_to_links, below_a_name_that_draws, in_a_deep_folder,
    with_a_stranger_beside, that_nobody_may_write, by_hard_links, with_an_empty_shard,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_model_is_read_wherever_its_files_lie(place: Callable[[Path, int], str], taskvec: Command, here: Path) -> None:
    model, old = place(here, BASE), place(here, OLD)
    expect_success(taskvec("subtract", model, old, "-a", "1", "-o", "out"))
    assert library_reads((here / "out" / FIRST).read_bytes()) == expected(A)
    assert library_reads((here / "out" / SECOND).read_bytes()) == expected(B)
    left = everything(here / "out")
    assert not any(mode & 0o170000 == 0o120000 for mode, *_ in left.values()), "a link in the output"
    assert not any(b"secret" in raw or b"root:" in raw or raw[:2] == b"\x80\x04" for *_, raw in left.values())


@pytest.mark.parametrize(
    "name", ["\x1b[2J\u202e\n.safetensors", "-a.safetensors", "*.safetensors", " .safetensors", "[red]é"]
)
def test_an_output_may_have_any_name(name: str, taskvec: Command, here: Path) -> None:
    expect_success(taskvec("subtract", "model.safetensors", "old.safetensors", "-a", "1", f"--output={name}"))
    assert (here / name).exists()


def test_a_model_without_itself_is_itself(taskvec: Command, here: Path) -> None:
    (here / "link.safetensors").symlink_to("model.safetensors")
    for at, name in enumerate(("model.safetensors", str(here / "model.safetensors"), "link.safetensors")):
        expect_success(taskvec("subtract", "model.safetensors", name, "-a", "1", "-o", f"out{at}.safetensors"))
        made = library_reads((here / f"out{at}.safetensors").read_bytes())
        assert made == library_reads((here / "model.safetensors").read_bytes())
