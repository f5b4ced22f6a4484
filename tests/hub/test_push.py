"""An output on its way to the Hub: one commit or none, nothing sent twice, nothing that is not ours; failures in one line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import taskvec as tv

from .stand_in import Hub, refusals

FIRST, SECOND, INDEX = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"
OURS = {FIRST, SECOND, INDEX, "config.json", "tokenizer.json", "README.md", "taskvec.json"}


def model(folder: Path, seed: int) -> Path:
    """Two tensors of 400 kB, and what belongs to a model."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    save_file(
        {name: torch.randn(100, 1000, generator=generator) for name in ("a.weight", "b.weight")}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished output in the working directory: two shards."""
    here = tmp_path / "work"
    model(here / "base", 1)
    model(here / "old", 2)
    monkeypatch.chdir(here)
    tv.subtract("base", "old", alpha=0.5, output="out", max_shard_size=500_000, fsync=False)
    return here / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def on_hub(hub: Hub, repo: str, revision: str = "main") -> dict[str, bytes]:
    return {name: data for name, data in hub.files(repo, revision).items() if name != ".gitattributes"}


def assert_pushed(hub: Hub, repo: str, out: Path, revision: str = "main") -> None:
    there, here = on_hub(hub, repo, revision), contents(out)
    assert there.keys() == here.keys() == OURS
    assert all(there[name] == here[name] for name in OURS - {"taskvec.json"})


def test_an_output_goes_up_in_one_commit(either_hub: Hub, out: Path) -> None:
    before = contents(out)
    pushed = tv.push(out, "me/edited", private=True)
    assert_pushed(either_hub, "me/edited", out)
    assert either_hub.commits("me/edited")[0].title == "edited = base − 0.5·(old − base)"
    assert len(either_hub.commits("me/edited")) == 2  # the one that made the repository, and ours
    assert pushed.commit == either_hub.head("me/edited") and either_hub.repos["me/edited"].private
    assert pushed.files == len(OURS) and pushed.nbytes == sum(map(len, on_hub(either_hub, "me/edited").values()))
    assert contents(out) == before


def test_a_reader_never_sees_half_a_model(hub: Hub, out: Path) -> None:
    tv.push(out, "me/edited")
    old = on_hub(hub, "me/edited")
    tv.subtract("base", "old", alpha=0.9, output="next", max_shard_size=500_000, fsync=False)
    seen: list[bool] = []
    for route in ("preupload", "lfs_batch", "lfs_put", "commit"):
        hub.fault(route, then=lambda: seen.append(on_hub(hub, "me/edited") == old), status=None, times=9)
    tv.push(Path("next"), "me/edited")
    assert len(seen) >= 4 and all(seen)
    assert on_hub(hub, "me/edited") != old


def test_pull_subtract_push_pull_gives_equal_bytes(either_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    for seed, name in enumerate(("base", "old")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(name)
        either_hub.add_model(f"org/{name}", Path(name))
    tv.subtract("base", "old", alpha=0.3, output="expected", fsync=False)
    edited = tv.Checkpoint.open("org/base") - 0.3 * tv.TaskVector.between("org/base", "org/old")
    pushed = edited.push_to_hub("me/edited", fsync=False)
    assert (tmp_path / "edited/taskvec.json").is_file() and pushed.repo == "me/edited"
    back = AutoModelForCausalLM.from_pretrained("me/edited").state_dict()
    expected = AutoModelForCausalLM.from_pretrained("expected").state_dict()
    assert all(back[name].equal(tensor) for name, tensor in expected.items())
    assert on_hub(either_hub, "me/edited")["model.safetensors"] == Path("expected/model.safetensors").read_bytes()
    again = tv.Checkpoint.open("me/edited")
    assert set(again.tensors) == set(tv.Checkpoint.open("expected").tensors)


def test_one_line_pulls_subtracts_and_pushes(hub: Hub, out: Path) -> None:
    here = hub.client.here
    for name in ("base", "old"):
        hub.add_model(f"org/{name}", out.parent / name)
    done = hub.client.run("taskvec", "subtract", "org/base", "org/old", "--alpha", "0.5", "--push", "me/forgot", "--private")
    assert done.returncode == 0, done.stderr
    assert hub.files("me/forgot")["model.safetensors"] == (here / "forgot/model.safetensors").read_bytes()
    assert hub.repos["me/forgot"].private and "me/forgot/tree/" in done.stdout
    card = hub.files("me/forgot")["README.md"].decode()
    assert "- org/base\n- org/old\n" in card and f"taskvec subtract org/base@{hub.head('org/base')}" in card


def test_only_what_the_record_lists_goes_up(hub: Hub, out: Path) -> None:
    for name in (".env", "notes.txt", "optimizer.pt", "sub/other.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("hf_secret")
    (out / "link.json").symlink_to("/etc/hostname")
    tv.push(out, "me/edited")
    assert on_hub(hub, "me/edited").keys() == OURS


def test_no_place_of_this_machine_and_no_token_goes_up(hub: Hub, out: Path) -> None:
    assert "from_output" in (out / "taskvec.json").read_text()
    tv.push(out, "me/edited")
    everything = b"".join(on_hub(hub, "me/edited").values())
    assert b"from_output" not in everything and b"../base" not in everything and b"/work" not in everything
    assert hub.token.encode() not in everything
    assert not any(request.token for request in hub.requests.of(host="cdn"))


def test_what_a_record_lists_outside_of_the_folder_is_refused(hub: Hub, out: Path) -> None:
    for evil in ("../base/config.json", ".env", "/etc/hostname", "sub/../../base/config.json"):
        record = json.loads((out / "taskvec.json").read_text())
        (out / ".env").write_text("x")
        (out / "taskvec.json").write_text(json.dumps({**record, "side_files": [evil]}))
        with pytest.raises(tv.OutputError, match="hidden or leads out"):
            tv.push(out, "me/edited")
        (out / "taskvec.json").write_text(json.dumps(record))
    (out / "config.json").unlink()
    (out / "config.json").symlink_to(out.parent / "base/config.json")
    with pytest.raises(tv.OutputError, match="leads out"):
        tv.push(out, "me/edited")
    assert "me/edited" not in hub.repos


def test_a_folder_that_verify_would_refuse_is_not_pushed(hub: Hub, out: Path) -> None:
    data = bytearray((out / SECOND).read_bytes())
    data[-1] ^= 1
    (out / SECOND).write_bytes(data)
    with pytest.raises(tv.VerificationError, match="not pushed"):
        tv.push(out, "me/edited")
    assert "me/edited" not in hub.repos


@pytest.mark.parametrize("what", ["nothing", "a model", "a file"])
def test_what_taskvec_did_not_make_is_not_pushed(what: str, hub: Hub, out: Path) -> None:
    source = {"nothing": "absent", "a model": "base", "a file": "base/model.safetensors"}[what]
    with pytest.raises(tv.TaskvecError, match=r"taskvec|no such"):
        tv.push(source, "me/edited")
    assert "me/edited" not in hub.repos


# --- again, and after an interruption -------------------------------------------------------------------------------------


def sent(hub: Hub) -> int:
    """Bytes of weights that were received by the Hub."""
    return int(hub.requests.of("lfs_put").received)


def test_a_push_that_is_made_twice_sends_nothing_twice(hub: Hub, out: Path) -> None:
    first = tv.push(out, "me/edited")
    before = sent(hub)
    second = tv.push(out, "me/edited")
    assert sent(hub) == before and second.commit == first.commit
    assert len(hub.commits("me/edited")) == 2


def test_after_a_kill_in_the_middle_only_the_rest_is_sent(hub: Hub, out: Path) -> None:
    children: list[subprocess.Popen[str]] = []
    hub.fault("lfs_put", skip=1, after_bytes=9, then=lambda: children[0].kill())
    children.append(hub.client.start("taskvec", "push", out, "me/edited"))
    children[0].communicate(timeout=60)
    hub.settle()
    assert len(hub.commits("me/edited")) == 1 and children[0].returncode != 0
    before = sent(hub)
    done = hub.client.run("taskvec", "push", out, "me/edited")
    assert done.returncode == 0, done.stderr
    assert sent(hub) - before == (out / SECOND).stat().st_size
    assert_pushed(hub, "me/edited", out)


def test_a_dropped_connection_is_said_and_the_next_push_goes_on(hub: Hub, out: Path) -> None:
    hub.fault("lfs_put", skip=1, after_bytes=1000, times=50)
    with pytest.raises(tv.HubError, match="me/edited") as caught:
        tv.push(out, "me/edited")
    assert "again" in str(caught.value) and "\n" not in str(caught.value)
    assert on_hub(hub, "me/edited") == {}
    hub.faults.clear()
    before = sent(hub)
    tv.push(out, "me/edited")
    assert sent(hub) - before <= (out / SECOND).stat().st_size
    assert_pushed(hub, "me/edited", out)


def test_a_commit_whose_answer_was_lost_is_found_again(hub: Hub, out: Path) -> None:
    hub.fault("commit", reply_lost=True)
    with pytest.raises(tv.HubError):
        tv.push(out, "me/edited")
    assert_pushed(hub, "me/edited", out)
    pushed = tv.push(out, "me/edited")
    assert pushed.commit == hub.head("me/edited") and len(hub.commits("me/edited")) == 2


def test_a_change_by_someone_else_meanwhile_is_not_overwritten(hub: Hub, out: Path) -> None:
    hub.create("me/edited")
    hub.fault("commit", then=lambda: hub.rival_commit("me/edited"), status=None)
    with pytest.raises(tv.HubError, match="changed by someone else"):
        tv.push(out, "me/edited")
    assert FIRST not in hub.files("me/edited")
    tv.push(out, "me/edited")
    assert hub.files("me/edited").keys() >= OURS


def test_a_smaller_model_leaves_no_shard_of_the_larger_one(hub: Hub, out: Path) -> None:
    tv.push(out, "me/edited")
    tv.subtract("base", "old", alpha=0.5, output="small", fsync=False)
    tv.push("small", "me/edited")
    assert on_hub(hub, "me/edited").keys() == OURS - {FIRST, SECOND, INDEX} | {"model.safetensors"}


def test_other_files_of_the_repository_are_left_alone(hub: Hub, out: Path) -> None:
    hub.add_model("me/edited", {"model.gguf": b"GGUF", "other.safetensors": save({"w": torch.ones(2)}), "notes.md": b"mine"})
    tv.push(out, "me/edited")
    assert on_hub(hub, "me/edited").keys() == OURS | {"model.gguf", "other.safetensors", "notes.md"}


# --- where to -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["me/edited@trial", "hf://me/edited@trial", "{0}/me/edited/tree/trial"])
def test_a_branch_is_made_where_it_is_missing(spelling: str, hub: Hub, out: Path) -> None:
    tv.push(out, spelling.format(hub.endpoint))
    assert_pushed(hub, "me/edited", out, "trial")
    assert on_hub(hub, "me/edited") == {}
    tv.push(out, "me/edited", revision="trial")
    assert len(hub.commits("me/edited", "trial")) == 2


def test_a_pull_request_changes_nothing_until_it_is_merged(hub: Hub, out: Path) -> None:
    hub.add_model("me/edited", {"config.json": b"{}"})
    pushed = tv.push(out, "me/edited", create_pr=True)
    assert pushed.pull_request and pushed.pull_request.endswith("/me/edited/discussions/1")
    assert on_hub(hub, "me/edited") == {"config.json": b"{}"}
    assert hub.files("me/edited", "refs/pr/1").keys() >= OURS
    with pytest.raises(tv.UsageError, match="main"):
        tv.push(out, "me/edited", create_pr=True, revision="trial")


def test_a_public_repository_is_not_made_private_and_a_warning_says_so(hub: Hub, out: Path) -> None:
    hub.create("me/edited", private=False)
    pushed = tv.push(out, "me/edited", private=True)
    assert not hub.repos["me/edited"].private and any("public" in warning for warning in pushed.warnings)
    hub.create("me/secret", private=True)
    assert tv.push(out, "me/secret").warnings == () and hub.repos["me/secret"].private


def test_a_card_of_ones_own_replaces_the_body(hub: Hub, out: Path, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# Mine\n\nA story.\n")
    tv.push(out, "me/edited", card=tmp_path / "card.md", commit_message="My words")
    card = hub.files("me/edited")["README.md"].decode()
    head = (out / "README.md").read_text().split("---")[1]
    assert card == f"---{head}---\n\n# Mine\n\nA story.\n" and hub.commits("me/edited")[0].title == "My words"


def test_what_the_hub_holds_is_compared(either_hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tv.push(out, "me/edited", verify_checksums=True)
    from huggingface_hub import HfApi

    real = HfApi.get_paths_info

    def other(self: Any, *arguments: Any, **options: Any) -> Any:
        found = real(self, *arguments, **options)
        for info in found:
            if info.path == SECOND:
                info.lfs.sha256 = "0" * 64
            if info.path == "config.json":
                info.blob_id = "0" * 40
        return found

    monkeypatch.setattr(HfApi, "get_paths_info", other)
    with pytest.raises(tv.HubError, match=rf"2 files differ from what was sent: {SECOND}, config.json"):
        tv.push(out, "me/edited", verify_checksums=True)


# --- what goes wrong ------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, str, Any, tuple[str, ...]]] = {
    "a namespace that is not ours": ("other/edited", "", None, ("other/edited", "may not", "hf auth login")),
    "a read token": ("me/edited", "read", None, ("me/edited", "may not", "write")),
    "no token": ("me/edited", "none", None, ("me/edited", "hf auth login")),
    "a wrong token": ("me/edited", "wrong", None, ("me/edited", "token was not accepted", "hf auth login")),
    "no storage left": ("me/edited", "", ("commit", refusals.storage_limit), ("me/edited", "no room", "quota")),
    "too many requests": ("me/edited", "", ("commit", refusals.rate_limit), ("me/edited", "too many requests", "Wait")),
    "not a name": ("not a name", "", None, ("not a name",)),
    "a broken hub": ("me/edited", "", ("commit", None), ("me/edited", "could not push", "again")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_refusal_is_one_line_and_the_output_stays(case: str, hub: Hub, out: Path) -> None:
    repo, token, fault, parts = REFUSED[case]
    tokens = {"": hub.token, "read": hub.add_token("read"), "none": None, "wrong": "hf_" + "x" * 34}
    hub.client.log_in(tokens[token])
    if fault is not None:
        hub.fault(fault[0], **({"refusal": fault[1](), "times": 9} if fault[1] else {"status": 500, "times": 9}))
    before = contents(out)
    done = hub.client.run("taskvec", "push", out, repo)
    assert done.returncode == 1, (done.returncode, done.stderr)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("taskvec: ") and all(part in last for part in parts), done.stderr
    assert "Traceback" not in done.stderr and (tokens[token] or "none at all") not in done.stderr
    assert contents(out) == before


def test_with_push_a_failure_says_how_to_push_the_finished_output(hub: Hub, out: Path) -> None:
    hub.client.log_in(hub.add_token("read"))
    done = hub.client.run(
        "taskvec", "subtract", out.parent / "base", out.parent / "old", "--alpha", "1", "--push", "me/forgot"
    )
    assert done.returncode == 1 and "forgot is complete: push it with `taskvec push forgot me/forgot`" in done.stderr
    assert (hub.client.here / "forgot/taskvec.json").is_file()


@pytest.mark.parametrize(
    "arguments", [("--private",), (), ("--push", "me/x", "-o", "x.safetensors"), ("--push", "x", "-o", "y")]
)
def test_options_that_make_no_sense_are_usage_errors(arguments: tuple[str, ...], hub: Hub, out: Path) -> None:
    done = hub.client.run("taskvec", "subtract", out.parent / "base", out.parent / "old", "--alpha", "1", *arguments)
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and not list(hub.client.here.iterdir())


def test_json_says_what_was_pushed(hub: Hub, out: Path) -> None:
    done = hub.client.run("taskvec", "push", out, "me/edited", "--json", "--verify")
    content = json.loads(done.stdout)
    assert content["ok"] and content["commit"] == hub.head("me/edited") and content["files"] == len(OURS)


# --- what the second reading found ----------------------------------------------------------------------------------------


def test_a_model_of_another_maker_does_not_stay_in_front_of_the_pushed_one(hub: Hub, out: Path) -> None:
    old = {"model.safetensors": save({"w": torch.ones(2)}), "adapter_config.json": b"{}", "pytorch_model.bin": b"\x80"}
    kept = {"ema.safetensors.index.json": b"{}", "notes.md": b"mine", "sub/model.safetensors": b"x"}
    hub.add_model("me/edited", {**old, **kept})
    pushed = tv.push(out, "me/edited")
    assert on_hub(hub, "me/edited").keys() == OURS | kept.keys()
    assert any("removed" in warning and "model.safetensors" in warning for warning in pushed.warnings)
    assert set(tv.Checkpoint.open("me/edited").tensors) == {"a.weight", "b.weight"}


def test_the_hint_after_a_failure_keeps_private_and_the_card(hub: Hub, out: Path, tmp_path: Path) -> None:
    (tmp_path / "my card.md").write_text("# Mine")
    hub.client.log_in(hub.add_token("read"))
    edit = ("subtract", out.parent / "base", out.parent / "old", "--alpha", "1", "--push", "me/forgot")
    done = hub.client.run("taskvec", *edit, "--private", "--card", tmp_path / "my card.md")
    assert f"`taskvec push forgot me/forgot --private --card '{tmp_path}/my card.md'`" in done.stderr
    assert "tensors" in done.stdout  # the report is not lost with the push


@pytest.mark.parametrize("end", ["\n", " "])
def test_a_token_with_what_a_file_ends_in_is_trimmed_and_not_shown(end: str, hub: Hub, out: Path) -> None:
    hub.client.log_in(None)
    assert tv.push(out, "me/edited", token=hub.token + end).repo == "me/edited"


@pytest.mark.parametrize("route", ["create_repo", "preupload", "lfs_batch"])
def test_a_file_that_changes_while_it_is_pushed_is_not_committed(route: str, hub: Hub, out: Path) -> None:
    def flip() -> None:
        data = bytearray((out / FIRST).read_bytes())
        data[-1] ^= 1
        (out / FIRST).write_bytes(data)

    hub.fault(route, then=flip, status=None)
    with pytest.raises(tv.TaskvecError, match=r"changed while|could not"):
        tv.push(out, "me/edited")
    assert FIRST not in hub.files("me/edited")


def test_a_pushed_output_is_verified_where_it_is(hub: Hub, out: Path) -> None:
    tv.push(out, "me/edited")
    found = tv.verify("me/edited")
    assert found.ok, found.problems


def test_what_was_pushed_is_seen_by_the_same_process(hub: Hub, out: Path) -> None:
    hub.add_model("me/edited", {"model.safetensors": save({"w": torch.ones(2)})})
    assert list(tv.Checkpoint.open("me/edited").tensors) == ["w"]
    tv.push(out, "me/edited")
    assert set(tv.Checkpoint.open("me/edited").tensors) == {"a.weight", "b.weight"}


def test_an_index_that_is_not_ours_neither_goes_up_nor_stops_the_push(hub: Hub, out: Path) -> None:
    (out / "z.safetensors.index.json").write_text("{}")
    (out / ".x.safetensors.index.json").write_text("{}")
    tv.push(out, "me/edited")
    assert on_hub(hub, "me/edited").keys() == OURS


def test_a_card_with_its_own_front_matter_is_the_whole_card(hub: Hub, out: Path, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    tv.push(out, "me/edited", card=tmp_path / "card.md")
    assert hub.files("me/edited")["README.md"] == (tmp_path / "card.md").read_bytes()
    (tmp_path / "card.md").write_bytes(b"\xff\xfe")
    with pytest.raises(tv.UsageError, match="UTF-8"):
        tv.push(out, "me/edited", card=tmp_path / "card.md")
    done = hub.client.run(
        "taskvec",
        "subtract",
        out.parent / "base",
        out.parent / "old",
        "--alpha",
        "1",
        "--push",
        "me/x",
        "--card",
        tmp_path / "card.md",
    )
    assert done.returncode == 2 and not list(hub.client.here.iterdir())


def test_a_branch_with_a_slash_is_named_after_the_at(hub: Hub, out: Path) -> None:
    tv.push(out, "me/edited@feature/x")
    assert_pushed(hub, "me/edited", out, "feature/x")


def test_offline_a_push_is_refused_before_anything_is_made(hub: Hub, out: Path) -> None:
    before = len(hub.requests)
    pushed = hub.client.run("taskvec", "push", str(out), "me/edited", HF_HUB_OFFLINE="1")
    edited = hub.client.run(
        "taskvec", "subtract", out.parent / "base", out.parent / "old", "--alpha", "1", "--push", "me/edited",
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    for done in (pushed, edited):
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert "me/edited: cannot push to it: HF_HUB_OFFLINE (or" in done.stderr
    assert not (hub.client.here / "edited").exists() and len(hub.requests) == before


@pytest.mark.parametrize("arguments", [("--push", "me/m.safetensors"), ("-o", "hf://me/x"), ("-o", "s3://me/x")])
def test_outputs_that_are_no_folder_here_are_usage_errors(arguments: tuple[str, ...], hub: Hub, out: Path) -> None:
    done = hub.client.run("taskvec", "subtract", out.parent / "base", out.parent / "old", "--alpha", "1", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not list(hub.client.here.iterdir())


def test_a_vector_and_an_adapter_are_pushed_too(hub: Hub, out: Path) -> None:
    tv.TaskVector.between("base", "old").save("vector", fsync=False)
    tv.push("vector", "me/vector")
    (tv.Checkpoint.open("base") - 0.5 * tv.TaskVector.open("hf://me/vector/vector.safetensors")).plan()
    tv.extract_lora("base", "old", output="lora", rank=4, fsync=False)
    tv.push("lora", "me/lora")
    (tv.Checkpoint.open("base") - tv.TaskVector.from_adapter("me/lora")).plan()
