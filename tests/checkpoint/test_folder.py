from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.folder import SideFile, side_files
from taskvec.errors import CheckpointError, MismatchError

from .craft import framed, hub_cache, weights

KEPT = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json", "modeling_own.py",
    "configuration_own.py", "LICENSE", "NOTICE", "USE_POLICY.md", "scheduler/scheduler_config.json", "1_Pooling/config.json",
    "a/b/c/deep.json", "a file no one has heard of", "latest_news.txt", "runs.json", "binary", "checkpoint-best.txt",
    "日本.txt",
]  # fmt: skip
DENIED = [
    "other.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "a.pt", "a.pth", "a.ckpt", "a.pkl", "a.pickle",
    "tf_model.h5", "flax_model.msgpack", "a.gguf", "a.ggml", "model.onnx", "model.onnx_data", "rust_model.ot", "a.tflite",
    "a.nemo", "a.mlmodel", "a.npz", "a.joblib", "A.BIN", "Model.Safetensors", "consolidated.00.pth",
    "consolidated.safetensors", "consolidated.safetensors.index.json", "consolidated.json", "params.json",
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "optimizer.pt", "optimizer_0/state",
    "scheduler.pt", "model_0/__0_0.distcp", "rng_state.pth", "rng_state_0.pth", "scaler.pt", "trainer_state.json",
    "training_args.bin", "training_args.json",
    "zero_to_fp32.py", "latest", "events.out.tfevents.1700000000.host.1.0", "README.md", "taskvec.json",
    "original/params.txt", "onnx/config.json", "openvino/config.json", "coreml/m.txt", "gguf/m.txt", "runs/x/events.txt",
    "wandb/x.json", "global_step500/state.txt", "checkpoint-500/config.json", "checkpoint-500/model.safetensors",
    "__pycache__/modeling_own.cpython-311.pyc", "logs/x.txt", ".env", ".gitattributes", ".git/config", ".cache/huggingface/x",
    ".eval_results/x.json", ".taskvec/state.json", "sub/.env", "sub/.git/config", "sub/x.bin", "sub/deeper/onnx/config.json",
    "sub/model.safetensors",
]  # fmt: skip


