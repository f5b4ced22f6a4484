"""`verify` finds what is wrong with an output and names it, and computes a part of it again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import taskvec as tv
from taskvec.run.record import sealed
from taskvec.run.verify import check

from ..delta.adapters import handmade
from .checkpoints import write_file, write_model

BASE = {f"h.{i}.w": torch.full((4, 8), float(i)) for i in range(4)} | {"ids": torch.arange(4), "norm": torch.ones(8)}
TUNED = {f"h.{i}.w": torch.full((4, 8), i + 0.5) for i in range(4)} | {"ids": torch.arange(4), "norm": torch.ones(8)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`out` = base − 0.5·(old − base), two shards, with a tokenizer."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base", BASE, shards=2)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    write_model(tmp_path / "old", TUNED)
    run("out")
    return tmp_path


def run(output: str, **options: Any) -> tv.Report:
    return tv.subtract("base", "old", alpha=0.5, output=output, fsync=False, **options)


def flip(path: Path, position: int) -> None:
    """Flip one bit of one byte, counted from the end if negative."""
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def rewrite(path: Path, **tensors: torch.Tensor) -> None:
    """Other values in a weight file whose header stays as it is."""
    raw, stored = path.read_bytes(), load_file(path)
    save_file({**stored, **tensors}, path, {"format": "pt"})
    assert path.read_bytes()[:200] == raw[:200], "the header changed"


# --- a good output ----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "another dtype": {"out_dtype": "bfloat16"},
    "a wider dtype": {"out_dtype": "float64"},
    "other shards": {"max_shard_size": 300},
    "some tensors": {"include": ["h.1*", "norm"]},
    "without some": {"exclude": ["h.1*"]},
    "with SHA-256": {"sha256": True},
}


@pytest.mark.parametrize("output", ["good", "good.safetensors"])
@pytest.mark.parametrize("case", OPTIONS)
def test_a_good_output_passes_and_every_edited_tensor_can_be_computed_again(case: str, output: str, here: Path) -> None:
    options = dict(OPTIONS[case])
    if output.endswith(".safetensors"):
        options.pop("max_shard_size", None)
    edited = run(output, **options).changes["tensors_edited"]
    found = tv.verify(output, sample=100)
    assert found.ok and found.skipped == []
    assert any(f"computed again: {edited} of {edited} edited tensors" in line for line in found.checks)


def test_an_adapter_is_computed_again_from_its_files(here: Path) -> None:
    handmade.write_base(here / "model")
    adapter = {**handmade.lora("m.q", 6, 4), "m.norm.weight": (4,)}
    handmade.write_adapter(here / "lora", adapter)
    for output, origin in (("plain", None), ("with-origin", "model")):
        tv.subtract("model", "lora", alpha=0.5, base=origin, output=output, fsync=False)
        found = tv.verify(output, sample=100)
        assert found.ok and found.skipped == []
        assert "2 of 2 edited tensors" in found.checks[-1]


def test_a_vector_of_several_terms_is_computed_again(here: Path) -> None:
    base = tv.Checkpoint.open("base")
    vector = 0.5 * tv.TaskVector.between("base", "old") - 0.25 * tv.TaskVector.between("old", "base")
    (base - vector).save("sum", fsync=False)
    found = tv.verify("sum", sample=100)
    assert found.ok and found.skipped == []


def test_inf_that_was_there_when_it_was_made_is_no_problem(here: Path) -> None:
    write_file(here / "far.safetensors", {**TUNED, "h.1.w": torch.full((4, 8), 3e38)})
    tv.add("base", "far.safetensors", alpha=3, output="far", fsync=False)
    found = tv.verify("far", sample=100)
    assert found.ok
    assert any("h.1.w holds 32 inf or NaN" in line for line in found.skipped)


def test_check_raises_what_verify_reports(here: Path) -> None:
    assert check("out").ok
    flip(here / "out" / FIRST, -1)
    with pytest.raises(tv.VerificationError, match=rf"out: {FIRST}: checksum"):
        check("out")


def test_verifying_changes_nothing(here: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in here.rglob("*") if path.is_file()}
    tv.verify("out")
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in here.rglob("*") if path.is_file()}
    assert after == before


# --- a bad one --------------------------------------------------------------------------------------------------------


def _swap(here: Path) -> None:
    os.rename(here / "out" / FIRST, here / "x")
    os.rename(here / "out" / SECOND, here / "out" / FIRST)
    os.rename(here / "x", here / "out" / SECOND)


def _other_shard(here: Path) -> None:
    shutil.copy(here / "base" / FIRST, here / "out" / FIRST)


def _replace_by_link(here: Path) -> None:
    (here / "elsewhere.json").write_text("[1]")
    (here / "out" / "tokenizer.json").unlink()
    (here / "out" / "tokenizer.json").symlink_to(here / "elsewhere.json")


def _replace_by_folder(here: Path) -> None:
    (here / "out" / "tokenizer.json").unlink()
    (here / "out" / "tokenizer.json").mkdir()


def _change_index(here: Path, key: str) -> None:
    path = here / "out" / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content[key] = {**content.get(key, {}), "total_size": 1}
    path.write_text(json.dumps(content))


def _second_index(here: Path) -> None:
    shutil.copy(here / "out" / "model.safetensors.index.json", here / "out" / "x.safetensors.index.json")


def _edit_record(here: Path, change: Callable[[dict[str, Any]], object], seal: bool = False) -> None:
    path = here / "out" / "taskvec.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(sealed(content) if seal else content))


def _name_outside(content: dict[str, Any]) -> None:
    content["side_files"] += ["../base/config.json"]


def _truncate(here: Path) -> None:
    os.truncate(here / "out" / SECOND, (here / "out" / SECOND).stat().st_size - 1)


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a flipped bit in the data": (lambda here: flip(here / "out" / FIRST, -1), FIRST, "checksum"),
    "a flipped bit in a copied tensor": (
        lambda here: flip(here / "out" / SECOND, (here / "out" / SECOND).read_bytes().index(BASE["norm"].numpy().tobytes())),
        SECOND,
        "checksum",
    ),
    "a flipped bit in the header": (lambda here: flip(here / "out" / FIRST, 40), FIRST, ""),
    "a flipped bit in the length": (lambda here: flip(here / "out" / FIRST, 0), FIRST, ""),
    "another metadata": (
        lambda here: save_file(load_file(here / "out" / FIRST), here / "out" / FIRST, {"format": "np"}), FIRST, "header",
    ),
    "two shards swapped": (_swap, FIRST, "expected in"),
    "the base's shard": (_other_shard, FIRST, "checksum"),
    "a missing shard": (lambda here: (here / "out" / SECOND).unlink(), SECOND, "missing"),
    "a truncated shard": (_truncate, SECOND, ""),
    "a stray weight file": (lambda here: write_file(here / "out" / "x.safetensors", BASE), "x.safetensors", "not list"),
    "a stale whole model": (lambda here: write_file(here / "out" / "model.safetensors", BASE), "model.safetensors", "beside"),
    "a missing tokenizer": (lambda here: (here / "out" / "tokenizer.json").unlink(), "tokenizer.json", "missing"),
    "a missing config": (lambda here: (here / "out" / "config.json").unlink(), "config.json", "missing"),
    "a tokenizer of the same length": (lambda here: flip(here / "out" / "tokenizer.json", 0), "tokenizer.json", "SHA-256"),
    "a longer tokenizer": (lambda here: (here / "out" / "tokenizer.json").write_text("{} "), "tokenizer.json", "3 bytes"),
    "a tokenizer linked elsewhere": (lambda here: _replace_by_link(here), "tokenizer.json", "bytes"),
    "a folder for a tokenizer": (lambda here: _replace_by_folder(here), "tokenizer.json", "cannot be read"),
    "a stale config": (lambda here: flip(here / "out" / "config.json", -2), "config.json", "SHA-256"),
    "an index of other sizes": (lambda here: _change_index(here, "metadata"), "index.json", "metadata"),
    "an index with one more key": (lambda here: _change_index(here, "more"), "index.json", "changed"),
    "a pickle beside": (lambda here: (here / "out" / "pytorch_model.bin").touch(), "pytorch_model.bin", "loaders"),
    "shards of another tool": (lambda here: (here / "out" / "consolidated.00.pth").touch(), "consolidated.00", "loaders"),
    "a second index": (lambda here: _second_index(here), "x.safetensors.index.json", "loaders"),
    "an index of pickles": (lambda here: (here / "out" / "pytorch_model.bin.index.json").touch(), "bin.index", "loaders"),
    "an adapter's config": (lambda here: (here / "out" / "adapter_config.json").touch(), "adapter_config.json", "loaders"),
    "another template": (lambda here: (here / "out" / "chat_template.jinja").touch(), "chat_template.jinja", "loaders"),
    "code": (lambda here: (here / "out" / "modeling_x.py").touch(), "modeling_x.py", "loaders"),
    "a record edited": (lambda here: _edit_record(here, lambda c: c["changes"].update(elements=9)), "taskvec.json", "edited"),
    "a record reworded": (lambda here: _edit_record(here, lambda c: c.update(formula="?")), "taskvec.json", "edited"),
    "a record unsealed": (lambda here: _edit_record(here, lambda c: c.pop("record_sha256")), "taskvec.json", "edited"),
    "a record of no format": (lambda here: _edit_record(here, lambda c: c.pop("format")), "taskvec.json", "edited"),
    "a file outside": (lambda here: _edit_record(here, _name_outside, seal=True), "../base/config.json", "leads out"),
    "a missing index": (lambda here: (here / "out" / "model.safetensors.index.json").unlink(), "out", "no index"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_and_named(case: str, here: Path) -> None:
    damage, name, reason = DAMAGE[case]
    assert tv.verify("out").ok
    damage(here)
    found = tv.verify("out")
    assert not found.ok
    assert any(name in problem and reason in problem for problem in found.problems), found.problems


def regions(path: Path) -> dict[str, int]:
    """One byte of every part of a file of the output, by what it is of."""
    raw = path.read_bytes()
    if path.suffix != ".safetensors":
        return {f"{path.name}, byte {at}": at for at in {0, len(raw) // 2, len(raw) - 1}}
    start = 8 + int.from_bytes(raw[:8], "little")
    ends = [entry["data_offsets"][1] for name, entry in json.loads(raw[8:start]).items() if name != "__metadata__"]
    places = {"length": 0, "brace": 8, "middle of the header": start // 2, "end of the header": start - 1}
    places |= {f"first byte before {end}": start + end - 1 for end in ends} | {"first byte of the data": start}
    return {f"{path.name}, {part}": at for part, at in places.items()}


def test_a_flipped_bit_anywhere_in_the_output_is_found_and_its_file_named(here: Path) -> None:
    found = 0
    for path in sorted((here / "out").iterdir()):
        for part, at in regions(path).items():
            before = path.read_bytes()
            flip(path, at)
            try:
                problems = tv.verify("out", sample=0).problems
            except tv.CheckpointError as error:
                problems = [str(error)]
            if path.name == "README.md":
                assert problems == []
            else:
                assert any(path.name in problem for problem in problems), (part, problems)
            path.write_bytes(before)
            found += 1
    assert found > 20 and tv.verify("out").ok


def test_an_edited_card_is_no_problem_and_is_said(here: Path) -> None:
    (here / "out" / "README.md").write_text("# mine")
    found = tv.verify("out")
    assert found.ok and any("README.md" in line and "as people may" in line for line in found.skipped)


def test_a_file_that_no_loader_takes_is_no_problem_and_is_said(here: Path) -> None:
    (here / "out" / "notes.txt").touch()
    (here / "out" / "eval").mkdir()
    (here / "out" / "eval" / "results.json").touch()
    found = tv.verify("out")
    assert found.ok
    assert [line for line in found.skipped if "not of this output" in line] == [
        "eval/results.json: not of this output", "notes.txt: not of this output",
    ]  # fmt: skip


def test_a_record_of_an_older_taskvec_is_checked_as_far_as_it_goes(here: Path) -> None:
    def older(content: dict[str, Any]) -> None:
        del content["files"], content["record_sha256"], content["options"]["code"]
        content["format"] = 1

    _edit_record(here, older)
    found = tv.verify("out", full=True)
    assert found.ok and found.skipped == [
        "contents of side files: taskvec.json is of an older taskvec and has no checksums of them"
    ]
    config = (here / "out" / "config.json").read_text().replace("{", '{"_name_or_path": "/a/place", ', 1)
    for folder in ("base", "out"):  # which was copied as it is
        (here / folder / "config.json").write_text(config)
    assert tv.verify("out", full=True).ok
    (here / "out" / "tokenizer.json").unlink()
    flip(here / "out" / FIRST, -1)
    assert len(tv.verify("out").problems) == 2


def _record_anew(here: Path, name: str) -> None:
    """The record says what the file is now."""
    raw = (here / "out" / name).read_bytes()
    now = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    _edit_record(here, lambda c: next(own for own in c["files"] if own["name"] == name).update(now), seal=True)


def test_a_config_that_fits_its_record_and_not_the_base_is_found(here: Path) -> None:
    """As after an edit of both, or of the base: then the record says nothing, and the base does."""
    path = here / "out" / "config.json"
    path.write_text(path.read_text().replace("llama", "gemma"))
    _record_anew(here, "config.json")
    assert tv.verify("out").problems == ["config.json: is not that of base, or that one changed since"]


def test_an_index_that_fits_its_record_and_not_the_shards_is_found(here: Path) -> None:
    _change_index(here, "metadata")
    _record_anew(here, "model.safetensors.index.json")
    (problem,) = tv.verify("out").problems
    assert problem.startswith("model.safetensors.index.json: metadata {") and "'total_size': 1" in problem


def test_damage_of_a_single_file_is_found(here: Path) -> None:
    run("out.safetensors")
    flip(here / "out.safetensors", -1)
    found = tv.verify("out.safetensors")
    assert [problem.partition(":")[0] for problem in found.problems] == ["out.safetensors"]


def test_inf_that_came_later_is_named_with_its_tensor(here: Path) -> None:
    rewrite(here / "out" / FIRST, **{"h.0.w": torch.full((4, 8), torch.nan)})
    problems = tv.verify("out").problems
    assert "h.0.w: 32 values are inf or NaN, 0 were when it was made" in problems


def forge(here: Path) -> None:
    """Other values, with a record whose checksum fits them: only computing again can tell."""
    rewrite(here / "out" / FIRST, **{"h.2.w": load_file(here / "out" / FIRST)["h.2.w"] + 1})
    problem = tv.verify("out", sample=0).problems[0]
    checksum = problem.partition("checksum ")[2].partition(",")[0]
    path = here / "out" / "taskvec.json"
    content = json.loads(path.read_text())
    next(shard for shard in content["shards"] if shard["name"] == FIRST)["checksum"] = checksum
    path.write_text(json.dumps(sealed(content)))


def test_values_that_are_not_the_formula_are_found_by_computing_them_again(here: Path) -> None:
    forge(here)
    assert tv.verify("out", sample=0).ok
    (problem,) = tv.verify("out", sample=100).problems
    assert problem.startswith("h.2.w: is not edited = base − 0.5·(old − base): ") and "elements differ" in problem


def test_an_input_that_changed_its_values_shows_in_what_is_computed_again(here: Path) -> None:
    rewrite(here / "old" / "model.safetensors", **{"h.3.w": torch.full((4, 8), 9.0)})
    (problem,) = tv.verify("out", sample=100).problems
    assert problem.startswith("h.3.w: is not ")


def test_the_sample_is_as_large_as_asked_and_another_each_time(here: Path) -> None:
    lines = {tv.verify("out", sample=2).checks[-1] for _ in range(30)}
    assert all("computed again: 2 of 5 edited tensors" in line for line in lines)
    assert len(lines) > 1
    assert "computed again: 0 of 5" in tv.verify("out", sample=0).checks[-1]


def test_all_of_it_is_computed_again_and_compared_when_asked(here: Path) -> None:
    found = tv.verify("out", full=True)
    assert found.ok and found.skipped == []
    assert "computed again: 5 of 5 edited tensors" in found.checks[-2]
    assert found.checks[-1] == "compared with base: 1 copied tensor, byte for byte"


def test_a_copied_tensor_that_fits_its_record_and_not_the_base_is_found_when_all_is_compared(here: Path) -> None:
    shard = next(path for path in (here / "out").glob("*.safetensors") if "ids" in load_file(path))
    rewrite(shard, ids=torch.tensor([0, 1, 2, 4]))
    checksum = tv.verify("out", sample=0).problems[0].partition("checksum ")[2].partition(",")[0]
    entry = lambda c: next(own for own in c["shards"] if own["name"] == shard.name)  # noqa: E731
    _edit_record(here, lambda c: entry(c).update(checksum=checksum), seal=True)
    assert tv.verify("out", sample=100).ok
    (problem,) = tv.verify("out", full=True).problems
    assert problem == "ids: is not base's: 1 byte different, or base changed"


def test_numbers_of_the_record_that_are_not_those_of_the_edit_are_found(here: Path) -> None:
    _edit_record(here, lambda c: c["tensors"]["h.1.w"].update(changed=31), seal=True)
    (problem,) = tv.verify("out", full=True).problems
    assert problem.startswith("h.1.w: the record says {'changed': 31} of it, and it is {'changed': 32}")


@pytest.mark.parametrize("kind", ["vector", "vector.safetensors", "out.safetensors"])
def test_vectors_and_single_files_are_compared_as_a_whole_too(kind: str, here: Path) -> None:
    if kind.startswith("vector"):
        tv.TaskVector.between(tv.Checkpoint.open("base"), "old").save(kind, fsync=False)
    else:
        run(kind)
    found = tv.verify(kind, full=True)
    assert found.ok and found.skipped == [] and "byte for byte" in found.checks[-1]


def _is_nonsense(content: dict[str, Any], change: str) -> None:
    changes: dict[str, Callable[[], object]] = {
        "no vector": lambda: content.update(vector=[]),
        "shards of no size": lambda: content["options"].update(max_shard_size=-1),
        "an infinite coefficient": lambda: content["vector"][0].update(coefficient=float("inf")),
        "a coefficient beyond float64": lambda: content["vector"][0].update(coefficient=10**400),
        "another coefficient": lambda: content["vector"][0].update(coefficient=-0.25),
        "a pattern beyond float64": lambda: content["vector"][0].update(
            through=[{"patterns": [["*", 10**400]], "depth": None, "otherwise": 1}]
        ),
        "a dtype": lambda: content["options"].update(out_dtype="int4"),
        "another formula": lambda: content.update(formula="edited = base"),
        "no formula": lambda: content.pop("formula"),
        "no changes": lambda: content.pop("changes"),
        "other changes": lambda: content["changes"].update(elements_changed=1),
        "no tensors": lambda: content.update(tensors={}),
        "a tensor too few": lambda: content["tensors"].pop("h.1.w"),
        "a tensor too many": lambda: content["tensors"].update({"ids": {"changed": 1}}),
        "more in base": lambda: content.update(only_in_base=["x"]),
        "more in tuned": lambda: content.pop("only_in_tuned"),
        "no files": lambda: content.pop("files"),
        "a file less": lambda: content["files"].pop(0),
        "another format": lambda: content.update(format=1),
        "no format": lambda: content.pop("format"),
    }
    changes[change]()


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        "no vector", "shards of no size", "an infinite coefficient", "a coefficient beyond float64", "another coefficient",
        "a pattern beyond float64", "a dtype", "another formula", "no formula", "other changes", "no tensors",
        "a tensor too few", "a tensor too many", "more in base", "more in tuned", "no files", "a file less", "another format",
        "no format", "no changes",
    ],
)  # fmt: skip
def test_a_record_that_says_what_is_not_so_is_found_though_its_seal_fits(change: str, full: bool, here: Path) -> None:
    _edit_record(here, lambda content: _is_nonsense(content, change), seal=True)
    found = tv.verify("out", full=full)
    assert found.problems and not any("nothing computed again" in line for line in found.skipped)


def test_a_loss_of_the_record_that_is_not_so_is_found_when_all_is_computed_again(here: Path) -> None:
    _edit_record(here, lambda content: content["changes"].update(elements_lost_to_rounding=1), seal=True)
    (problem,) = tv.verify("out", full=True).problems
    assert problem == "taskvec.json: elements_lost_to_rounding: 1, expected 0"


def test_a_format_changed_by_hand_does_not_turn_the_seal_off(here: Path) -> None:
    _edit_record(here, lambda content: content.update(format=1))
    assert any("taskvec.json" in problem and "edited" in problem for problem in tv.verify("out").problems)


@pytest.mark.parametrize("kind", [99, "2", [1]])
def test_a_record_of_a_format_that_is_not_known_is_an_error_that_names_it(kind: Any, here: Path) -> None:
    _edit_record(here, lambda content: content.update(format=kind), seal=True)
    with pytest.raises(tv.CheckpointError, match=r"out: its record is of format .*, expected one of \(1, 2\)"):
        tv.verify("out")


@pytest.mark.parametrize("gone", ["base", "old"])
def test_a_missing_input_does_not_hide_what_was_found(gone: str, here: Path) -> None:
    flip(here / "out" / "config.json", -2)
    shutil.rmtree(here / gone)
    for options in ({"full": True}, {"against": ["out"]}):
        found = tv.verify("out", **options)
        assert [problem.partition(",")[0].partition(":")[0] for problem in found.problems] == [
            "config.json", f"input {gone} of out was not found"
        ]  # fmt: skip


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "1" * 400])
def test_a_number_that_is_none_is_said_in_one_line(number: str, here: Path) -> None:
    path = here / "out" / "taskvec.json"
    for key in ("bytes", "nbytes", "coefficient"):
        before = path.read_text()
        path.write_text(re.sub(rf'"{key}": [-0-9.]+', f'"{key}": {number}', before))
        assert path.read_text() != before
        try:
            (first, *_) = tv.verify("out").problems
        except tv.CheckpointError as error:
            first = str(error)
        assert "\n" not in first and len(first) < 900
        path.write_text(before)


@pytest.mark.parametrize("name", ["additional_chat_templates", "custom_generate", "h"])
def test_a_link_to_a_folder_is_what_a_folder_would_be(name: str, here: Path) -> None:
    (here / "evil").mkdir()
    (here / "evil" / "generate.py").touch()
    (here / "out" / name).symlink_to("../evil")
    (here / "out" / "loop").symlink_to(".")
    found = tv.verify("out")
    said = f"{name}/: not of this output"
    assert (said in found.skipped) == (name == "h") and "loop/: not of this output" in found.skipped
    assert any(problem.startswith(said) for problem in found.problems) == (name != "h")


def test_a_folder_of_the_output_that_became_a_link_is_found(here: Path) -> None:
    (here / "base" / "1_Pooling").mkdir()
    (here / "base" / "1_Pooling" / "config.json").write_text("{}")
    run("piped")
    assert tv.verify("piped").ok
    os.rename(here / "piped" / "1_Pooling", here / "real")
    (here / "piped" / "1_Pooling").symlink_to("../real")
    assert [problem.partition(":")[0] for problem in tv.verify("piped").problems] == ["1_Pooling/"]


def test_folders_without_end_are_no_traceback(here: Path) -> None:
    for place in ("out", "base"):
        deep = here / place
        for _ in range(1200):  # not makedirs, which recurses
            deep = deep / "d"
            os.mkdir(deep)
    found = tv.verify("out", sample=0)
    assert any("d/d/d/" in line and "not of this output" in line for line in found.skipped)
    with pytest.raises(tv.CheckpointError, match="more than 32 folders in each other"):
        run("another")
    for place in ("out", "base"):
        subprocess.run(["rm", "-r", str(here / place)], check=True)


def test_a_sample_and_everything_exclude_each_other(here: Path) -> None:
    with pytest.raises(tv.UsageError, match="not both"):
        tv.verify("out", sample=3, full=True)


def test_everything_cannot_be_compared_without_the_inputs_and_that_is_an_error(here: Path) -> None:
    shutil.rmtree(here / "base")
    with pytest.raises(tv.CheckpointError, match="input base of out was not found"):
        tv.verify("out", full=True)


# --- inputs that went away --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["base", "old"])
def test_without_an_input_nothing_is_computed_again_and_that_is_said(gone: str, here: Path) -> None:
    shutil.rmtree(here / gone)
    found = tv.verify("out")
    assert found.ok
    (line,) = found.skipped
    assert "nothing computed again" in line and f"input {gone} of out was not found" in line and "--against" in line


def test_moved_inputs_are_found_where_against_says(here: Path) -> None:
    (here / "away").mkdir()
    for name in ("base", "old"):
        os.rename(here / name, here / "away" / f"{name}-moved")
    assert tv.verify("out").skipped
    found = tv.verify("out", against=["away/base-moved", "away/old-moved"], sample=100)
    assert found.ok and found.skipped == [] and "5 of 5" in found.checks[-1]


def test_against_something_else_is_an_error(here: Path) -> None:
    shutil.rmtree(here / "base")
    with pytest.raises(tv.CheckpointError, match="input base of out was not found, or is another one by now"):
        tv.verify("out", against=["old"])


def test_the_whole_folder_may_be_moved(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "new").mkdir()
    for name in ("base", "old", "out"):
        os.rename(here / name, here / "new" / name)
    found = tv.verify("new/out")
    assert found.ok and found.skipped == []
    monkeypatch.chdir(here / "new" / "out")
    assert tv.verify(".").skipped == []


def test_another_model_under_the_old_name_is_not_taken_for_the_input(here: Path) -> None:
    write_model(here / "old2", {**TUNED, "more": torch.ones(1)})
    shutil.rmtree(here / "old")
    os.rename(here / "old2", here / "old")
    found = tv.verify("out")
    assert found.ok and "another one by now" in found.skipped[0]


def _moved(here: Path) -> None:
    """Base and the fine-tune have the names, sizes and headers of each other, and lie elsewhere now."""
    (here / "m" / "x").mkdir(parents=True)
    os.rename(here / "base", here / "m" / "base")
    os.rename(here / "old", here / "m" / "x" / "old")


@pytest.fixture
def alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`out` = base − 0.3·(old − base), of two models that look alike from outside."""
    monkeypatch.chdir(tmp_path)
    for name, tensors in (("base", BASE), ("old", TUNED)):
        write_model(tmp_path / name, tensors)
    tv.subtract("base", "old", alpha=0.3, output="out", fsync=False)
    _moved(tmp_path)
    return tmp_path


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("against", [("m/base", "m/x/old"), ("m/x/old", "m/base"), ("m/x/old", "m/x", "m/base", "m/base")])
def test_inputs_that_look_alike_are_told_apart_by_their_names(against: tuple[str, ...], full: bool, alike: Path) -> None:
    found = tv.verify("out", against=[path for path in against if path != "m/x"], full=full)
    assert found.problems == found.skipped == []
    assert (
        tv.verify("m/base/../../out", against=[alike / path for path in against if path != "m/x"], full=full).problems == []
    )


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("names", [("a", "b"), ("b", "a"), ("old", "base"), ("a/same", "b/same")])
def test_inputs_that_look_alike_and_have_other_names_are_told_apart_by_what_fits(
    names: tuple[str, str], order: int, alike: Path
) -> None:
    for name, path in zip(names, ("m/base", "m/x/old")):
        (alike / "n" / name).parent.mkdir(parents=True, exist_ok=True)
        os.rename(alike / path, alike / "n" / name)
    found = tv.verify("out", against=[f"n/{name}" for name in names[::order]], full=True)
    assert found.problems == found.skipped == [] and "5 of 5" in found.checks[-2]
    change_one_value_and_its_checksum(alike)
    found = tv.verify("out", against=[f"n/{name}" for name in names[::order]], full=True)
    assert len(found.problems) == 1 and found.problems[0].startswith("h.3.w: is not ")


