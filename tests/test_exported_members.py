from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import taskvec
from taskvec import errors

PACKAGE = Path(taskvec.__file__).parent
# each room imports only from the rooms before it in its own line
FLOORS = {
    "errors": [],
    "_version": [],
    "checkpoint": ["errors", "_version"],
    "delta": ["errors", "_version", "checkpoint"],
    "merge": ["errors", "_version", "checkpoint", "delta"],
    "run": ["errors", "_version", "checkpoint", "delta", "merge"],
    "hub": ["errors", "_version", "checkpoint", "delta", "merge", "run"],
    "insight": ["errors", "_version", "checkpoint", "delta", "merge", "run"],
    "cli": ["errors", "_version", "checkpoint", "delta", "merge", "run", "hub", "insight"],
    "__init__": ["errors", "_version", "checkpoint", "delta", "merge", "run", "hub", "insight"],
    "__main__": ["cli"],
}
HEAVY = {"torch", "numpy", "safetensors", "transformers", "peft", "ray", "matplotlib", "pydantic", "huggingface_hub"}


# the public names


def test_the_public_names_are_exactly_those_exported() -> None:
    assert set(dir(taskvec)) == set(taskvec.__all__)
    assert all(hasattr(taskvec, name) for name in taskvec.__all__)
    with pytest.raises(AttributeError, match="no attribute 'weights'"):
        taskvec.weights  # noqa: B018


def test_the_exported_names_are_sorted_and_occur_once() -> None:
    assert taskvec.__all__ == sorted(set(taskvec.__all__))


def test_every_error_is_exported() -> None:
    raised = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.TaskvecError)
    }
    assert raised == set(errors.__all__)
    assert raised <= set(taskvec.__all__)


@pytest.mark.parametrize("name", sorted(set(taskvec.__all__) - set(errors.__all__) - {"__version__"}))
def test_every_exported_name_tells_what_it_is(name: str) -> None:
    assert getattr(taskvec, name).__doc__


# what an import costs


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `code`."""
    report = "import json as _json, sys as _sys; print('\\n' + _json.dumps(sorted(_sys.modules)))"
    result = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


RUN = """
import runpy, sys
sys.argv = ["taskvec", *{arguments}]
try:
    runpy.run_module("taskvec", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
"""


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = modules_after("import taskvec; taskvec.Checkpoint, taskvec.subtract")
    assert "taskvec" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["subtract", "--help"], ["inspect", "--help"]])
def test_asking_the_command_for_help_imports_nothing_heavy(arguments: list[str]) -> None:
    loaded = modules_after(RUN.format(arguments=arguments))
    assert {"taskvec", "click"} <= loaded
    assert not loaded & HEAVY


# the floors


def room_of(module: str) -> str:
    """`taskvec.checkpoint.header` -> `checkpoint`; the package itself -> `__init__`."""
    return [*module.split("."), "__init__"][1]


def imported(path: Path) -> Iterator[str]:
    """Every module of taskvec that a file imports, anywhere in it, by its full name."""
    here = ["taskvec", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "taskvec")
        elif isinstance(node, ast.ImportFrom):
            parent = here[: -node.level] if node.level else []
            module = ".".join([*parent, *(node.module.split(".") if node.module else [])])
            if module == "taskvec":
                yield from (f"taskvec.{alias.name}" for alias in node.names)
            elif module.startswith("taskvec."):
                yield module


def violations(path: Path) -> list[str]:
    room = room_of(".".join(["taskvec", *path.relative_to(PACKAGE).with_suffix("").parts]))
    below = [*FLOORS.get(room, []), *([] if room == "__main__" else [room])]
    return [f"{path.relative_to(PACKAGE)} imports {module}" for module in imported(path) if room_of(module) not in below]


def test_every_room_has_a_floor() -> None:
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p.is_dir() and (p / "__init__.py").exists())}
    assert rooms <= set(FLOORS)


def test_rooms_import_only_from_the_floors_below_them() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    assert [found for path in files for found in violations(path)] == []


def test_the_imports_between_rooms_are_seen() -> None:
    """The test above would also pass if it saw no import at all."""
    seen = {(room_of(f"taskvec.{path.parent.name}"), room_of(m)) for path in PACKAGE.glob("*/*.py") for m in imported(path)}
    assert {("checkpoint", "errors"), ("delta", "checkpoint"), ("run", "delta"), ("cli", "run")} <= seen


@pytest.mark.parametrize(
    ("room", "line"),
    [("checkpoint", "from ..run.plan import Plan"), ("delta", "from ..run import plan"), ("delta", "from .. import run"),
     ("run", "import taskvec.cli.main"), ("run", "from taskvec.insight import inspect"),
     ("insight", "from ..hub import push"), ("run", "def f():\n    from ..cli.main import main"),
     ("errors", "from .checkpoint import files"),
     ("hub", "from taskvec import Checkpoint")],
)  # fmt: skip
def test_an_import_from_above_is_found(room: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    path = tmp_path / "errors.py" if room == "errors" else tmp_path / room / "module.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    assert len(violations(path)) == 1