def place(folder: Path, name: str, content: bytes | str = b"x") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights(tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


def along(folder: Path, out_dtype: str | None = None) -> tuple[dict[str, SideFile], list[str]]:
    found, notes = side_files(Checkpoint.open(folder), out_dtype, {})
    assert len({file.name for file in found}) == len(found)
    return {file.name: file for file in found}, notes


# what comes along


def test_a_file_alone_has_no_side_files(folder: Path) -> None:
    place(folder, "config.json", "{}")
    assert side_files(Checkpoint.open(folder / "model.safetensors"), "F32", {}) == ([], [])


@pytest.mark.parametrize("name", KEPT)
def test_what_a_model_needs_comes_along_under_its_name(name: str, folder: Path) -> None:
    path = place(folder, name, b"{}\n")
    found, notes = along(folder)
    assert found == {name: SideFile(name, path, 3)}
    assert notes == []


@pytest.mark.parametrize("name", DENIED)
def test_weights_training_state_and_hidden_files_stay_behind(name: str, folder: Path) -> None:
    place(folder, name)
    found, notes = along(folder)
    assert found == {}
    unsaid = name.startswith(".") or "/." in name or name.rpartition("/")[2] in ("README.md", "taskvec.json")
    assert len(notes) == (0 if unsaid else 1)
    if notes:  # by its name, or that of the folder it is in
        (left,) = notes
        assert left.startswith("not copied, being other weights, training state or the like: ")
        assert name.startswith(left.partition(": ")[2])


def test_the_weights_of_the_model_itself_are_no_side_files(folder: Path) -> None:
    index = json.dumps({"weight_map": {"w": "model.safetensors"}})
    place(folder, "model.safetensors.index.json", index)
    place(folder, "config.json", "{}")
    assert list(along(folder)[0]) == ["config.json"]


def test_the_order_is_that_of_the_names_whatever_the_disk_says(folder: Path) -> None:
    for name in ("b.txt", "a/z.txt", "c/a.txt", "a/b.txt", "B.txt", "é.txt"):
        place(folder, name)
    assert list(along(folder)[0]) == ["B.txt", "a/b.txt", "a/z.txt", "b.txt", "c/a.txt", "é.txt"]


def test_an_empty_folder_and_an_empty_file_are_no_trouble(folder: Path) -> None:
    (folder / "empty").mkdir()
    path = place(folder, "empty.txt", b"")
    assert along(folder) == ({"empty.txt": SideFile("empty.txt", path, 0)}, [])


def test_no_code_of_the_model_is_run(folder: Path, tmp_path: Path) -> None:
    place(folder, "modeling_own.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    place(folder, "config.json", '{"auto_map": {"AutoModel": "modeling_own.Own"}}')
    assert set(along(folder)[0]) == {"config.json", "modeling_own.py"}
    assert not (tmp_path / "ran").exists()


# links


def test_a_link_out_of_the_model_is_not_copied_and_said_so_without_its_target(folder: Path, tmp_path: Path) -> None:
    secret = place(tmp_path, "home/secret-key", "s3cr3t")
    (folder / "innocent.txt").symlink_to(secret)
    (folder / "relative.txt").symlink_to("../home/secret-key")
    found, notes = along(folder)
    assert found == {}
    assert notes == [f"{n}.txt is a link out of the model folder: not copied" for n in ("innocent", "relative")]
    assert "secret" not in " ".join(notes)


def test_a_folder_whose_name_begins_alike_is_out_of_the_model(folder: Path, tmp_path: Path) -> None:
    place(tmp_path, "model-private/notes.txt")
    (folder / "notes.txt").symlink_to("../model-private/notes.txt")
    assert along(folder) == ({}, ["notes.txt is a link out of the model folder: not copied"])


def test_a_link_within_the_model_is_followed(folder: Path) -> None:
    place(folder, "real/tokenizer.json", b"12345")
    (folder / "tokenizer.json").symlink_to("real/tokenizer.json")
    found, notes = along(folder)
    assert (found["tokenizer.json"].nbytes, notes) == (5, [])


def test_a_link_within_the_model_that_leads_out_by_a_second_one_is_not_followed(folder: Path, tmp_path: Path) -> None:
    place(tmp_path, "secret")
    (folder / "second").symlink_to("../secret")
    (folder / "first").symlink_to("second")
    assert along(folder) == ({}, [f"{n} is a link out of the model folder: not copied" for n in ("first", "second")])


def test_a_linked_folder_is_not_walked_and_said_so(folder: Path, tmp_path: Path) -> None:
    place(tmp_path, "outside/x.txt")
    (folder / "outside").symlink_to("../outside")
    (folder / "round").symlink_to(".")
    assert along(folder) == ({}, [f"{n} is not a regular file: not copied" for n in ("outside", "round")])


def test_a_model_folder_that_is_a_link_itself_has_its_side_files(folder: Path, tmp_path: Path) -> None:
    place(folder, "config.json", "{}")
    (tmp_path / "link").symlink_to("model")
    assert list(along(tmp_path / "link")[0]) == ["config.json"]


def test_what_is_not_a_file_is_not_copied_and_never_waited_for(not_a_file: Any, folder: Path) -> None:
    kind, make = not_a_file
    make(folder / "thing")
    expected = [] if kind == "folder" else ["thing is not a regular file: not copied"]
    assert along(folder) == ({}, expected)


def test_a_link_with_a_name_for_the_terminal_is_shown_escaped(folder: Path, tmp_path: Path) -> None:
    place(tmp_path, "secret")
    (folder / "a\x1b[31m\nb").symlink_to("../secret")
    assert along(folder)[1] == [r"a\x1b[31m\nb is a link out of the model folder: not copied"]


def snapshot_with(tmp_path: Path, **files: bytes) -> Path:
    weights(tmp_path / "w.safetensors")
    return hub_cache(tmp_path, {"model.safetensors": (tmp_path / "w.safetensors").read_bytes(), **files})


def test_the_links_of_a_hub_cache_into_its_blobs_are_followed(tmp_path: Path) -> None:
    names = {"config.json": b"{}", "additional_chat_templates/tool_use.jinja": b"{{x}}", "1_Pooling/config.json": b"{} "}
    snapshot = snapshot_with(tmp_path, **names)
    found, notes = along(snapshot)
    assert {name: file.source.read_bytes() for name, file in found.items()} == names
    assert {name: file.nbytes for name, file in found.items()} == {name: len(content) for name, content in names.items()}
    assert notes == []


def test_a_hub_cache_may_be_named_by_a_link(tmp_path: Path) -> None:
    snapshot = snapshot_with(tmp_path, **{"config.json": b"{}"})
    (tmp_path / "short").symlink_to(snapshot)
    assert list(along(tmp_path / "short")[0]) == ["config.json"]


@pytest.mark.parametrize(
    "target",
    ["../../../models--other--n/blobs/x", "../../refs/main", "../other/x", "../../blobs-private/x", "../../../token"],
)
def test_other_links_of_a_hub_cache_are_not_followed(target: str, tmp_path: Path) -> None:
    snapshot = snapshot_with(tmp_path)
    place(snapshot, target, "hf_secret")
    (snapshot / "x.txt").symlink_to(target)
    assert along(snapshot) == ({}, ["x.txt is a link out of the model folder: not copied"])


def test_a_blob_that_is_a_link_out_of_the_cache_is_not_followed(tmp_path: Path) -> None:
    snapshot = snapshot_with(tmp_path, **{"x.txt": b""})
    blob = snapshot / os.readlink(snapshot / "x.txt")
    place(tmp_path, "secret")
    blob.unlink()
    blob.symlink_to(tmp_path / "secret")
    assert along(snapshot) == ({}, ["x.txt is a link out of the model folder: not copied"])


def test_a_folder_that_only_looks_like_a_cache_has_no_blobs(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "work" / "model"
    weights(folder / "model.safetensors")
    place(tmp_path / "home" / "blobs", "x")
    (folder / "x.txt").symlink_to("../../blobs/x")
    assert along(folder) == ({}, ["x.txt is a link out of the model folder: not copied"])


# sentence-transformers

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]


def test_the_weights_of_the_modules_of_a_pipeline_come_along(folder: Path) -> None:
    place(folder, "modules.json", json.dumps(MODULES))
    place(folder, "1_Pooling/config.json", "{}")
    place(folder, "2_Dense/config.json", "{}")
    path = place(folder, "2_Dense/model.safetensors", framed("{}"))
    place(folder, "2_Dense/pytorch_model.bin")
    place(folder, "3_Left/model.safetensors")
    found, notes = along(folder)
    assert list(found) == ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json"]
    assert found["2_Dense/model.safetensors"] == SideFile("2_Dense/model.safetensors", path, 10)
    assert notes == [
        "2_Dense/model.safetensors is copied as it is; to edit it too, subtract that file by itself",
        "not copied, being other weights, training state or the like: 2_Dense/pytorch_model.bin, 3_Left/model.safetensors",
    ]


def test_a_module_that_is_only_a_pickle_is_named(folder: Path) -> None:
    place(folder, "modules.json", json.dumps(MODULES))
    place(folder, "2_Dense/pytorch_model.bin")
    found, notes = along(folder)
    assert list(found) == ["modules.json"]
    assert [note.partition(",")[0] for note in notes] == ["2_Dense/pytorch_model.bin"]


def test_the_weights_of_a_module_linked_from_elsewhere_do_not_come_along(folder: Path, tmp_path: Path) -> None:
    place(folder, "modules.json", json.dumps(MODULES))
    place(tmp_path, "private.safetensors")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "model.safetensors").symlink_to("../../private.safetensors")
    assert along(folder)[1] == ["2_Dense/model.safetensors is a link out of the model folder: not copied"]


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "3", "null", "[1]", "[null]", '[{"path": null}]', '[{"path": 3}]', '["2_Dense"]', "not JSON", "[" * 100_000,
     '[{"path": "model.safetensors"}]', '[{"path": "model.safetensors/x"}]', '[{"path": "/"}]', '[{"path": ".."}]', ""],
)  # fmt: skip
def test_no_list_of_modules_brings_other_weights_along(text: str, folder: Path) -> None:
    place(folder, "modules.json", text)
    place(folder, "2_Dense/model.safetensors")
    assert list(along(folder)[0]) == ["modules.json"]