def change_one_value_and_its_checksum(here: Path) -> None:
    rewrite(here / "out" / "model.safetensors", **{"h.3.w": torch.full((4, 8), 9.0)})
    checksum = tv.verify("out", sample=0).problems[0].partition("checksum ")[2].partition(",")[0]
    _edit_record(here, lambda c: c["shards"][0].update(checksum=checksum), seal=True)


@pytest.mark.parametrize(("only", "missing"), [("m/base", "old"), ("m/x/old", "base")])
def test_one_path_is_not_taken_for_two_inputs(only: str, missing: str, alike: Path) -> None:
    with pytest.raises(tv.CheckpointError, match=f"input {missing} of out was not found"):
        tv.verify("out", against=[only], full=True)


@pytest.mark.parametrize("output", ["out2", "out2.safetensors"])
def test_inputs_of_one_name_are_told_apart_or_refused(output: str, alike: Path) -> None:
    for name, path in (("a", "m/base"), ("b", "m/x/old")):
        (alike / name).mkdir()
        os.rename(alike / path, alike / name / "model")
    tv.subtract("a/model", "b/model", alpha=0.3, output=output, fsync=False)
    assert output.endswith("s") or tv.verify(output, full=True).problems == []
    for name in "ab":
        os.rename(alike / name, alike / f"{name}{name}")
    for against in (["aa/model", "bb/model"], ["bb/model", "aa/model"]):
        found = tv.verify(output, against=against, full=True)
        assert found.problems == found.skipped == []
    for one in ("aa/model", "bb/model"):
        with pytest.raises(tv.CheckpointError, match=r"look alike|input model of out2"):
            tv.verify(output, against=[one], full=True)


