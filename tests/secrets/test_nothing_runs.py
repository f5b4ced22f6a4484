"""No code of a model and no pickle is run, by two looks: at every line of the package, and at what Python itself reports of
runs that meet hostile files."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .custom import CODE, UNUSED, write_custom

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "taskvec").rglob("*.py"))

# --- every line of the package ---------------------------------------------------------------------------------------------

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile", "breakpoint"}
FORBIDDEN_ATTRIBUTES = {
    "torch.load", "torch.hub", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "os.system", "os.popen", "numpy.load",
    "np.load", "np.fromregex", "importlib.reload", "builtins.eval", "builtins.exec",
}  # fmt: skip
FORBIDDEN_MODULES = {
    "pickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "runpy",
    "imp",
    "code",
    "codeop",
}
_OWN_TABLE = "a module of this package, by a table in the file"
ALLOWED = {  # (file, what): why it is harmless
    ("__init__.py", "importlib.import_module"): _OWN_TABLE,
    ("cli/main.py", "importlib.import_module"): _OWN_TABLE,
    ("delta/adapters/__init__.py", "importlib.import_module"): _OWN_TABLE,
    ("delta/adapters/single_file.py", "importlib.import_module"): _OWN_TABLE,
    ("run/torch_kernel.py", "importlib.import_module"): "a module of this package",
    ("insight/curve.py", "importlib.util"): "whether matplotlib is installed",
    ("insight/evaluator.py", "subprocess"): "the command that the user typed after --eval",
}


RISKY = {"importlib.import_module", "importlib.util", "yaml.load", "subprocess", "transformers.dynamic_module_utils"}


def uses(tree: ast.AST) -> Iterator[str]:
    """What a file imports or calls that could run something, by its dotted name."""
    for node in ast.walk(tree):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute) and f"{ast.unparse(node.value)}.{node.attr}" in RISKY | FORBIDDEN_ATTRIBUTES:
            yield f"{ast.unparse(node.value)}.{node.attr}"
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_CALLS:
            yield node.id
        foreign = FORBIDDEN_MODULES | {"transformers", "peft", "diffusers"}
        yield from (n for n in imported if n.partition(".")[0] in foreign or n in RISKY | FORBIDDEN_ATTRIBUTES)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "torch.load(x)", "from torch import load", "yaml.load(x)", "eval(x)",
        "f = exec", "import runpy", "from transformers import AutoModel", "importlib.import_module(x)", "os.system(x)",
        "from importlib import util", "import importlib.util", "np.load(x)", "from subprocess import run",
        "import transformers",
    ],
)  # fmt: skip
def test_the_look_at_the_lines_sees_what_it_should(line: str) -> None:
    assert set(uses(ast.parse(line)))


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_line_of_the_package_could_run_what_a_file_says(path: Path) -> None:
    name = path.relative_to(ROOT / "taskvec").as_posix()
    found = set(uses(ast.parse(path.read_text())))
    assert found <= {what for file, what in ALLOWED if file == name}


def test_what_is_allowed_is_there_and_no_more_than_that() -> None:
    for file, what in ALLOWED:
        assert what in set(uses(ast.parse((ROOT / "taskvec" / file).read_text()))), (file, what)


# --- what Python reports ---------------------------------------------------------------------------------------------------

WATCHED = """
import json, os, sys
events = []

def hook(name, args):
    if name == "open":
        path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else str(args[0])
        events.append((name, path, args[1], args[2]))
    elif name == "exec":
        events.append((name, args[0].co_filename))
    elif name in ("compile", "import"):
        events.append((name, str(args[1] if name == "compile" else args[0])))
    elif name.startswith(("os.", "shutil.")) or name in KINDS:
        events.append((name, *map(str, args)))

KINDS = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "ctypes.dlopen", "marshal.loads")
where = sys.argv.pop(1)
sys.argv[0] = "taskvec"
sys.addaudithook(hook)
from taskvec.cli.main import main
try:
    main()
except SystemExit as stop:
    code = stop.code
seen = list(events)
with open(where, "w") as file:
    json.dump([code, seen], file)
"""
CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate",
            "os.utime", "shutil.rmtree", "shutil.move")  # fmt: skip
INSIDE = ("os.remove", "os.rmdir")  # with a folder's descriptor, within shutil.rmtree, which is an event of its own
STARTING = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
            "os.startfile", "socket.connect", "socket.getaddrinfo")  # fmt: skip


class Evil:
    """A pickle that says when it was opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch it-ran",)


def booby_trap(folder: Path) -> None:
    for name in (*CODE, *UNUSED):
        path = folder / name
        path.write_text(f"open('it-ran', 'w')\n{path.read_text()}")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "x.ckpt", "sub/pytorch_model.bin", "state.pkl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(Evil()))
    (folder / "conftest.py").write_text("open('it-ran', 'w')")
    (folder / "__init__.py").write_text("open('it-ran', 'w')")
    (folder / "README.md").write_text("---\nlicense: !!python/object/apply:os.system ['touch it-ran']\n---\n")
    (folder / "sitecustomize.py").write_text("open('it-ran', 'w')")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "old")):
        booby_trap(write_custom(tmp_path / name, seed))
    return tmp_path


