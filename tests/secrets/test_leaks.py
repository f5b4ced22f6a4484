"""Secrets are planted everywhere a run could pick one up; then every byte that leaves is searched for them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from taskvec.cli.main import _run
from taskvec.errors import show

from ..hub.stand_in import Hub

MARK = "PLANTED"  # in every secret, and in every path of this machine
WRONG = "hf_" + MARK + "x" * 27  # as long as a token of the Hub is
SHAPES = {"h.0.up.weight": (6, 4), "h.1.up.weight": (6, 4), "norm.weight": (4,)}

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own upload


class World(NamedTuple):
    """The working directory of the user, and the Hub."""

    here: Path
    hub: Hub
    capture: pytest.CaptureFixture[str]
    patch: pytest.MonkeyPatch

    def run(self, *arguments: str) -> tuple[int, str]:
        """The exit code, and all that was printed."""
        self.patch.setattr(sys, "argv", ["taskvec", *arguments])
        code = _run()
        out, err = self.capture.readouterr()
        if "--json" in arguments:
            json.loads(out)
        return code, out + err

    @property
    def secrets(self) -> list[bytes]:
        return [MARK.encode(), self.hub.token.encode(), str(self.here).encode()]

    def assert_clean(self, what: str, content: bytes | str) -> None:
        raw = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
        for secret in self.secrets:
            at = raw.find(secret)
            assert at < 0, f"{what}: …{raw[max(0, at - 60) : at + 60]!r}…"


def write_model(folder: Path, seed: int, **config: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    save_file({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text("{}")


def plant(base: Path, private: Path) -> None:
    """What lies about in a model folder and is nobody's business."""
    private.mkdir()
    for name in ("id_rsa", "notes.txt", "modeling_own.py", "generation_config.json"):
        (private / name).write_text(f"{MARK} key")
        (base / name).symlink_to(private / name)
    (base / "more").symlink_to(private)
    for name in (".env", ".netrc", ".git/config", ".huggingface/token", "sub/.env", "sub/.ssh/id_ed25519"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(f"HF_TOKEN={MARK}")
    (base / "tokenizer_config.json").write_text(
        json.dumps({"name_or_path": f"C:\\Users\\{MARK}\\gpt", "model_max_length": 9})
    )
    places = {"tokenizer_file": f"/home/{MARK}/t.json", "special_tokens_map_file": f"~/{MARK}/s.json"}
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "config_sentence_transformers.json"):
        (base / "0_T").mkdir(exist_ok=True)
        nested = {"_name_or_path": f"file:///home/{MARK}/base", "encoders": [{"text": {"name_or_path": f"/{MARK}/a"}}]}
        (base / "0_T" / name).write_text(json.dumps({**places, **nested}))
    (base / "README.md").write_text(f"---\nlicense: mit\n---\nMade on {MARK} in /home/{MARK}\n")
    (base / "training_args.bin").write_text(MARK)
    (base / "trainer_state.json").write_text(f'{{"log": "/home/{MARK}/runs"}}')