def test_a_list_of_modules_that_is_not_a_file_is_never_waited_for(not_a_file: Any, folder: Path) -> None:
    _, make = not_a_file
    make(folder / "modules.json")
    assert along(folder)[0] == {}


# config.json

CONFIG = """{
    "architectures": ["Own"],   "torch_dtype": "bfloat16",
  "rms_norm_eps": 1e-05, "id2label": {"0": "日本"}, "vocab_size": 32000,
  "text_config": {"dtype": "bfloat16", "hidden_size": 64, "inner_config": {"torch_dtype": "bfloat16"}},
  "vision_config": {"hidden_size": 32},
  "rope_scaling": {"dtype": "linear"}, "head_dim": null, "tie": true, "long": 123456789012345678901234567890
}"""


def test_config_json_comes_along_byte_for_byte_unless_the_dtype_changes(folder: Path) -> None:
    path = place(folder, "config.json", CONFIG)
    found, _ = along(folder)
    assert found == {"config.json": SideFile("config.json", path, len(CONFIG.encode()), None)}


@pytest.mark.parametrize(("out", "name"), [("F64", "float64"), ("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_config_json_says_the_new_dtype_everywhere_and_nothing_else_changes(out: str, name: str, folder: Path) -> None:
    place(folder, "config.json", CONFIG)
    place(folder, "tokenizer.json", '{"dtype": "bfloat16"}')
    found, _ = along(folder, out)
    content = found["config.json"].content
    assert content is not None
    assert found["config.json"].nbytes == len(content)
    assert content.endswith(b"}\n")
    expected = json.loads(CONFIG)
    expected["torch_dtype"] = name
    expected["text_config"]["dtype"] = name
    expected["text_config"]["inner_config"]["torch_dtype"] = name
    assert json.loads(content) == expected
    assert list(json.loads(content)) == list(expected)
    assert "日本" in content.decode()
    assert found["tokenizer.json"].content is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"dtype": "bfloat16"}', {"dtype": "float32"}),
        ('{"torch_dtype": "bfloat16"}', {"torch_dtype": "float32"}),
        ('{"torch_dtype": null}', {"torch_dtype": "float32"}),
        ('{"torch_dtype": "float16", "dtype": "bfloat16"}', {"torch_dtype": "float32", "dtype": "float32"}),
        ('{"a": 1}', {"a": 1, "dtype": "float32"}),
        ("{}", {"dtype": "float32"}),
        ('{"a": "\\ud800"}', {"a": "\ud800", "dtype": "float32"}),
    ],
)
def test_the_dtype_is_set_where_the_config_has_it_or_added(before: str, after: object, folder: Path) -> None:
    place(folder, "config.json", before)
    content = along(folder, "F32")[0]["config.json"].content
    assert content is not None
    assert json.loads(content) == after


