"""Which Python files of a model come along: those that a loader of the model would run, and no others. None is run here."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.code import ModelCode, along
from taskvec.errors import CheckpointError

from .craft import weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights(tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


def place(folder: Path, **files: Any) -> None:
    """Files by their names, in which `__` stands for a slash and the last `_` for a dot."""
    for key, content in files.items():
        stem, _, ending = key.replace("__", "/").rpartition("_")
        path = folder / f"{stem}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def code(folder: Path, keep: bool = True) -> tuple[ModelCode, list[str]]:
    side, found, notes = along(Checkpoint.open(folder), None, {}, keep)
    python = tuple(file.name for file in side if file.name.endswith(".py"))
    assert python == found.files
    assert {file.name for file in side} >= {path.name for path in folder.glob("*.json")}
    return found, notes


NAMED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "a model": (
        {"config_json": {"auto_map": {"AutoConfig": "conf.C", "AutoModel": "modeling.M"}}}, {"conf.py", "modeling.py"},
    ),
    "two classes of a tokenizer": (
        {"tokenizer_config_json": {"auto_map": {"AutoTokenizer": ["tok.Slow", "fast.Fast"]}}}, {"tok.py", "fast.py"},
    ),
    "a tokenizer without a fast class": (
        {"tokenizer_config_json": {"auto_map": {"AutoTokenizer": ["tok.Slow", None]}}}, {"tok.py"},
    ),
    "an old tokenizer": ({"tokenizer_config_json": {"auto_map": ["tok.Slow", None]}}, {"tok.py"}),
    "image processors by backend": (
        {"preprocessor_config_json": {"auto_map": {"AutoImageProcessor": {"torchvision": "fast.F", "pil": "tok.S"}}}},
        {"fast.py", "tok.py"},
    ),
    "a processor": ({"processor_config_json": {"auto_map": {"AutoProcessor": "tok.P"}}}, {"tok.py"}),
    "a config in a config": ({"config_json": {"text_config": {"auto_map": {"AutoConfig": "conf.C"}}}}, {"conf.py"}),
    "a config in a folder": ({"tokenizer__tokenizer_config_json": {"auto_map": {"AutoTokenizer": "tok.T"}}}, {"tok.py"}),
    "code in a folder": ({"config_json": {"auto_map": {"AutoModel": "sub/deep.M"}}}, {"sub/deep.py"}),
    "a sentence-transformers module": ({"modules_json": [{"path": "", "type": "tok.Pooling"}]}, {"tok.py"}),
    "a module of an installed library": ({"modules_json": [{"path": "", "type": "sentence_transformers.Pooling"}]}, set()),
    "a custom pipeline of diffusers": (
        {"model_index_json": {"_class_name": "P", "unet": ["deep", "Net"], "vae": ["diffusers", "V"], "x": [None, None]},
         "unet__deep_py": ""}, {"unet/deep.py"},
    ),
    "a generation of its own": (
        {"custom_generate__generate_py": "from ..conf import x"}, {"custom_generate/generate.py", "conf.py"},
    ),
    "nothing": ({"config_json": {"model_type": "llama"}}, set()),
    "something that is no map": ({"config_json": {"auto_map": {"AutoModel": [7, {"a": None}]}}}, set()),
    "a name without a module": ({"config_json": {"auto_map": {"AutoModel": "M"}}}, set()),
    "a config that is not JSON": ({"config_json": "{}", "tokenizer_config_json": "{"}, set()),
    "a config that nests deeply": ({"config_json": "{}", "x_config_json": '{"a":' * 5000 + "1" + "}" * 5000}, set()),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMED)
def test_the_files_that_a_config_names_come_along_and_no_others(case: str, folder: Path) -> None:
    files, expected = NAMED[case]
    place(folder, **dict.fromkeys(("conf_py", "modeling_py", "tok_py", "fast_py", "sub__deep_py", "unnamed_py"), ""), **files)
    found, notes = code(folder)
    assert set(found.files) == expected and found.left == ()
    (note,) = notes
    assert "not copied, being code that no config of the model names: " in note and "unnamed.py" not in found.files


IMPORTS: dict[str, tuple[str, set[str]]] = {
    "from .x": ("from .x import a", {"x.py"}),
    "from . import x": ("from . import x, y as z", {"x.py", "y.py"}),
    "in a try": ("try:\n    from .x import a\nexcept ImportError:\n    import y", {"x.py", "y.py"}),
    "in a function": ("def f():\n    from .x import a", {"x.py"}),
    "through another": ("from .chain import a", {"chain.py", "x.py"}),
    "in a circle": ("from .circle import a", {"circle.py"}),
    "of a folder": ("from .sub.deep import a", {"sub/__init__.py", "sub/deep.py", "x.py"}),
    "of the folder itself": ("from .sub import deep", {"sub/__init__.py", "sub/deep.py", "x.py"}),
    "by its name alone": ("import x.y\nfrom sub import deep", {"x.py", "sub/__init__.py", "sub/deep.py"}),
    "of a library": ("import torch, os.path\nfrom transformers.models import x2", set()),
    "above the folder": ("from ...x import a", set()),
    "in a string": ('"""\nfrom .x import a\n"""', {"x.py"}),
    "after a colon": ("try: from .x import a\nexcept ImportError: import y", {"x.py", "y.py"}),
    "over two lines": ("from . import \\\n    x", {"x.py"}),
    "with comments": ("from . import (  # (of old)\n    x,  # y\n)", {"x.py"}),
    "under another name": ("import torch as x\nfrom .y import a as x", {"y.py"}),
    "without blanks": ("from.x import(a)", {"x.py"}),
    "an odd indent and line": ("if True:\n\tfrom   .x   import (\n a,\n b)", {"x.py"}),
}


@pytest.mark.parametrize("case", IMPORTS)
def test_what_a_named_file_imports_of_the_folder_comes_along(case: str, folder: Path) -> None:
    text, expected = IMPORTS[case]
    place(
        folder, config_json={"auto_map": {"AutoModel": "modeling.M"}}, modeling_py=text, x_py="", y_py="",
        chain_py="from .x import b",
        circle_py="from .modeling import M", sub__deep_py="from ..x import a", unnamed_py="",
    )  # fmt: skip
    (folder / "sub" / "__init__.py").touch()
    found, _ = code(folder)
    assert set(found.files) == {"modeling.py", *expected}


@pytest.mark.parametrize(
    "case", ["from .x", "in a try", "in a function", "through another", "in a string", "an odd indent and line"]
)
def test_all_that_transformers_looks_for_comes_along(case: str, folder: Path) -> None:
    place(folder, config_json={"auto_map": {"AutoModel": "modeling.M"}}, modeling_py=IMPORTS[case][0], x_py="", y_py="",
          chain_py="from .x import b")  # fmt: skip
    needed = {Path(path).name for path in get_relative_import_files(folder / "modeling.py")}
    assert needed and needed < set(code(folder)[0].files)


@pytest.mark.parametrize(
    "text", ["print 'python 2'", "\0", "x = (" * 500, "é = '\udcff'".encode("utf-8", "surrogateescape").decode("latin-1")]
)
def test_the_imports_of_a_file_that_is_no_python_here_are_found_too(text: str, folder: Path) -> None:
    place(folder, config_json={"auto_map": {"AutoModel": "modeling.M"}}, modeling_py=text + "\nfrom .x import a\n(", x_py="",
          y_py="")  # fmt: skip
    assert set(code(folder)[0].files) == {"modeling.py", "x.py"}


def test_of_a_file_that_is_too_large_to_read_all_beside_it_comes_along(folder: Path) -> None:
    place(
        folder,
        config_json={"auto_map": {"AutoModel": "modeling.M"}},
        modeling_py="#" * (4 << 20) + "#",
        x_py="",
        sub__y_py="",
    )
    assert set(code(folder)[0].files) == {"modeling.py", "x.py"}


LONG = {
    "empty lines": "\n" * (4 << 20),
    "blanks": " " * (4 << 20),
    "a from, and blanks": "from" + " " * (4 << 20 - 1),
    "dots": "from " + "." * (4 << 20 - 1),
    "parts": "import " + "a." * (2 << 20 - 1),
    "parts of a from": "from " + "a." * (2 << 20 - 1) + "a import b",
    "parts of the folder": "import " + "sub.deep." * (1 << 18),
    "lines": "a\n" * (2 << 20),
    "froms": "from;" * (4 << 17),
    "open brackets": "from . import (\n" * (1 << 17),
    "names": "from . import (" + "x, " * (1 << 19),
    "imports": "import x;" * (1 << 18),
    "colons": ":" * (4 << 20),
    "backslashes": "\\\n" * (1 << 20),
    "hashes": "#" * (4 << 20),
    "a list": "x = [" + "1," * (2 << 20 - 1),
}


@pytest.mark.parametrize("case", LONG)
def test_a_file_made_to_be_slow_or_large_is_read_in_little_time_and_memory(case: str, folder: Path) -> None:
    place(folder, config_json={"auto_map": {"AutoModel": "modeling.M"}}, modeling_py=LONG[case][: 4 << 20], sub__deep_py="")
    checkpoint = Checkpoint.open(folder)
    tracemalloc.start()
    started = time.process_time()
    try:
        along(checkpoint, None, {}, True)
        taken, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken < 20 and peak < 200 << 20


def test_code_of_another_repository_is_not_copied_and_said_so(folder: Path) -> None:
    place(folder, config_json={"auto_map": {"AutoConfig": "conf.C", "AutoModel": "org/other--modeling.M"}}, conf_py="",
          modeling_py="")  # fmt: skip
    found, notes = code(folder)
    assert found.files == ("conf.py",)
    assert notes[0] == "config.json: AutoModel is code of org/other, not copied: loaders fetch it from there"


@pytest.mark.parametrize("value", ["--modeling.M", "--", "a--", "", ".", "x..C", "modeling."])
def test_an_odd_name_of_a_class_breaks_nothing(value: str, folder: Path) -> None:
    place(folder, config_json={"auto_map": {"AutoModel": value}}, x_py="")
    assert code(folder)[0].files == ()


def test_a_named_file_that_the_base_lacks_is_said(folder: Path) -> None:
    place(folder, config_json={"auto_map": {"AutoModel": "gone.M"}})
    assert code(folder) == (ModelCode(), ["config.json: AutoModel is in gone.py, which the base does not have"])


@pytest.mark.parametrize("value", ["../out.M", "/etc/out.M", "C:\\out.M", "sub/../../out.M", "..\\out.M", "..", "a\0b.M"])
def test_a_name_that_leads_out_of_the_folder_is_refused(value: str, folder: Path) -> None:
    place(folder, config_json={"auto_map": {"AutoModel": value}})
    (folder.parent / "out.py").touch()
    with pytest.raises(CheckpointError, match=r"config.json: AutoModel is .* leads out of the model folder"):
        along(Checkpoint.open(folder), None, {}, True)


def test_a_link_to_code_out_of_the_folder_is_not_followed(folder: Path) -> None:
    place(folder, config_json={"auto_map": {"AutoModel": "modeling.M"}})
    (folder.parent / "secret.py").write_text("token = 1")
    (folder / "modeling.py").symlink_to("../secret.py")
    found, notes = code(folder)
    assert found.files == () and any("modeling.py is a link out of the model folder" in note for note in notes)


def test_without_code_nothing_of_it_comes_along_and_what_no_longer_loads_is_said(folder: Path) -> None:
    place(
        folder, config_json={"auto_map": {"AutoConfig": "conf.C", "AutoModel": "modeling.M", "AutoX": "org/other--x.X"}},
        conf_py="", modeling_py="from .x import a", x_py="", unnamed_py="",
    )  # fmt: skip
    found, notes = code(folder, keep=False)
    assert found == ModelCode((), ("conf.py", "modeling.py", "unnamed.py", "x.py"), ("AutoConfig", "AutoModel"))
    assert str(found) == (
        "left out: conf.py, modeling.py, unnamed.py, x.py; without it AutoConfig, AutoModel cannot be loaded from the output"
    )
    assert not any("no config of the model names" in note for note in notes)


def test_a_file_alone_has_no_code(folder: Path) -> None:
    place(folder, config_json={"auto_map": {"AutoModel": "modeling.M"}}, modeling_py="")
    assert along(Checkpoint.open(folder / "model.safetensors"), None, {}, True) == ([], ModelCode(), [])


def test_code_is_read_and_never_run(folder: Path, tmp_path: Path) -> None:
    run = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom .x import a"
    place(folder, config_json={"auto_map": {"AutoModel": "modeling.M"}}, modeling_py=run, x_py=run)
    assert set(code(folder)[0].files) == {"modeling.py", "x.py"} and not (tmp_path / "ran").exists()