def watched(here: Path, *arguments: str) -> tuple[int, list[list[Any]]]:
    """The exit code of the command, in a process of its own, and what Python reported of it. The log lies beside `here`."""
    log = here.parent / f"{here.name}-log.json"
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(log), *arguments], cwd=here, env=env, capture_output=True, text=True, timeout=120
    )
    assert log.exists(), done.stderr
    code, events = json.loads(log.read_text())
    log.unlink()
    return int(code or 0), events


def below(here: Path, name: object) -> str | None:
    """The path relative to the working directory, if it is in it."""
    path = Path(os.path.normpath(here / str(name)))
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else None


def written(here: Path, events: list[list[Any]]) -> set[str]:
    """The first parts of all paths that were changed or opened to be written; whole paths, if they are elsewhere."""
    whole = [event for event in events if event[0] in CHANGING and (event[0] not in INSIDE or event[-1] == "-1")]
    names = [str(part) for name, *parts in whole for part in parts[: 2 if name == "os.rename" else 1]]
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    names += [path for name, path, *how in (e for e in events if e[0] == "open") if how[1] & flags and path != os.devnull]
    return {(below(here, name) or name).partition("/")[0] if below(here, name) else name for name in names}


RUNS = [
    ["subtract", "base", "old", "-a", "0.5", "-o", "out", "-v"],
    ["subtract", "base", "old", "-a", "0.5", "-o", "out", "--no-code"],
    ["add", "base", "old", "-a", "0.5", "-o", "out.safetensors", "--json"],
    ["extract", "base", "old", "-o", "out"],
    ["lora", "extract", "base", "old", "--rank", "2", "-o", "out"],
    ["inspect", "base"],
    ["diff", "base", "old"],
    ["inspect", "base/pytorch_model.bin"],
    ["subtract", "base", "base/optimizer.pt", "-a", "1", "-o", "out"],
    ["inspect", "base/sub"],
]


@pytest.mark.parametrize("command", RUNS, ids=lambda command: " ".join(command[:2] + command[-1:]))
def test_python_itself_reports_nothing_but_reads_of_inputs_and_writes_of_the_output(command: list[str], here: Path) -> None:
    refused = any(part.endswith((".bin", ".pt", "/sub")) for part in command)
    code, events = watched(here, *command)
    assert (code != 0) == refused
    assert not (here / "it-ran").exists()
    assert [event for event in events if event[0] in STARTING] == []
    for kind, name in (event[:2] for event in events if event[0] in ("exec", "compile", "import", "ctypes.dlopen")):
        assert not below(here, name) or "/" not in str(name), (kind, name)
        assert str(name).partition(".")[0] not in {Path(own).stem for own in (*CODE, *UNUSED)}, (kind, name)
    opened = {below(here, event[1]) for event in events if event[0] == "open"}
    assert refused or {f"{name}/model.safetensors" for name in command if name in ("base", "old")} <= opened
    assert not {name for name in opened if name and name.endswith((".bin", ".pt", ".ckpt", ".pkl"))}
    changed = written(here, events)
    assert all(name in ("out", "out.safetensors") or name.startswith(".out") for name in changed), changed
    assert bool(changed) == ("-o" in command and not refused)


def test_code_that_no_config_names_is_not_even_opened(here: Path) -> None:
    _, events = watched(here, *RUNS[0])
    opened = {below(here, event[1]) for event in events if event[0] == "open"}
    assert {f"base/{name}" for name in CODE} <= opened
    assert not opened & {f"base/{name}" for name in (*UNUSED, "sitecustomize.py", "conftest.py")}


def test_the_watch_sees_what_it_should(here: Path) -> None:
    """Or the tests above could not fail."""
    code = "import pickle, os; pickle.load(open('base/state.pkl', 'rb')); exec(open('base/factor.py').read())"
    watch = WATCHED.replace("from taskvec.cli.main import main", f"main = lambda: exec({code!r})")
    log = here.parent / f"{here.name}-own.json"
    watch = watch.replace("except SystemExit as stop:\n    code = stop.code", "finally:\n    code = 0")
    subprocess.run([sys.executable, "-c", watch, str(log)], cwd=here, check=True, timeout=60)
    _, events = json.loads(log.read_text())
    assert {"pickle.find_class", "os.system"} <= {event[0] for event in events}
    assert {"base/state.pkl", "base/factor.py"} <= {below(here, event[1]) for event in events if event[0] == "open"}
    assert written(here, events) == {"it-ran"} and (here / "it-ran").exists()


def test_a_pickle_is_refused_by_the_line_that_says_so(here: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "model.safetensors.bin")
    code, events = watched(here, "inspect", "model.safetensors.bin")
    assert code == 1 and "model.safetensors.bin" not in {below(here, event[1]) for event in events if event[0] == "open"}
