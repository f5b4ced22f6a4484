from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec.checkpoint.locate import Location, existing, locate, locate_adapter, locate_peft, read_json
from taskvec.errors import CheckpointError

from .craft import indexed, sharded, weights


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def adapter(folder: Path) -> Path:
    weights(folder / "adapter_model.safetensors", "base_model.model.w.lora_A.weight")
    (folder / "adapter_config.json").write_text("{}")
    return folder


# what a name may stand for


def test_a_file_is_only_its_weights(tmp_path: Path) -> None:
    path = weights(tmp_path / "anything.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert locate(path) == locate(str(path)) == Location(path, None, [path], None, None)


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "old.safetensors"])
def test_a_folder_with_one_weight_file_is_that_file(name: str, tmp_path: Path) -> None:
    path = weights(tmp_path / name)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")  # beside safetensors a pickle is just not looked at
    assert locate(tmp_path) == Location(tmp_path, tmp_path, [path], None, None)


def test_a_folder_with_an_index_is_its_shards_in_the_order_of_their_names(tmp_path: Path) -> None:
    sharded(tmp_path, {"model-00002-of-00002.safetensors": ["a", "b"], "model-00001-of-00002.safetensors": ["c"]})
    found = locate(tmp_path)
    assert found.shards == [tmp_path / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert found.index_file == tmp_path / "model.safetensors.index.json"
    assert found.weight_map == {n: f"model-0000{i}-of-00002.safetensors" for n, i in (("a", 2), ("b", 2), ("c", 1))}
    assert found.folder == found.path == tmp_path


def test_files_the_index_does_not_name_are_not_shards(tmp_path: Path) -> None:
    sharded(tmp_path, {"model-00001-of-00001.safetensors": ["a"]})
    weights(tmp_path / "consolidated.safetensors")
    weights(tmp_path / "adapter_model.safetensors")
    assert [path.name for path in locate(tmp_path).shards] == ["model-00001-of-00001.safetensors"]


def test_model_safetensors_is_meant_where_others_lie_beside_it(tmp_path: Path) -> None:
    for name in ("model.safetensors", "consolidated.safetensors", "a.safetensors"):
        weights(tmp_path / name)
    assert [path.name for path in locate(tmp_path).shards] == ["model.safetensors"]


def test_hidden_files_are_not_weights(tmp_path: Path) -> None:
    weights(tmp_path / ".tmp123.safetensors")
    (tmp_path / ".own.safetensors.index.json").write_text("not JSON")
    weights(tmp_path / "own.safetensors")
    assert [path.name for path in locate(tmp_path).shards] == ["own.safetensors"]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    weights(tmp_path / "m.safetensors")
    assert locate("~/m.safetensors").shards == [tmp_path / "m.safetensors"]


@pytest.mark.parametrize("name", ["absent", "absent/m.safetensors", "~no-such-user/m", "a\0b", "x" * 300, "m/" * 3000, ""])
def test_a_name_of_nothing_is_refused(name: str) -> None:
    assert "no such file or folder. Name a .safetensors file" in refusal(lambda: locate(name))


def test_a_name_inside_a_file_is_a_name_of_nothing(tmp_path: Path) -> None:
    path = weights(tmp_path / "m.safetensors")
    assert "no such file or folder" in refusal(lambda: locate(path / "inner"))


@pytest.mark.parametrize("target", ["absent", "m"])
def test_a_link_to_nothing_or_to_itself_is_called_that(target: str, tmp_path: Path) -> None:
    (tmp_path / "m").symlink_to(target)
    assert refusal(lambda: locate(tmp_path / "m")) == f"{tmp_path / 'm'}: a link to nothing (or to itself)"


def test_a_link_to_a_file_or_folder_is_followed_and_keeps_its_name(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "real", {"model-00001-of-00001.safetensors": ["a"]})
    (tmp_path / "link").symlink_to(folder)
    assert locate(tmp_path / "link").shards == [tmp_path / "link" / "model-00001-of-00001.safetensors"]


def test_a_folder_that_may_not_be_read_is_called_that(unprivileged: Any) -> None:
    with tempfile.TemporaryDirectory() as top:  # not tmp_path: only its owner may look into that one
        os.chmod(top, 0o755)
        folder = Path(top, "closed")
        weights(folder / "m.safetensors")
        folder.chmod(0)
        try:
            with unprivileged():
                assert locate_adapter(folder) is None  # nothing of it can be seen; opening it then says why
                listed, opened = refusal(lambda: locate(folder)), refusal(lambda: locate(folder / "m.safetensors"))
        finally:
            folder.chmod(0o755)
    assert listed == f"{folder}: cannot list: Permission denied"
    assert opened == f"{folder / 'm.safetensors'}: cannot open: Permission denied"


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"])
def test_a_pickle_is_refused_by_its_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"pytorch_model{suffix}"
    path.write_bytes(b"\x80\x04N.")
    assert f"{path}: a pickle, expected .safetensors. taskvec never opens pickles" in refusal(lambda: locate(path))
    message = refusal(lambda: locate(tmp_path))
    assert f"{tmp_path}: only pickles (pytorch_model{suffix}), expected safetensors" in message


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert f"{tmp_path}: no .safetensors file in it. Name a model folder" in refusal(lambda: locate(tmp_path))


def test_weights_in_folders_below_are_pointed_to(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    weights(tmp_path / "unet" / "x.safetensors")
    assert "but some in unet. Name one of those folders" in refusal(lambda: locate(tmp_path))


def test_several_weight_files_and_no_index_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors"):
        weights(tmp_path / name)
    assert f"{tmp_path}: 2 weight files (a.safetensors, b.safetensors) and no index" in refusal(lambda: locate(tmp_path))


def test_two_indexes_are_refused_by_name(tmp_path: Path) -> None:
    for stem in ("unet", "unet.fp16"):
        sharded(tmp_path, {f"{stem}-00001-of-00001.safetensors": ["a"]}, stem)
    message = refusal(lambda: locate(tmp_path))
    assert "2 indexes (unet.fp16.safetensors.index.json, unet.safetensors.index.json), expected one" in message


@pytest.mark.parametrize("stem", ["consolidated", "model.fp16"])
def test_the_index_transformers_looks_for_is_meant_where_another_lies_beside_it(stem: str, tmp_path: Path) -> None:
    sharded(tmp_path, {f"{stem}-00001-of-00001.safetensors": ["a"]}, stem)
    assert locate(tmp_path).index_file == tmp_path / f"{stem}.safetensors.index.json"
    sharded(tmp_path, {"model-00001-of-00001.safetensors": ["a"]})
    assert locate(tmp_path).index_file == tmp_path / "model.safetensors.index.json"
    assert [path.name for path in locate(tmp_path).shards] == ["model-00001-of-00001.safetensors"]


def test_model_safetensors_is_meant_where_the_index_of_another_copy_lies_beside_it(tmp_path: Path) -> None:
    sharded(tmp_path, {"consolidated-00001-of-00001.safetensors": ["a"]}, "consolidated")
    weights(tmp_path / "model.safetensors")
    assert locate(tmp_path) == Location(tmp_path, tmp_path, [tmp_path / "model.safetensors"], None, None)


# the index


@pytest.mark.parametrize(
    "shard",
    ["../m.safetensors", "/m.safetensors", "C:\\m.safetensors", "C:m.safetensors", "..\\m.safetensors", "\\m.safetensors",
     "sub/m.safetensors", "sub\\m.safetensors", "./m.safetensors", "m.safetensors/", "m.safetensors/..", "//h/m.safetensors",
     "\\\\host\\share\\m.safetensors", "https://host/m.safetensors", "hf://org/m.safetensors", "m\0.safetensors",
     "m.safetensors\0", "m\n.safetensors", "m\u202e.safetensors", "\ud800.safetensors", "m.bin", "m.pt", "m", "", ".", "..",
     "m.safetensors.bin", ".safetensors", ".m.safetensors", "m.SAFETENSORS", "m.safetensors ", "~/m.safetensors",
     None, 3, ["m.safetensors"], {"m.safetensors": 1}, True],
)  # fmt: skip
def test_an_index_names_only_files_beside_it(shard: object, tmp_path: Path) -> None:
    weights(tmp_path / "m.safetensors")  # what several of the names would lead to
    folder = indexed(tmp_path / "model", {"layer.0": shard, "layer.1": shard})
    message = refusal(lambda: locate(folder))
    assert message.startswith(f"{folder / 'model.safetensors.index.json'}: tensor layer.0 is in ")
    assert message.endswith("expected the name of a .safetensors file beside the index")


def test_names_are_checked_before_anything_opens(tmp_path: Path, watchdog: None) -> None:
    folder = indexed(tmp_path / "model", {"a": "good.safetensors", "b": "../trap.safetensors"})
    os.mkfifo(tmp_path / "trap.safetensors")
    os.mkfifo(folder / "good.safetensors")
    assert "tensor b is in ../trap.safetensors" in refusal(lambda: locate(folder))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=12).map(lambda name: name + ".safetensors") | st.text(max_size=20))