def test_a_model_subtracted_from_itself_is_verified(alike: Path) -> None:
    for output in ("zero", "zero.safetensors"):
        tv.subtract("m/base", "m/base", alpha=0.3, output=output, fsync=False)
        found = tv.verify(output, against=["m/base"], full=True)
        assert found.problems == found.skipped == []


def test_adapters_that_look_alike_are_told_apart_by_their_configs_and_numbers(here: Path) -> None:
    handmade.write_base(here / "model")
    adapter = handmade.lora("m.q", 6, 4)
    for name, factor in (("one", 1.0), ("two", 2.0)):
        handmade.write_adapter(here / name, adapter)
        path = here / name / "adapter_model.safetensors"
        save_file({key: factor * value for key, value in load_file(path).items()}, path, {"format": "pt"})
    (here / "two" / "adapter_config.json").write_text((here / "two" / "adapter_config.json").read_text() + " ")
    first, second = (tv.TaskVector.from_adapter(name) for name in ("one", "two"))
    (tv.Checkpoint.open("model") + first - 0.5 * second).save("both", fsync=False)
    (here / "n").mkdir()
    for name, now in (("one", "b"), ("two", "a")):
        os.rename(here / name, here / "n" / now)
    for against in (["n/a", "n/b"], ["n/b", "n/a"]):
        found = tv.verify("both", against=against, full=True)
        assert found.problems == found.skipped == []


