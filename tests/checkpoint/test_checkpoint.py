from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.errors import CheckpointError, HeaderError, QuantizedError

from .craft import entry, framed, header_of, hub_cache, indexed, library_reads, sharded, weights

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def model(folder: Path, config: object = None, names: tuple[str, ...] = ("w",)) -> Path:
    weights(folder / "model.safetensors", *names)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def stored(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Every tensor's bytes, taken from where the checkpoint says they lie."""
    return {t.name: t.path.read_bytes()[t.offset : t.offset + t.nbytes] for t in checkpoint.tensors.values()}


# opening


def test_a_file_is_opened_with_every_tensor_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    header = header_of({"b": ("F32", [2], 8), "a": ("BOOL", [3], 3)}, {"format": "pt"})
    path.write_bytes(framed(header, bytes(range(11))))
    found = Checkpoint.open(path)
    assert list(found.tensors) == ["b", "a"]
    assert stored(found) == {"b": bytes(range(8)), "a": bytes(range(8, 11))}
    assert {n: v[2] for n, v in (library_reads(path.read_bytes()) or {}).items()} == stored(found)
    assert (found.path, found.folder, found.index, found.config) == (path, None, None, {})
    assert found.shards[0].metadata == {"format": "pt"}
    assert found.nbytes == 11


def test_a_sharded_folder_is_one_checkpoint_in_the_order_of_its_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {TWO: ["a"], ONE: ["z", "b"]})
    found = Checkpoint.open(folder)
    assert list(found.tensors) == ["z", "b", "a"]
    assert [shard.path.name for shard in found.shards] == [ONE, TWO]
    assert [[tensor.name for tensor in shard.tensors] for shard in found.shards] == [["z", "b"], ["a"]]
    assert found.index == folder / "model.safetensors.index.json"
    assert found.nbytes == 24


def test_opening_reads_no_data_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sharded(tmp_path / "m", {ONE: ["a"], TWO: ["b"]})
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    headers = {name: len(content) - 8 for name, (content, _) in before.items()}
    real, furthest = os.preadv, dict.fromkeys(before, 0)

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        furthest[name] = max(furthest[name], offset + len(buffers[0]))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    Checkpoint.open(folder)
    assert all(furthest[name] == headers[name] for name in (ONE, TWO))  # 8 bytes of data follow each header
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_a_hub_cache_is_opened_through_its_links(tmp_path: Path) -> None:
    plain = sharded(tmp_path / "plain", {ONE: ["a"], TWO: ["b"]})
    snapshot = hub_cache(tmp_path, {path.name: path.read_bytes() for path in plain.iterdir()})
    found = Checkpoint.open(snapshot)
    assert stored(found) == stored(Checkpoint.open(plain))
    assert [shard.path for shard in found.shards] == [snapshot / ONE, snapshot / TWO]
    assert found.shards[0].identity.inode == (snapshot / ONE).stat().st_ino


def test_a_shard_linked_from_elsewhere_is_read(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {ONE: ["a"], TWO: ["b"]})
    (folder / TWO).rename(tmp_path / "elsewhere")
    (folder / TWO).symlink_to(tmp_path / "elsewhere")
    assert set(Checkpoint.open(folder).tensors) == {"a", "b"}


def test_a_shard_that_is_not_a_file_is_named_and_never_waited_for(not_a_file: Any, tmp_path: Path) -> None:
    _, make = not_a_file
    folder = sharded(tmp_path, {ONE: ["a"], TWO: ["b"]})
    (folder / TWO).unlink()
    make(folder / TWO)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert TWO in str(caught.value)


def test_a_malformed_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {ONE: ["a"], TWO: ["b"]})
    os.truncate(folder / TWO, (folder / TWO).stat().st_size - 1)
    with pytest.raises(HeaderError, match=f"^{folder / TWO}: tensor b: data_offsets"):
        Checkpoint.open(folder)


def test_a_pickle_renamed_to_a_shard_is_called_a_pickle(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {ONE: ["a"], TWO: ["b"]})
    (folder / TWO).write_bytes(b"PK\x03\x04\x00\x00\x08\x08" + bytes(64))
    with pytest.raises(HeaderError, match=f"{TWO}: a pickle or zip file, expected safetensors"):
        Checkpoint.open(folder)


# shards and index must say the same


def test_a_tensor_in_two_shards_is_refused_naming_both(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {ONE: ["a"], TWO: ["b"]})
    weights(folder / TWO, "b", "a")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert str(caught.value) == f"{folder / TWO}: tensor a is also in {folder / ONE}"


def test_one_file_under_two_shard_names_is_refused(tmp_path: Path) -> None:
    folder = indexed(tmp_path, {"a": ONE, "b": TWO})
    weights(folder / ONE, "a", "b")
    (folder / TWO).symlink_to(ONE)
    with pytest.raises(CheckpointError, match="tensor a is also in"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": ONE, "b": TWO, "c": TWO}, f"tensor c expected in {TWO}, found in no shard"),
        ({"a": TWO, "b": TWO, "x": ONE}, f"tensor a expected in {TWO}, found in {ONE}"),
        ({"b": TWO, "x": ONE}, f"tensor x expected in {ONE}, found in no shard"),
    ],
)
def test_an_index_that_puts_a_tensor_where_it_is_not_is_refused(weight_map: Any, message: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path, {ONE: ["a"], TWO: ["b"]})
    indexed(folder, weight_map)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert str(caught.value) == f"{folder / 'model.safetensors.index.json'}: {message}"