def test_only_the_config_at_the_top_is_changed(folder: Path) -> None:
    place(folder, "1_Pooling/config.json", '{"dtype": "bfloat16"}')
    assert along(folder, "F32")[0]["1_Pooling/config.json"].content is None


def test_a_folder_without_a_config_gets_none(folder: Path) -> None:
    place(folder, "tokenizer.json", "{}")
    assert list(along(folder, "F32")[0]) == ["tokenizer.json"]


def test_a_config_that_is_linked_from_elsewhere_is_not_copied(folder: Path, tmp_path: Path) -> None:
    place(tmp_path, "config.json", '{"dtype": "bfloat16"}')
    (folder / "config.json").symlink_to("../config.json")
    assert along(folder, "F32") == ({}, ["config.json is a link out of the model folder: not copied"])


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    place(folder, "config.json", "not JSON")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        along(folder)


def test_a_config_that_names_its_weight_file_is_refused_with_what_to_do(folder: Path) -> None:
    place(folder, "config.json", '{"transformers_weights": "own.safetensors"}')
    with pytest.raises(MismatchError) as caught:
        along(folder)
    assert str(caught.value).startswith(f"{folder / 'config.json'}: transformers_weights names the weight file")
    assert "Remove that line" in str(caught.value)
    assert caught.value.exit_code == 3