def test_an_input_that_fails_while_it_is_read_is_an_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise tv.SourceChangedError("base: changed")

    monkeypatch.setattr("taskvec.run.verify.found_wrong", fails)
    with pytest.raises(tv.SourceChangedError, match="changed"):
        tv.verify("out")


def test_many_inputs_that_look_alike_and_one_that_is_missing_take_little_time(alike: Path) -> None:
    vector = tv.TaskVector(())
    for number in range(14):
        shutil.copytree("m/x/old", f"ft{number}")
        vector = vector + 0.1 * tv.TaskVector.between("m/base", f"ft{number}")
    (tv.Checkpoint.open("m/base") + vector).save("soup", fsync=False)
    (alike / "n").mkdir()
    for number in range(14):
        os.rename(f"ft{number}", f"n/ft{number}")
    against = ["m/base", *(f"n/ft{number}" for number in range(14))]
    assert tv.verify("soup", against=against, full=True).problems == []
    with pytest.raises(tv.CheckpointError, match="input ft7 of soup was not found"):
        tv.verify("soup", against=[path for path in against if path != "n/ft7"], full=True)


# --- what is no output of taskvec -------------------------------------------------------------------------------------


def test_a_model_that_taskvec_did_not_make_is_no_difference_but_an_error(here: Path) -> None:
    write_file(here / "x.safetensors", BASE)
    for path, reason in (("base", "no taskvec.json"), ("x.safetensors", "no record"), ("nowhere", "no such file")):
        with pytest.raises(tv.CheckpointError, match=reason):
            tv.verify(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b'{"shards": 7}', b'{"shards": [7]}', b'{"shards": [{}]}', b'{"tensors": []}'],
)  # fmt: skip
def test_a_damaged_record_is_named(content: bytes, here: Path) -> None:
    (here / "out" / "taskvec.json").write_bytes(content)
    try:
        found = tv.verify("out")
    except tv.CheckpointError as error:
        assert "out" in str(error) and "\n" not in str(error)
    else:
        assert not found.ok


