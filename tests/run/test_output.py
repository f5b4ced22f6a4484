"""The output is refused before a byte is written, or it is there whole: never a part of it, never over anything else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import taskvec as tv
from taskvec.checkpoint import files
from taskvec.checkpoint.folder import SideFile
from taskvec.run import output
from taskvec.run.output import Target, check_space, check_target
from taskvec.run.staging import Staging

from .checkpoints import write_file, write_model

TENSORS = {"a.w": torch.arange(6.0).reshape(2, 3), "b.w": torch.ones(4)}
TUNED = {"a.w": torch.ones(2, 3), "b.w": torch.zeros(4)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `base`, `old` and the file `base.safetensors` in it."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base", TENSORS)
    write_model(tmp_path / "old", TUNED)
    write_file(tmp_path / "base.safetensors", TENSORS)
    return tmp_path


def run(output: str, base: str = "base", **options: object) -> tv.Report:
    return tv.subtract(base, "old", alpha=1, output=output, fsync=False, **options)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(output: str, here: Path, **options: object) -> tv.OutputError:
    """The error, after checking that nothing was made, changed or removed by it."""
    before, names = contents(here), sorted(os.listdir(here))
    with pytest.raises(tv.OutputError) as caught:
        run(output, **options)
    assert contents(here) == before and sorted(os.listdir(here)) == names
    return caught.value


# --- where an output may not be ---------------------------------------------------------------------------------------


def _link_to(target: str, name: str = "link") -> Callable[[Path], None]:
    return lambda here: (here / name).symlink_to(target)


def _nothing(here: Path) -> None:
    pass


OVERLAPS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "the base": ("base", _nothing),
    "the tuned model": ("old", _nothing),
    "the base, written otherwise": ("old/../base/", _nothing),
    "inside the base": ("base/edited", _nothing),
    "deep inside the base": ("base/a/b/c", _nothing),
    "around the inputs": (".", _nothing),
    "far around the inputs": ("..", _nothing),
    "a file inside the base": ("base/edited.safetensors", _nothing),
    "a weight file of the base": ("base/model.safetensors", _nothing),
    "a link to the base": ("link", _link_to("base")),
    "through a link into the base": ("link/edited", _link_to("base")),
    "a link to a weight file": ("link.safetensors", _link_to("base/model.safetensors", "link.safetensors")),
    "a link around the inputs": ("link", _link_to(".")),
}  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("case", OVERLAPS)
def test_an_output_that_touches_an_input_is_refused_also_with_overwrite(case: str, overwrite: bool, here: Path) -> None:
    output, prepare = OVERLAPS[case]
    prepare(here)
    (here / "base" / "taskvec.json").write_text("{}")  # it even looks like an output of ours
    error = refused(output, here, overwrite=overwrite)
    assert isinstance(error, tv.OutputOverlapError)
    assert "inputs are never changed" in str(error) and str(here) not in str(error)


def test_the_origin_is_an_input_too(here: Path) -> None:
    write_model(here / "origin", TENSORS)
    with pytest.raises(tv.OutputOverlapError, match="input origin"):
        tv.subtract("base", "old", base="origin", alpha=1, output="origin/x", overwrite=True)


def test_an_input_that_is_reached_by_a_link_is_protected_too(here: Path) -> None:
    (here / "cache").mkdir()
    os.rename(here / "base", here / "cache" / "blob")
    (here / "base").symlink_to("cache/blob")
    for place in ("cache", "cache/blob", "cache/blob/x", "base"):
        assert isinstance(refused(place, here, overwrite=True), tv.OutputOverlapError)


def test_the_folder_of_linked_weights_is_protected_at_both_ends(here: Path) -> None:
    # one file named through a link: what is around the link and what is around the file are both an input's place
    (here / "snapshot").mkdir()
    (here / "snapshot" / "m.safetensors").symlink_to("../base.safetensors")
    (here / "snapshot" / "taskvec.json").write_text("{}")
    for place in ("snapshot", "snapshot/m.safetensors", "base.safetensors"):
        error = refused(place, here, base="snapshot/m.safetensors", overwrite=True)
        assert isinstance(error, tv.OutputOverlapError)


def test_beside_a_single_file_is_a_fine_place(here: Path) -> None:
    assert run("edited.safetensors", base="base.safetensors").output == here / "edited.safetensors"
    assert run("edited", base="base.safetensors").output == here / "edited"


def test_a_link_to_itself_is_refused_in_one_line(here: Path) -> None:
    (here / "loop").symlink_to("loop")
    assert "loop: cannot be resolved" in str(refused("loop", here))


def test_no_folder_can_be_under_a_file(here: Path) -> None:
    assert "base.safetensors is not a folder" in str(refused("base.safetensors/x/y", here))


@pytest.mark.parametrize("output", ["", "  ", "/"])
def test_an_output_needs_a_name(output: str) -> None:
    with pytest.raises(tv.UsageError, match="not a name"):
        Target.of(output)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".gguf"])
def test_only_safetensors_are_written(suffix: str) -> None:
    with pytest.raises(tv.UsageError, match="taskvec writes safetensors"):
        Target.of(f"edited{suffix}")


def test_an_output_is_a_file_when_its_name_says_so(here: Path) -> None:
    assert Target.of("x.safetensors") == (here / "x.safetensors", True, "x.safetensors")
    assert Target.of("x.v2/../y") == (here / "y", False, "x.v2/../y")


def test_missing_folders_above_the_output_are_made(here: Path) -> None:
    assert run("deep/er/out").output.is_dir()


# --- what is there already --------------------------------------------------------------------------------------------


def _folder(here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("years of work")


def _empty(here: Path) -> None:
    (here / "out").mkdir()


THERE: dict[str, Callable[[Path], object]] = {
    "a folder": _folder,
    "an empty folder": _empty,
    "a file": lambda here: (here / "out").write_text("text"),
    "a link to a folder": lambda here: ((here / "elsewhere").mkdir(), (here / "out").symlink_to("elsewhere")),
    "a link to nothing": lambda here: (here / "out").symlink_to("nothing"),
    "an output of ours": lambda here: run("out"),
}


@pytest.mark.parametrize("case", THERE)
def test_what_is_there_is_refused_and_untouched(case: str, here: Path) -> None:
    THERE[case](here)
    error = refused("out", here)
    assert isinstance(error, tv.OutputExistsError) and "out: exists already" in str(error)


@pytest.mark.parametrize("case", ["a folder", "a file", "a link to a folder", "a link to nothing"])
def test_overwrite_replaces_nothing_that_taskvec_did_not_make(case: str, here: Path) -> None:
    THERE[case](here)
    assert isinstance(refused("out", here, overwrite=True), tv.OutputExistsError)


@pytest.mark.parametrize("case", ["an empty folder", "an output of ours"])
def test_overwrite_replaces_an_output_of_ours_or_nothing_at_all(case: str, here: Path) -> None:
    THERE[case](here)
    names = {*os.listdir(here)}
    run("out", overwrite=True)
    assert tv.verify("out").ok
    assert {*os.listdir(here)} == names


def test_overwrite_leaves_nothing_of_the_old_output(here: Path) -> None:
    write_model(here / "sharded", TENSORS, shards=2)
    run("out", base="sharded")
    assert (here / "out" / "model.safetensors.index.json").exists()
    run("out", overwrite=True)
    assert set(contents(here / "out")) == {"model.safetensors", "config.json", "README.md", "taskvec.json"}


def test_overwrite_replaces_a_single_file_of_ours_but_no_other(here: Path) -> None:
    run("edited.safetensors")
    first = (here / "edited.safetensors").read_bytes()
    tv.add("base", "old", alpha=2, output="edited.safetensors", overwrite=True, fsync=False)
    assert (here / "edited.safetensors").read_bytes() != first
    write_file(here / "precious.safetensors", TENSORS)
    assert "not made by taskvec" in str(refused("precious.safetensors", here, overwrite=True))


@pytest.mark.parametrize(("kind", "other"), [("out", "file"), ("out.safetensors", "folder")])
def test_overwrite_does_not_turn_a_folder_into_a_file_or_back(kind: str, other: str, here: Path) -> None:
    (here / kind).mkdir() if other == "folder" else (here / kind).write_text("x")
    assert f"is a {other}" in str(refused(kind, here, overwrite=True))


@pytest.mark.parametrize("overwrite", [False, True])
def test_overwrite_without_anything_there_is_an_ordinary_run(overwrite: bool, here: Path) -> None:
    assert run("out", overwrite=overwrite).output.is_dir()


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spare", [0, -1])
def test_the_disk_must_hold_the_output(spare: int, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = output.shutil.disk_usage(here)._replace(free=1000 + spare)
    asked: list[Path] = []
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: (asked.append(path), usage)[1])
    target = Target.of("not/there/yet")
    if spare < 0:
        with pytest.raises(tv.NotEnoughDiskError, match="not/there/yet: 1000 bytes are needed, 999 are free"):
            check_space(target, 1000)
    else:
        check_space(target, 1000)
    assert asked == [here]


# --- the staging folder -----------------------------------------------------------------------------------------------


def test_until_it_is_committed_the_output_is_a_hidden_partial_folder_beside_its_name(here: Path) -> None:
    before = set(os.listdir(here))
    with Staging(Target.of("out"), fsync=False) as staging:
        staging.write("config.json", b"{}")
        (made,) = set(os.listdir(here)) - before
        assert made.startswith(".out.taskvec-partial-")
        staging.commit()
        assert set(os.listdir(here)) - before == {"out"}
    assert contents(here / "out") == {"config.json": b"{}"}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_what_was_not_committed_is_removed(failure: type[BaseException], here: Path) -> None:
    before = set(os.listdir(here))
    with pytest.raises(failure), Staging(Target.of("out"), fsync=True) as staging:
        staging.write("a/b.json", b"{}")
        raise failure
    assert set(os.listdir(here)) == before


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_what_appeared_under_the_name_meanwhile_is_left_as_it_is(name: str, here: Path) -> None:
    with (
        pytest.raises(tv.OutputExistsError, match=rf"{name}: appeared after this run began"),
        Staging(Target.of(name), fsync=False) as staging,
    ):
        staging.write(name, b"mine")
        (here / name).write_text("theirs")
        staging.commit()
    assert (here / name).read_text() == "theirs"
    assert not any(".taskvec-partial" in found for found in os.listdir(here))


def test_overwriting_swaps_the_names_in_one_step(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("out")
    seen: list[bool] = []
    exchange = files.rename_exchange

    def watched(source: Path, target: Path, aside: Path) -> Path:
        seen.append(target.is_dir() and (source / "taskvec.json").exists())
        return exchange(source, target, aside)

    monkeypatch.setattr(files, "rename_exchange", watched)
    run("out", overwrite=True)
    assert seen == [True]


def test_a_side_file_of_any_size_is_copied_whole(here: Path) -> None:
    content = os.urandom((1 << 20) + 7)
    (here / "vocab").write_bytes(content)
    (here / "nothing").write_bytes(b"")
    with Staging(Target.of("out"), fsync=True) as staging:
        staging.copy(SideFile("sub/vocab", here / "vocab", len(content)))
        staging.copy(SideFile("nothing", here / "nothing", 0))
        staging.copy(SideFile("config.json", here / "vocab", 2, b"{}"))
        staging.commit()
    assert contents(here / "out") == {"sub/vocab": content, "nothing": b"", "config.json": b"{}"}


def test_a_file_of_the_output_never_replaces_another_or_follows_a_link(here: Path) -> None:
    with Staging(Target.of("out"), fsync=False) as staging:
        staging.write("config.json", b"{}")
        (staging.path / "link").symlink_to(here / "base.safetensors")
        for name in ("config.json", "link"):
            with pytest.raises(tv.OutputError, match="cannot create"):
                staging.write(name, b"again")


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


@pytest.mark.parametrize(
    ("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_the_modes_of_the_output_follow_the_umask(
    mask: int, file_mode: int, folder_mode: int, here: Path, umask: Callable[[int], int]
) -> None:
    for path in (here / "base").iterdir():
        path.chmod(0o400)  # the modes of the inputs are not copied
    umask(mask)
    run("out")
    run("out.safetensors")
    made = [here / "out", *(here / "out").rglob("*"), here / "out.safetensors"]
    assert {path.name: path.stat().st_mode & 0o777 for path in made} == {
        path.name: folder_mode if path.is_dir() else file_mode for path in made
    }


def test_a_target_is_checked_against_every_input(here: Path) -> None:
    inputs = [tv.Checkpoint.open("base"), tv.Checkpoint.open("old")]
    check_target(Target.of("out"), inputs, overwrite=False)
    for order in (inputs, inputs[::-1]):
        with pytest.raises(tv.OutputOverlapError, match="input old"):
            check_target(Target.of("old/x"), order, overwrite=False)


def test_a_home_that_nobody_has_is_a_name_like_any_other(here: Path) -> None:
    assert run("~nobody-of-this-name").output == here / "~nobody-of-this-name"


def test_a_home_is_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    assert run("~/out").output == here / "home" / "out"
    assert (here / "home" / "out" / "taskvec.json").exists() and not (here / "~").exists()