@pytest.fixture
def world(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[World]:
    here = tmp_path / f"{MARK}-home" / "work"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.delenv("TASKVEC_DEBUG", raising=False)
    place = f"/home/{MARK}/models/base"
    write_model(here / "base", 1, _name_or_path=place, text_config={"_name_or_path": place})
    write_model(here / "old", 2, _name_or_path=place)
    plant(here / "base", tmp_path / f"{MARK}-private")
    (here / "lora").mkdir()
    factors = {
        f"base_model.model.h.{i}.up.lora_{x}.weight": torch.ones(s) for i in (0, 1) for x, s in (("A", (2, 4)), ("B", (6, 2)))
    }
    save_file(factors, here / "lora" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": place, "revision": None}
    (here / "lora" / "adapter_config.json").write_text(json.dumps(config))
    (here / "evaluate.py").write_text("import sys; open(sys.argv[2] + '/r.json', 'w').write('{\"m\": 1}')")
    save_file({"another.w": torch.ones(3)}, here / "other.safetensors")
    for name in ("base", "old"):
        files = {path.name: path.read_bytes() for path in (here / name).glob("*.[jsm]*") if not path.is_symlink()}
        hub.add_model(f"org/{name}", {n: c for n, c in files.items() if MARK.encode() not in c or n == "config.json"})
    hub.client.home.mkdir(exist_ok=True)
    (hub.client.home / "token").write_text(hub.token)
    (hub.client.home / "stored_tokens").write_text(f"[me]\nhf_token = {hub.token}\n")
    yield World(here, hub, capsys, monkeypatch)


EVALUATE = f"{sys.executable} evaluate.py {{model}} {{out}}"
SUCCESS: list[list[str]] = [
    ["subtract", "base", "old", "-a", "0.5", "-o", "out", "-v"],
    ["subtract", "base", "old", "-a", "0.5", "-o", "dtype", "--out-dtype", "bfloat16", "--json"],
    ["subtract", "base", "old", "-a", "0.5", "-o", "dry", "--dry-run"],
    ["subtract", "base", "old", "-a", "0.5", "-o", "dry", "--dry-run", "--json"],
    ["subtract", "base", "old", "-a", "0.5", "-o", "one.safetensors", "--json", "--sha256"],
    ["add", "base", "lora", "-a", "0.5", "-o", "added", "--json", "--no-code"],
    ["lora", "merge", "base", "lora", "-o", "merged", "-v"],
    ["lora", "extract", "base", "old", "--rank", "2", "-o", "adapter", "-v"],
    ["lora", "extract", "base", "old", "--rank", "2", "-o", "adapter2", "--json"],
    ["extract", "base", "old", "-o", "vector"],
    ["extract", "base", "lora", "-o", "vector.safetensors", "--json"],
    ["subtract", "base", "vector", "-a", "1", "-o", "of-vector"],
    ["diff", "base", "old", "--tensors"],
    ["diff", "base", "out", "--json"],
    ["inspect", "base"],
    ["inspect", "lora", "--json"],
    ["inspect", "one.safetensors", "--json"],
    *(["verify", output] for output in ("out", "one.safetensors", "vector", "added")),
    *(["verify", output, "--full", "--json"] for output in ("out", "one.safetensors", "vector", "added")),
    ["verify", "adapter"],
    ["sweep", "base", "old", "--alpha", "0.5,1", "--eval", EVALUATE, "--metric", "/m", "-o", "swept"],
    ["inspect", "org/base"],
    ["inspect", f"https://huggingface.co/org/base?token={WRONG}", "--json"],
    ["subtract", "org/base", "org/old", "-a", "0.5", "-o", "hub-out", "-v"],
    ["verify", "hub-out", "--full"],
    ["push", "out", "me/out"],
    ["push", "adapter", "me/adapter", "--json"],
    ["push", "vector", "me/vector", "--private"],
    ["subtract", "org/base", "old", "-a", "0.5", "--push", "me/pushed", "--private", "-v"],
    ["add", "base", "org/old", "-a", "0.5", "--push", "me/pushed-too", "--json"],
]  # fmt: skip
MADE = [
    "out", "dtype", "one.safetensors", "added", "merged", "adapter", "adapter2", "vector", "vector.safetensors", "of-vector",
    "swept", "hub-out", "pushed", "pushed-too",
]  # fmt: skip


def files_of(path: Path) -> dict[str, bytes]:
    found = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
    return {inner.relative_to(path.parent).as_posix(): inner.read_bytes() for inner in found}


def test_nothing_that_was_planted_leaves_by_a_run_that_succeeds(world: World) -> None:
    inputs = set(world.here.iterdir())
    for command in SUCCESS:
        with_token = ["--token", world.hub.token] if "org/base" in command or "push" in command else []
        code, printed = world.run(*command, *with_token)
        assert code == 0, (command, printed)
        world.assert_clean(" ".join(command), printed)
    assert {path.name for path in set(world.here.iterdir()) - inputs} == set(MADE)
    outputs = {name: content for made in MADE for name, content in files_of(world.here / made).items()}
    assert len(outputs) > 50
    for name, content in outputs.items():
        if not name.startswith("swept/logs"):  # what the user's own command printed
            world.assert_clean(name, content)
            world.assert_clean(name, name)
    for repo in world.hub.repos.keys() - {"org/base", "org/old"}:
        for name, content in world.hub.files(repo).items():
            world.assert_clean(f"{repo}/{name}", content)
            assert b"from_output" not in content
        assert all(MARK not in f"{commit.title}" for commit in world.hub.commits(repo))
    for request in world.hub.requests:
        world.assert_clean("a request", f"{request.path}?{request.query} {request.agent}")


def test_links_and_hidden_files_stay_behind_and_of_links_it_is_said(world: World) -> None:
    code, printed = world.run("subtract", "base", "old", "-a", "0.5", "-o", "out", "--dry-run")
    assert code == 0
    for name in ("id_rsa", "notes.txt", "modeling_own.py", "generation_config.json"):
        assert f"{name} is a link out of the model folder: not copied" in printed
    assert "more is not a regular file: not copied" in printed
    assert world.run("subtract", "base", "old", "-a", "0.5", "-o", "out")[0] == 0
    assert {path.name for path in (world.here / "out").rglob("*")} == {
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "taskvec.json", "0_T",
        "generation_config.json", "preprocessor_config.json", "config_sentence_transformers.json",
    }  # fmt: skip


def test_of_places_in_the_configs_only_the_name_is_kept_and_it_is_said(world: World) -> None:
    code, printed = world.run("subtract", "base", "old", "-a", "0.5", "-o", "out", "--dry-run")
    assert code == 0 and "config.json: of its _name_or_path, an absolute path, only the last part is kept" in printed
    world.run("subtract", "base", "old", "-a", "0.5", "-o", "out")
    config = json.loads((world.here / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "_name_or_path": "base", "text_config": {"_name_or_path": "base"}}
    tokenizer = json.loads((world.here / "out" / "tokenizer_config.json").read_text())
    assert tokenizer == {"name_or_path": "gpt", "model_max_length": 9}
    for path in (world.here / "out" / "0_T").iterdir():
        assert json.loads(path.read_text()) == {
            "tokenizer_file": "t.json", "special_tokens_map_file": "s.json", "_name_or_path": "base",
            "encoders": [{"text": {"name_or_path": "a"}}],
        }  # fmt: skip
    assert len(list((world.here / "out" / "0_T").iterdir())) == 4
    (world.here / "base" / "config.json").write_text('{ "_name_or_path":  "org/name" }')
    world.run("subtract", "base", "old", "-a", "0.5", "-o", "again")
    assert (world.here / "again" / "config.json").read_text() == '{ "_name_or_path":  "org/name" }'


def test_inputs_named_by_their_absolute_paths_are_called_by_their_names_in_what_is_made(world: World) -> None:
    base, old, lora = (str(world.here / name) for name in ("base", "old", "lora"))
    for command in (
        ["subtract", base, old, "-a", "0.5", "-o", "out"], ["add", base, lora, "-a", "1", "-o", "one.safetensors"],
        ["extract", base, old, "-o", "vector"], ["lora", "extract", base, old, "--rank", "1", "-o", "adapter"],
    ):  # fmt: skip
        code, printed = world.run(*command)
        assert code == 0
        world.assert_clean(" ".join(command[:2]), printed)
    for made in ("out", "one.safetensors", "vector", "adapter"):
        for name, content in files_of(world.here / made).items():
            world.assert_clean(name, content)


FAILURES: dict[str, list[str]] = {
    "nothing there": ["subtract", "base", "nowhere", "-a", "1", "-o", "x"],
    "another model": ["subtract", "base", "other.safetensors", "-a", "1", "-o", "x"],
    "the output is there": ["subtract", "base", "old", "-a", "1", "-o", "old2"],
    "the output is an input": ["subtract", "base", "old", "-a", "1", "-o", "base/x"],
    "a pickle": ["subtract", "base", "base/training_args.bin", "-a", "1", "-o", "x"],
    "a link to a secret as a model": ["inspect", "base/id_rsa"],
    "a hidden file as a model": ["inspect", "base/.env"],
    "a secret as a mask": ["subtract", "base", "old", "-a", "1", "-o", "x", "--mask", "base/.env"],
    "no output of ours": ["verify", "base"],
    "not ours, to the Hub": ["push", "base", "me/x"],
    "a user and a password": ["inspect", f"https://{MARK}:{MARK}@huggingface.co/org/base"],
    "a password in hf://": ["inspect", f"hf://{MARK}:{MARK}@huggingface.co/org/base"],
    "a token as the user": ["subtract", "base", f"https://{WRONG}@huggingface.co/org/base", "-a", "1", "-o", "x"],
    "a password in the output": ["subtract", "base", "old", "-a", "1", "-o", f"https://{MARK}:{MARK}@example.org/x"],
    "a password in the repository": ["push", "old2", f"https://{MARK}:{MARK}@huggingface.co/me/x"],
    "a password in --push": ["subtract", "base", "old", "-a", "1", "--push", f"https://{MARK}:{MARK}@huggingface.co/me/x"],
    "a token in place of a model": ["inspect", WRONG],
    "a token in place of a repository": ["push", "old2", WRONG],
    "a token as a command": [WRONG],
    "a token of another kind": ["inspect", f"hf_oauth_{MARK}.{'x' * 40}-_y"],
    "a token of a job": ["inspect", f"hf_jwt_{'e' * 20}.{MARK}.{'z' * 20}"],
    "a token of an organisation": ["inspect", f"api_org_{MARK}{'x' * 30}"],
    "a token in an address": ["inspect", f"https://huggingface.co/org/nowhere?token={MARK}"],
    "a signature in an address": ["inspect", f"https://example.org/a/b?download=1&X-Amz-Signature={MARK}"],
    "a signature in a name": ["subtract", "base", f"org/base?x={MARK}&y={MARK}", "-a", "1", "-o", "x"],
    "a slash in a password": ["inspect", f"https://user:p/{MARK}@huggingface.co/org/base"],
    "a slash in a password in hf://": ["inspect", f"hf://user:p/{MARK}@huggingface.co/org/base"],
    "a slash in a password of the output": ["push", "old2", f"https://user:p/{MARK}@huggingface.co/me/x"],
    "a token as a number": ["subtract", "base", "old", "--alpha", WRONG, "-o", "x"],
    "a token as a choice": ["subtract", "base", "old", "--alpha", "1", "-o", "x", "--out-dtype", WRONG],
    "a token as a device": ["subtract", "base", "old", "--alpha", "1", "-o", "x", "--device", WRONG],
    "a wrong token": ["inspect", "org/secret", "--token", WRONG],
    "a wrong token, and a push": ["push", "old2", "me/x", "--token", WRONG],
    "no such repository": ["subtract", "org/nowhere", "old", "-a", "1", "-o", "x"],
    "a metric that is not there": [
        "sweep", "base", "old", "--alpha", "1", "--eval", EVALUATE, "--metric", "/x", "-o", "swept"
    ],
}  # fmt: skip


def test_what_is_no_secret_is_shown() -> None:
    for name in (
        "hf-internal-testing/tiny-random-LlamaForCausalLM", "hf://org/base@v1", "https://huggingface.co/org/base@v1.0",
        "https://huggingface.co/org/base/tree/main", "a?b", "what? x = 1", "hf_model", "base & old", "model.layers.0.weight",
    ):  # fmt: skip
        assert show(name) == name


@pytest.mark.parametrize("start", ["://a:", "://", "?a", "&a=", "hf_", "hf_jwt_", "hf_a.", "://a@", "a" * 99 + "=?"])
def test_a_name_made_to_be_slow_is_shown_in_little_time(start: str) -> None:
    started = time.process_time()
    assert len(show(start * (1 << 20), 2000)) < 2100
    assert time.process_time() - started < 5


@pytest.mark.parametrize("case", FAILURES)
def test_nothing_that_was_planted_is_said_by_a_run_that_fails(case: str, world: World) -> None:
    assert world.run("subtract", "base", "old", "-a", "1", "-o", "old2", "--no-fsync")[0] == 0
    world.hub.add_model("org/secret", {"config.json": b"{}"}, private=True)
    command, before = FAILURES[case], set(world.here.iterdir())
    for options in ([], ["--json"]) if command[0] != "lora" else ([],):
        code, printed = world.run(*command, *options)
        assert code in (1, 2, 3) and "Traceback" not in printed, printed
        world.assert_clean(case, printed)
    assert {path.name for path in set(world.here.iterdir()) - before} <= {"swept"}


def test_a_verification_that_fails_says_nothing_of_what_was_planted(world: World) -> None:
    world.run("subtract", "base", "old", "-a", "1", "-o", "out", "--no-fsync")
    out = world.here / "out"
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").symlink_to(world.here.parent.parent / f"{MARK}-private" / "notes.txt")
    (out / ".env").write_text(MARK)
    (out / "pytorch_model.bin").write_text(MARK)
    for options in ([], ["--json"], ["--full"]):
        code, printed = world.run("verify", "out", *options)
        assert code == 3 and "tokenizer.json" in printed and "pytorch_model.bin" in printed
        world.assert_clean("verify", printed)
    code, printed = world.run("push", "out", "me/x")
    assert code != 0 and "me/x" not in world.hub.repos
    world.assert_clean("push", printed)