@pytest.mark.parametrize("key", ["base", "vector", "options", "formula", "shards", "tensors", "side_files"])
def test_a_record_that_lacks_a_part_never_passes_as_whole_or_is_named(key: str, here: Path) -> None:
    path = here / "out" / "taskvec.json"
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    try:
        found = tv.verify("out")
    except tv.CheckpointError as error:
        assert "damaged" in str(error) and key in str(error)
    else:
        assert key in ("formula", "tensors", "side_files") or not found.ok


# --- vectors that were weighted, masked or saved --------------------------------------------------------------------------

VIEWS: dict[str, Callable[[tv.TaskVector], tv.TaskVector]] = {
    "scaled": lambda old: old.scaled({"model.h.1.*": 0.5}, otherwise=2.0),
    "ramped": lambda old: old.ramp(0.1, 0.9),
    "selected": lambda old: old.only("*h.*").without("*h.1*"),
    "masked": lambda old: old.masked("mask.safetensors"),
    "several": lambda old: old.masked("mask.safetensors").scaled({"*h.0*": 0.5}).without("*norm*") - 0.25 * old,
    "saved": lambda old: old.save("saved.safetensors") and tv.TaskVector.open("saved.safetensors"),
}


@pytest.fixture
def weighted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tv.Checkpoint:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(12)
    shapes = {"model.h.0.w": (6, 5), "model.h.1.w": (6, 5), "model.norm": (7,)}
    for name in ("base", "old"):
        held = {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in shapes.items()}
        save_file(held, tmp_path / f"{name}.safetensors")
    save_file({key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}, tmp_path / "mask.safetensors")
    return tv.Checkpoint.open("base.safetensors")


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
@pytest.mark.parametrize("view", VIEWS)
def test_what_a_vector_was_seen_through_is_computed_again(view: str, output: str, weighted: tv.Checkpoint) -> None:
    vector = VIEWS[view](tv.TaskVector.between(weighted, "old.safetensors"))
    (weighted - 0.3 * vector).save(output, fsync=False)
    found = tv.verify(output, sample=9)
    assert found.ok and not found.skipped and any("computed again" in check for check in found.checks)
    change_one_value(Path(output))
    assert not tv.verify(output, sample=9).ok