def test_no_name_in_an_index_leads_out_of_its_folder(scratch: Path, name: str) -> None:
    folder = indexed(scratch.parent / "model", {"a": name})
    message = refusal(lambda: locate(folder))  # no such shard exists, so it is refused either way
    if "expected the name of a .safetensors file" not in message:
        assert "1 of 1 shards are missing" in message
        assert os.path.dirname(os.path.realpath(folder / name)) == os.path.realpath(folder)
        assert name.isprintable()


@pytest.mark.parametrize("weight_map", [{}, None, ["a"], "a", 3])
def test_an_index_without_a_map_is_refused(weight_map: object, tmp_path: Path) -> None:
    index = indexed(tmp_path, weight_map) / "model.safetensors.index.json"
    assert refusal(lambda: locate(tmp_path)) == f"{index}: no weight_map"


def test_missing_shards_are_counted_and_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {f"model-0000{n}-of-00003.safetensors": [f"t{n}"] for n in (1, 2, 3)})
    (folder / "model-00001-of-00003.safetensors").unlink()
    (folder / "model-00003-of-00003.safetensors").unlink()
    (folder / "model-00003-of-00003.safetensors").symlink_to("../blobs/absent")  # as in a cache half deleted
    assert "index.json: 2 of 3 shards are missing (model-00001-of-00003.safetensors, model-00003-of-00003" in refusal(
        lambda: locate(folder)
    )