def test_a_tensor_the_index_does_not_list_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {ONE: ["a"], TWO: ["b"]})
    weights(folder / TWO, "b", "extra.1", "extra.2")
    with pytest.raises(CheckpointError, match=r"tensors in the shards that the index does not list: extra\.1, extra\.2$"):
        Checkpoint.open(folder)


# what a checkpoint says of itself


def test_a_checkpoint_cannot_be_changed(tmp_path: Path) -> None:
    found = Checkpoint.open(model(tmp_path))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.path = tmp_path / "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        found.tensors["w"] = found.tensors["w"]  # type: ignore[index]
    with pytest.raises(TypeError):
        found.shards[0].metadata["k"] = "v"  # type: ignore[index]


def test_the_label_is_the_last_part_of_the_path_and_never_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "secret" / "llama")
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder)
    labels = [Checkpoint.open(source).label for source in (folder, f"{folder}/", ".", "../llama", "sub/..")]
    assert labels == ["llama"] * 5
    assert Checkpoint.open("model.safetensors").label == "model.safetensors"
    assert "secret" not in repr(Checkpoint.open(folder))


def test_the_label_of_a_hub_cache_is_the_name_of_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights(tmp_path / "w.safetensors")
    snapshot = hub_cache(tmp_path, {"model.safetensors": (tmp_path / "w.safetensors").read_bytes()})
    assert Checkpoint.open(snapshot).label == "org/name"
    monkeypatch.chdir(snapshot)
    assert Checkpoint.open(".").label == "org/name"
    assert Checkpoint.open(model(tmp_path / "snapshots" / "mine")).label == "mine"
    assert Checkpoint.open(model(tmp_path / "models--org--name" / "mine")).label == "mine"


def test_a_checkpoint_prints_what_it_holds(tmp_path: Path) -> None:
    found = Checkpoint.open(sharded(tmp_path / "m", {ONE: ["a", "c"], TWO: ["b"]}))
    assert repr(found) == "Checkpoint('m': 3 tensors, 24 bytes, 2 shards)"


def test_the_config_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    folder = model(tmp_path, {"model_type": "llama"})
    found = Checkpoint.open(folder)
    assert found.config == {"model_type": "llama"}
    (folder / "config.json").unlink()
    assert Checkpoint.open(folder).config == {}


def test_a_config_that_is_not_json_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    folder = model(tmp_path)
    (folder / "config.json").write_text("{")
    found = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        found.config  # noqa: B018


def test_a_config_that_is_not_a_file_is_refused_or_absent_and_never_waited_for(not_a_file: Any, tmp_path: Path) -> None:
    kind, make = not_a_file
    make(model(tmp_path) / "config.json")
    found = Checkpoint.open(tmp_path)
    if kind in ("dangling", "loop"):
        assert found.config == {}
    else:
        with pytest.raises(CheckpointError, match=r"config\.json: "):
            found.config  # noqa: B018


# quantised bases

PLAIN_NAMES = ("model.layers.0.self_attn.q_proj.weight", "scales", "layer.weight_scales", "absmax", "layer.ASCB")


@pytest.mark.parametrize(
    "config",
    [{}, {"quantization_config": None}, {"quantization_config": {}}, {"text_config": {"hidden_size": 4}},
     {"text_config": None}, {"text_config": "a string"}, {"text_config": ["quantization_config"]}],
)  # fmt: skip
def test_a_plain_base_is_not_refused(config: object, tmp_path: Path) -> None:
    Checkpoint.open(model(tmp_path, config, PLAIN_NAMES)).refuse_quantized()


@pytest.mark.parametrize(
    "config",
    [{"quantization_config": {"quant_method": "gptq"}}, {"text_config": {"quantization_config": {"quant_method": "fp8"}}}],
)
def test_a_base_whose_config_is_quantised_is_refused(config: object, tmp_path: Path) -> None:
    with pytest.raises(QuantizedError) as caught:
        Checkpoint.open(model(tmp_path, config)).refuse_quantized()
    assert str(caught.value).startswith(f"{tmp_path}: config.json has a quantization_config. Subtract from the unquantised")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "companion",
    ["weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4",
     "weight.quant_state.bitsandbytes__fp4", "SCB", "qweight", "qzeros", "g_idx", "weight_scale", "weight_scale_inv",
     "weight_scale_2", "input_scale", "weight_packed"],
)  # fmt: skip
def test_a_base_with_the_companions_of_quantised_weights_is_refused_naming_them(companion: str, tmp_path: Path) -> None:
    name = f"model.layers.0.mlp.{companion}"
    path = weights(tmp_path / "m.safetensors", "model.layers.0.mlp.weight", name)
    with pytest.raises(QuantizedError) as caught:
        Checkpoint.open(path).refuse_quantized()  # a file alone: there is no config to tell
    assert str(caught.value).startswith(f"{path}: quantised weights, found {name}; expected plain floats. ")


def test_the_shard_digest_tells_two_headers_apart(tmp_path: Path) -> None:
    first, second = weights(tmp_path / "1.safetensors", "a"), weights(tmp_path / "2.safetensors", "a", fill=9)
    other = tmp_path / "3.safetensors"
    other.write_bytes(framed({"a": entry("I32", [2], 0, 8)}, bytes(8)))
    digests = [Checkpoint.open(path).shards[0].header_sha256 for path in (first, second, other)]
    assert digests[0] == digests[1] != digests[2]