@pytest.mark.parametrize("output", ["vector", "vector.safetensors"])
def test_a_saved_vector_is_checked_as_an_output_is(output: str, weighted: tv.Checkpoint) -> None:
    old = tv.TaskVector.between(weighted, "old.safetensors")
    (0.5 * old.masked("mask.safetensors")).save(output, fsync=False)
    found = tv.verify(output, sample=9)
    assert found.ok and not found.skipped and any("3 of 3 edited" in check for check in found.checks)
    change_one_value(Path(output))
    assert not tv.verify(output, sample=9).ok


def change_one_value(output: Path) -> None:
    path = output if output.is_file() else next(output.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_an_extracted_adapter_is_checked_for_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place, name in enumerate(("base", "old")):
        write_model(tmp_path / name, {"h.0.up.weight": torch.eye(6) * place})
    tv.extract_lora("base", "old", output="adapter", rank=2, fsync=False)
    found = tv.verify("adapter")
    assert found.ok and any("approximation" in line for line in found.skipped)
    config = (tmp_path / "adapter" / "adapter_config.json").read_text()
    (tmp_path / "adapter" / "adapter_config.json").write_text(config.replace('"lora_alpha": 2', '"lora_alpha": 3'))
    assert [problem.partition(", ")[0][:22] for problem in tv.verify("adapter").problems] == ["adapter_config.json: S"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(config)
    change_one_value(Path("adapter"))
    assert any("checksum" in problem for problem in tv.verify("adapter").problems)