def test_a_shard_name_no_file_system_takes_is_missing(tmp_path: Path) -> None:
    folder = indexed(tmp_path / "model", {"a": "x" * 300 + ".safetensors"})
    assert "1 of 1 shards are missing" in refusal(lambda: locate(folder))


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_a_stray_single_file_beside_an_index_is_refused(stem: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path, {f"{stem}-00001-of-00001.safetensors": ["a"]}, stem)
    weights(folder / f"{stem}.safetensors", "a")
    message = refusal(lambda: locate(folder))
    assert f"{folder}: {stem}.safetensors lies beside {stem}.safetensors.index.json; transformers would load it" in message
    assert locate(folder / f"{stem}.safetensors").shards == [folder / f"{stem}.safetensors"]  # as the message says


def test_a_single_file_that_its_index_lists_is_no_stray(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"model.safetensors": ["a"], "model-extra.safetensors": ["b"]})
    assert [path.name for path in locate(folder).shards] == ["model-extra.safetensors", "model.safetensors"]


def test_an_index_that_is_not_a_file_is_refused_and_never_waited_for(not_a_file: Any, tmp_path: Path) -> None:
    _, make = not_a_file
    make(tmp_path / "model.safetensors.index.json")
    assert f"{tmp_path / 'model.safetensors.index.json'}: " in refusal(lambda: locate(tmp_path))


# adapters


