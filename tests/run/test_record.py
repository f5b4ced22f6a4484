"""What an output says about itself: true, enough to make it again, the same every time, and nothing about this machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import taskvec as tv

from .checkpoints import write_file, write_model

BASE = {"a.w": torch.arange(6.0).reshape(2, 3), "b.w": torch.ones(4), "ids": torch.arange(3), "only": torch.ones(1)}
TUNED = {
    "a.w": torch.zeros(2, 3),
    "b.w": torch.tensor([1, 1, 2, 1 - 2**-24]),
    "ids": torch.ones(3).long(),
    "new": torch.ones(1),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base", BASE, shards=2)
    write_file(tmp_path / "old.safetensors", TUNED)
    return tmp_path


def run(output: str = "out", alpha: float = 0.5, **options: Any) -> tv.Report:
    return tv.subtract("base", "old.safetensors", alpha=alpha, output=output, fsync=False, **options)


def record(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "taskvec.json").read_text())
    assert isinstance(content, dict)
    return content


def header(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")]


def test_the_recipe_names_every_input_by_name_size_and_header(here: Path) -> None:
    run()
    content = record(here / "out")
    ((term),) = content["vector"]
    for found, name, files in (
        (content["base"], "base", sorted((here / "base").glob("*.safetensors"))),
        (term["origin"], "base", sorted((here / "base").glob("*.safetensors"))),
        (term["tuned"], "old.safetensors", [here / "old.safetensors"]),
    ):
        digests = [hashlib.sha256(header(path)).hexdigest() for path in files]
        assert found["name"] == name
        assert found["files"] == [
            {"name": path.name, "bytes": path.stat().st_size, "header_sha256": digest} for path, digest in zip(files, digests)
        ]
    assert term["coefficient"] == -0.5
    assert content["formula"] == "edited = base − 0.5·(old.safetensors − base)"
    assert content["taskvec"] == tv.__version__ and content["numpy"] == np.__version__


def test_the_recipe_keeps_the_options_that_change_the_output(here: Path) -> None:
    run(out_dtype="float64", max_shard_size="1GB", include=["*.w"], exclude=["b.*"])
    expected = {"out_dtype": "float64", "max_shard_size": "1GB", "include": ["*.w"], "exclude": ["b.*"], "code": True}
    assert record(here / "out")["options"] == expected


def test_every_weight_file_has_its_size_and_digests(here: Path) -> None:
    run(sha256=True)
    found = {shard.pop("name"): shard for shard in record(here / "out")["shards"]}
    paths = sorted((here / "out").glob("*.safetensors"))
    assert list(found) == [path.name for path in paths]
    for path in paths:
        data = path.read_bytes()[8 + len(header(path)) :]
        with safe_open(path, "np") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.offset_keys()]
        ends = np.cumsum(sizes)
        tiles = [xxhash.xxh3_128_digest(data[end - size : end]) for size, end in zip(sizes, ends)]  # one tile a tensor
        assert found[path.name] == {
            "nbytes": path.stat().st_size,
            "checksum": xxhash.xxh3_128_hexdigest(path.read_bytes()[: -len(data)] + b"".join(tiles)),
            "header_sha256": hashlib.sha256(header(path)).hexdigest(),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }


def test_the_record_tells_what_happened_to_every_tensor(here: Path) -> None:
    report = run()
    content = record(here / "out")
    # a.w: 0 − 0 is no change; b.w: 1 + 2^-25 is nearest to 1
    assert content["tensors"] == {
        "a.w": {"changed": 5}, "b.w": {"changed": 1, "lost": 1}, "ids": {"changed": 0, "differs": 2},
    }  # fmt: skip
    assert (
        content["changes"]
        == report.changes
        == {
            "tensors_edited": 2,
            "tensors_copied": 2,
            "elements": 14,
            "elements_edited": 10,
            "elements_changed": 6,
            "elements_lost_to_rounding": 1,
            "elements_overflowed": 0,
            "elements_not_finite": 0,
            "copied_tensors_that_differ": 1,
        }
    )
    assert content["only_in_base"] == ["only"] and content["only_in_tuned"] == ["new"]
    assert content["side_files"] == ["config.json"]


def test_the_index_is_true_for_any_shards_and_dtype(here: Path) -> None:
    run(out_dtype="float64", max_shard_size=40)
    content = json.loads((here / "out" / "model.safetensors.index.json").read_text())
    tensors = {path.name: load_file(path) for path in sorted((here / "out").glob("*.safetensors"))}
    assert len(tensors) > 2
    assert content["weight_map"] == {name: file for file in tensors for name in tensors[file]}
    stored = [tensor for own in tensors.values() for tensor in own.values()]
    assert content["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored)
    assert content["metadata"]["total_parameters"] == sum(t.numel() for t in stored)


def small_files(folder: Path) -> list[dict[str, Any]]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    names = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    del names["taskvec.json"]
    sums = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in names.items()}
    return [{"name": name, "bytes": size, "sha256": sha256} for name, (size, sha256) in sorted(sums.items())]


def test_every_other_file_has_its_size_and_sha256(here: Path) -> None:
    (here / "base" / "sub").mkdir()
    (here / "base" / "sub" / "template.jinja").write_bytes(bytes(range(256)) * 9000)  # more than is read at once
    (here / "base" / "empty.txt").touch()
    run(max_shard_size=40)
    found = sorted(record(here / "out")["files"], key=lambda entry: str(entry["name"]))
    assert found == small_files(here / "out") and len(found) == 5


def test_a_vector_and_an_extracted_adapter_list_their_other_files_too(here: Path) -> None:
    base = tv.Checkpoint.open("base")
    (tv.TaskVector.between(base, "old.safetensors")).save("vector", max_shard_size=20, fsync=False)
    write_file(here / "layer.safetensors", {"up.weight": torch.eye(6)})
    write_file(here / "zero.safetensors", {"up.weight": torch.zeros(6, 6)})
    tv.extract_lora("zero.safetensors", "layer.safetensors", output="lora", rank=1, fsync=False)
    for output, other in (("vector", "vector.safetensors.index.json"), ("lora", "adapter_config.json")):
        found = sorted(record(here / output)["files"], key=lambda entry: str(entry["name"]))
        assert [entry["name"] for entry in found] == ["README.md", other] and found == small_files(here / output)


def test_the_seal_of_a_record_is_the_digest_of_all_else_in_it(here: Path) -> None:
    run()
    content = record(here / "out")
    seal = content.pop("record_sha256")
    canonical = json.dumps(content, sort_keys=True).encode("ascii")
    assert seal == hashlib.sha256(canonical).hexdigest()


def test_one_weight_file_needs_no_index(here: Path) -> None:
    run(max_shard_size="1GB")
    names = {path.name for path in (here / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md", "taskvec.json"}


def test_the_card_says_what_was_done_in_words_and_numbers(here: Path) -> None:
    run()
    card = (here / "out" / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: transformers" in card.split("---")[1]
    for part in ("# base, edited", "edited = base − 0.5·(old.safetensors − base)", "tensors edited: 2", "changed: 6 of 14"):
        assert part in card


def test_the_card_of_a_pipeline_names_its_library(here: Path) -> None:
    (here / "base" / "modules.json").write_text("[]")
    run()
    assert "library_name: sentence-transformers" in (here / "out" / "README.md").read_text()


def test_a_single_file_carries_its_recipe_and_checksum(here: Path) -> None:
    run("out.safetensors")
    with safe_open(here / "out.safetensors", "np") as file:
        metadata = file.metadata()
        data = [file.get_tensor(name).tobytes() for name in file.offset_keys()]
    content = json.loads(metadata["taskvec"])
    assert content["formula"] == "edited = base − 0.5·(old.safetensors − base)"
    before = (here / "out.safetensors").read_bytes()[: -sum(map(len, data))]
    planned = before.replace(content["checksum"].encode(), b"the-checksum-of-a-file-goes-here")
    assert content["checksum"] == xxhash.xxh3_128_hexdigest(planned + b"".join(map(xxhash.xxh3_128_digest, data)))


# --- the same every time, and nothing about this machine --------------------------------------------------------------


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_the_same_run_elsewhere_gives_the_same_bytes(output: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for place in ("one", "another/place/with/a/longer/name"):
        folder = here / place
        write_model(folder / "base", BASE, shards=2)
        write_file(folder / "old.safetensors", TUNED)
        monkeypatch.chdir(folder)
        run(output, jobs=len(found) + 1)
        made = folder / output
        found.append({path.name: path.read_bytes() for path in ([made] if made.is_file() else made.iterdir())})
    assert found[0] == found[1]


def test_inputs_under_the_working_directory_are_found_from_the_output(here: Path) -> None:
    os.makedirs("runs")
    run("runs/out")
    content = record(here / "runs" / "out")
    assert content["base"]["from_output"] == "../../base"
    assert content["vector"][0]["tuned"]["from_output"] == "../../old.safetensors"


def test_where_inputs_outside_the_working_directory_lie_is_not_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "work").mkdir()
    monkeypatch.chdir(here / "work")
    tv.subtract(here / "base", "../old.safetensors", alpha=1, output="out", fsync=False)
    content = record(here / "work" / "out")
    assert content["base"]["name"] == "base" and "from_output" not in content["base"]
    text = (here / "work" / "out" / "taskvec.json").read_text() + (here / "work" / "out" / "README.md").read_text()
    assert ".." not in text and str(here) not in text


def test_an_output_outside_the_working_directory_tells_no_way_back(
    here: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    output = tmp_path_factory.mktemp("elsewhere") / "out"
    tv.subtract("base", "old.safetensors", alpha=1, output=output, fsync=False)
    assert "from_output" not in (output / "taskvec.json").read_text()


def test_a_linked_input_is_called_by_the_name_of_the_link(here: Path) -> None:
    os.rename(here / "base", here / "secret-project")
    (here / "base").symlink_to("secret-project")
    run()
    assert "secret-project" not in "".join(path.read_text() for path in (here / "out").glob("*.[jm][sd]*"))


def test_names_from_files_cannot_break_the_record_or_the_card(here: Path) -> None:
    evil = "a\n---\n\x1b[2J \u202e\"'`.w"
    save_file({evil: torch.ones(2)}, here / "x.safetensors")
    os.mkdir(here / "mo\ndel")
    save_file({evil: torch.zeros(2)}, here / "mo\ndel" / "model.safetensors")
    tv.subtract("mo\ndel", "x.safetensors", alpha=1, output="out", fsync=False)
    assert list(record(here / "out")["tensors"]) == [evil]
    card = (here / "out" / "README.md").read_text()
    assert "mo\\ndel" in card and "mo\ndel" not in card
    assert tv.verify("out").ok


def test_a_folder_made_from_an_edited_file_does_not_carry_that_files_recipe(here: Path) -> None:
    run("first.safetensors")
    tv.subtract("first.safetensors", "old.safetensors", alpha=1, output="second", fsync=False)
    with safe_open(here / "second" / "model.safetensors", "np") as file:
        assert "taskvec" not in file.metadata()