def test_an_adapter_is_its_folder_or_the_weights_in_it(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    assert locate_adapter(folder) == locate_adapter(folder / "adapter_model.safetensors") == folder


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter_is_an_adapter_that_lacks_something(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    assert locate_adapter(tmp_path) == tmp_path


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors")
    assert locate_adapter(tmp_path) is None
    assert locate_adapter(tmp_path / "model.safetensors") is None


def test_a_weight_file_beside_an_adapter_is_itself(tmp_path: Path) -> None:
    adapter(tmp_path)
    weights(tmp_path / "other.safetensors")
    assert locate_adapter(tmp_path / "other.safetensors") is None


def test_a_folder_of_adapter_and_model_is_refused_and_their_files_are_not(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    weights(folder / "model.safetensors")
    message = refusal(lambda: locate_adapter(folder))
    assert f"{folder}: holds both an adapter and a model (model.safetensors)" in message
    assert "adapter_model.safetensors or model.safetensors" in message
    assert locate_adapter(folder / "adapter_model.safetensors") == folder
    assert locate_adapter(folder / "model.safetensors") is None


def test_an_adapter_is_not_the_weights_of_a_model_folder(tmp_path: Path) -> None:
    assert "an adapter, expected a model here. Name the model first" in refusal(lambda: locate(adapter(tmp_path)))


FACTORS = {
    "Kohya": ["lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight", "lora_unet_q.alpha"],
    "LoCon": [
        f"lora_unet_q.{name}" for name in ("lora_down.weight", "lora_mid.weight", "lora_up.weight", "alpha", "dora_scale")
    ],
    "LoHa": [f"lora_unet_q.{name}" for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")],
    "LoKr": ["lycoris_q.lokr_w1", "lycoris_q.lokr_w2", "lycoris_q.alpha"],
    "diffusers": ["unet.q.lora_A.weight", "unet.q.lora_B.weight"],
    "a raw state dict": ["q.lora_A.default.weight", "q.lora_B.default.weight"],
    "old diffusers": ["unet.processor.to_q_lora.down.weight", "unet.processor.to_q_lora.up.weight"],
    "older diffusers": ["unet.q.lora.down.weight", "unet.q.lora.up.weight"],
    "a text encoder": ["text_encoder.q.lora_linear_layer.down.weight", "text_encoder.q.lora_linear_layer.up.weight"],
    "a kind that is refused later": ["lora_unet_q.oft_blocks", "lora_unet_q.alpha"],
    "one with a stranger": ["unet.q.lora_A.weight", "unet.q.lora_B.weight", "unet.conv_in.weight"],
}


@pytest.mark.parametrize("kind", FACTORS)
def test_a_file_of_factors_is_an_adapter_and_so_is_a_folder_with_only_that_file(kind: str, tmp_path: Path) -> None:
    path = weights(tmp_path / "pytorch_lora_weights.safetensors", *FACTORS[kind])
    assert (locate_adapter(path), locate_adapter(tmp_path)) == (path, tmp_path)
    assert locate_peft(path) is None and locate_peft(tmp_path) is None


MODELS = {
    "one tensor": ["w"],
    "one that keeps adapters of its own": ["q.base_layer.weight", "q.lora_A.weight", "q.lora_B.weight"],
    "one with a few factors": ["a.weight", "b.weight", "c.weight", "q.lora_A.weight", "q.lora_B.weight"],
    "names that begin alike": [
        "lora_unet.weight",
        "lora_A.weights",
        "attn.lora.0.weight",
        "x.parametrizations.weight.0.lora_A",
    ],
    "a vocoder": ["act.alpha", "act.beta"],
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_file_that_is_not_mostly_factors_is_a_model(kind: str, tmp_path: Path) -> None:
    path = weights(tmp_path / "model.safetensors", *MODELS[kind])
    assert locate_adapter(path) is None and locate_adapter(tmp_path) is None


def test_factors_in_shards_or_beside_another_file_are_not_an_adapter(tmp_path: Path) -> None:
    sharded(tmp_path / "sharded", {"model-00001-of-00001.safetensors": FACTORS["diffusers"]})
    weights(tmp_path / "two" / "a.safetensors", *FACTORS["diffusers"])
    weights(tmp_path / "two" / "b.safetensors", *FACTORS["diffusers"])
    assert locate_adapter(tmp_path / "sharded") is None and locate_adapter(tmp_path / "two") is None


def test_a_file_that_cannot_be_read_as_either_says_so(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    (tmp_path / "lora.pt").write_bytes(b"PK\x03\x04")
    assert f"{tmp_path / 'broken.safetensors'}: header of" in refusal(lambda: locate_adapter(tmp_path / "broken.safetensors"))
    assert locate_adapter(tmp_path / "lora.pt") is None  # `locate` knows what to say about a pickle


def test_an_absent_adapter_is_refused(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(lambda: locate_adapter(tmp_path / "absent"))


# JSON


def test_a_json_object_is_read_with_its_order(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text('{"b": [1, 2.5, null], "a": "é", "c": Infinity}', encoding="utf-8")
    assert list(read_json(tmp_path / "f.json").items()) == [("b", [1, 2.5, None]), ("a", "é"), ("c", float("inf"))]


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"", "not JSON"), (b"{", "not JSON"), (b"{'a':1}", "not JSON"), (b'{"a":"\xff"}', "not JSON"),
     (b"[" * 100_000, "not JSON"), (b'\xef\xbb\xbf{"a":1}', "not JSON"), (b"[1]", "found a JSON list, expected an object"),
     (b"3", "found a JSON int"),
     (b"null", "found a JSON NoneType"), (b'"\\u001b"', "found a JSON str"), (b"9" * 5000, "not JSON")],
)  # fmt: skip
def test_what_is_not_a_json_object_is_refused_naming_the_file(content: bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(content)
    assert f"{path}: {found}" in refusal(lambda: read_json(path))


def test_a_json_file_of_half_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.touch()
    os.truncate(path, 512 << 20)  # a hole: nothing of it is stored
    assert f"{path}: 536870912 bytes, expected at most 268435456" in refusal(lambda: read_json(path))


def test_an_existing_name_is_given_back_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    assert existing("m/../m") == Path("m/../m")
    assert existing(".") == Path()


def test_an_index_of_many_tensors_is_read(tmp_path: Path) -> None:
    names = [f"layer.{n}.weight" for n in range(5000)]
    weights(tmp_path / "model-1.safetensors")
    indexed(tmp_path, dict.fromkeys(names, "model-1.safetensors"))
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"] == locate(tmp_path).weight_map
