"""Models from the Hub as inputs: names, revisions, what is fetched and when, and what goes wrong, in one line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import taskvec as tv
from taskvec.checkpoint import files, repository

from .small_models import FIRST, INDEX, SECOND, SHAPES, SIDE, adapter, sharded, tensors, weights
from .stand_in import Hub, refusals


@pytest.fixture
def local(models: Hub, tmp_path: Path) -> Path:
    """The same models as folders."""
    for name, held in {
        "base": {**sharded(1), **SIDE},
        "old": {"model.safetensors": save(tensors(2))},
        "lora": adapter(),
    }.items():
        for file, data in held.items():
            path = tmp_path / "local" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return tmp_path / "local"


def fetched(hub: Hub, file: str = "*.safetensors") -> int:
    """Bytes of whole files and ranges that went over the wire."""
    return int(hub.requests.of("cdn", file=file, method="GET").sent)


def test_names_of_the_hub_are_taken_wherever_a_path_is(models: Hub, local: Path, tmp_path: Path) -> None:
    tv.subtract("org/base", "org/old", alpha=0.3, output=tmp_path / "a", fsync=False)
    tv.subtract(local / "base", local / "old", alpha=0.3, output=tmp_path / "b", fsync=False)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    tv.subtract("org/base", "me/lora", alpha=0.3, output=tmp_path / "c", fsync=False)
    tv.subtract(local / "base", local / "lora", alpha=0.3, output=tmp_path / "d", fsync=False)
    assert weights(tmp_path / "c") == weights(tmp_path / "d") != weights(tmp_path / "b")
    made = {path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert made == {FIRST, SECOND, INDEX, "config.json", "tokenizer.json", "sub/chat.jinja", "README.md", "taskvec.json"}


@pytest.mark.parametrize(
    "spelling",
    [
        "org/base",
        "org/base@main",
        "org/base@v1",
        "hf://org/base",
        "hf://models/org/base@v1",
        "{0}/org/base",
        "{0}/org/base/tree/v1",
    ],
)
def test_every_spelling_of_a_name_is_understood(spelling: str, models: Hub) -> None:
    sha = models.add_model("org/base", {"notes.txt": b"x"}, tags=["v1"])
    checkpoint = tv.Checkpoint.open(spelling.format(models.endpoint))
    assert checkpoint.label == "org/base" and checkpoint.path.name == sha
    assert set(checkpoint.tensors) == set(SHAPES)


def test_a_file_of_a_repository_is_its_weights_alone(models: Hub) -> None:
    checkpoint = tv.Checkpoint.open(f"hf://org/base/{FIRST}")
    assert set(checkpoint.tensors) == {"model.embed.weight", "model.h.0.q.weight"} and checkpoint.folder is None


def test_a_local_path_comes_first(models: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/base").mkdir(parents=True)
    save_file({"w": torch.ones(2)}, tmp_path / "org/base/model.safetensors")
    before = len(models.requests)
    assert list(tv.Checkpoint.open("org/base").tensors) == ["w"] and len(models.requests) == before


@pytest.mark.parametrize("missing", ["./org/base", "/org/base", "base", "a/b/c", "base.safetensors"])
def test_what_is_no_name_asks_nobody(missing: str, models: Hub) -> None:
    before = len(models.requests)
    with pytest.raises(tv.CheckpointError, match="no such file or folder"):
        tv.Checkpoint.open(missing)
    assert len(models.requests) == before


def test_the_revision_is_resolved_once_and_recorded(models: Hub, tmp_path: Path) -> None:
    first = models.head("org/old")
    old = tv.TaskVector.between("org/base", "org/old")
    second = models.add_model("org/old", {"model.safetensors": save(tensors(3))})  # somebody pushes meanwhile
    assert second != first
    (tv.Checkpoint.open("org/base") - old).save(tmp_path / "out", fsync=False)
    record = json.loads((tmp_path / "out/taskvec.json").read_text())
    assert record["vector"][0]["tuned"]["revision"] == first
    card = (tmp_path / "out/README.md").read_text()
    assert first in card and f"org/old@{first}" in card and str(tmp_path) not in card
    head = card.split("---")[1]
    assert "- org/base\n- org/old\n" in head and "base_model_relation: merge" in head and "license: mit" in head


def test_a_revision_may_be_named_apart(models: Hub) -> None:
    first = models.head("org/old")
    models.add_model("org/old", {"model.safetensors": save(tensors(3))})
    assert tv.Checkpoint.open("org/old", revision=first).path.name == first
    with pytest.raises(tv.UsageError, match="another"):
        tv.Checkpoint.open("org/old@main", revision=first)
    with pytest.raises(tv.HubError, match="no such revision"):
        tv.Checkpoint.open("org/old@nope")


def test_headers_are_read_by_ranges_and_no_weights_come(models: Hub) -> None:
    inspected = tv.inspect("org/base")
    assert {tensor.name for tensor in inspected.tensors} == set(SHAPES)
    size = sum(len(data) for file, data in models.files("org/base").items() if file.endswith(".safetensors"))
    headers = sum(
        8 + int.from_bytes(d[:8], "little") for f, d in models.files("org/base").items() if f.endswith(".safetensors")
    )
    assert fetched(models) == headers < size / 2
    assert not models.requests.of("cdn", file="*.bin") and not models.requests.of(file="*tokenizer*")
    assert tv.inspect("me/lora").adapter["scales"] == {"2": 1}


def test_a_dry_run_says_what_would_be_downloaded_and_downloads_nothing(models: Hub, tmp_path: Path) -> None:
    edited = tv.Checkpoint.open("org/base") - 0.3 * tv.TaskVector.between("org/base", "org/old")
    before = fetched(models)
    plan = edited.plan(output=tmp_path / "out")
    assert fetched(models) == before
    sizes = {file: len(data) for repo in ("org/base", "org/old") for file, data in models.files(repo).items()}
    wanted = {FIRST, SECOND, "model.safetensors", "tokenizer.json", "sub/chat.jinja", "README.md"}
    assert {path.name for path in plan.to_download} == {Path(name).name for name in wanted}
    expected = sum(sizes[name] for name in (FIRST, SECOND, "model.safetensors", "sub/chat.jinja", "README.md")) + 2
    assert plan.summary()["bytes_to_download"] == expected
    assert "first download" in str(plan) and "6 files" in str(plan)


def test_only_the_shards_that_hold_wanted_tensors_come(models: Hub, tmp_path: Path) -> None:
    models.add_model("org/tuned", sharded(2))
    tv.subtract("org/base", "org/tuned", alpha=1, output=tmp_path / "out", include=["model.h.1.*"], fsync=False)
    tuned = models.client.cache / "models--org--tuned"
    assert {path.name for path in tuned.rglob("*.safetensors")} == {SECOND}
    assert not list(tuned.rglob("*.bin")) and not list((models.client.cache / "models--org--base").rglob("*.gguf"))


def test_a_run_that_downloaded_its_inputs_and_was_ended_goes_on_too(
    models: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write = files.write_all

    def failing(fd: int, data: memoryview, offset: int, *, path: Path) -> None:
        if path.name == SECOND:
            raise tv.OutputError("the end")
        write(fd, data, offset, path=path)

    with monkeypatch.context() as ended, pytest.raises(tv.OutputError, match="the end"):
        ended.setattr(files, "write_all", failing)
        tv.subtract("org/base", "org/old", alpha=0.3, output="a", jobs=1, fsync=False)
    report = tv.subtract("org/base", "org/old", alpha=0.3, output="a", jobs=1, fsync=False)
    assert report.notes == ("1 of 2 files taken from an interrupted run, and checked",)


def test_what_is_in_the_cache_is_not_fetched_again(models: Hub, tmp_path: Path) -> None:
    tv.subtract("org/base", "org/old", alpha=0.3, output=tmp_path / "a", fsync=False)
    before = fetched(models)
    tv.subtract("org/base", "org/old", alpha=0.5, output=tmp_path / "b", fsync=False)
    assert fetched(models) == before


def test_offline_the_cache_is_enough_and_says_what_it_lacks(models: Hub, tmp_path: Path) -> None:
    tv.subtract("org/base", "org/old", alpha=0.3, output=tmp_path / "a", fsync=False)
    done = models.client.run(
        "taskvec", "subtract", "org/base", "org/old", "--alpha", "0.3", "-o", "again", HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 0, done.stderr
    assert weights(models.client.here / "again") == weights(tmp_path / "a")
    lacking = models.client.run("taskvec", "subtract", "org/base", "me/lora", "--alpha", "1", "-o", "out", HF_HUB_OFFLINE="1")
    assert lacking.returncode == 1 and "me/lora" in lacking.stderr and "HF_HUB_OFFLINE" in lacking.stderr
    assert lacking.stderr.count("\n") == 1 and not (models.client.here / "out").exists()


def test_a_download_that_breaks_off_goes_on_where_it_stopped(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    large = {"w": torch.randn(200, 1000)}
    for name in ("base", "old"):
        hub.add_model(f"org/{name}", {"model.safetensors": save(large)})
    base = tv.Checkpoint.open("org/base")
    hub.fault("cdn", file="model.safetensors", skip=0, after_bytes=300_000, times=1)
    tv.subtract(base, "org/old", alpha=1, output=tmp_path / "out", fsync=False)
    assert fetched(hub) < 2 * len(save(large)) + 100_000  # not three times
    assert load_file(tmp_path / "out/model.safetensors")["w"].equal(large["w"])


PROBLEMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "no such repository": ("org/nothing", ("org/nothing", "no such repository", "hf auth login")),
    "private": ("other/private", ("other/private", "private one", "hf auth login")),
    "gated": ("other/gated", ("other/gated", "gated", "access")),
    "no such revision": ("org/base@nope", ("org/base@nope", "no such revision", "branch")),
    "no such file": ("hf://org/base/nope.safetensors", ("nope.safetensors",)),
    "a dataset": ("hf://datasets/org/data", ("dataset", "expected a model")),
    "no weights": ("org/empty", ("org", "no .safetensors")),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_every_problem_is_one_line_with_the_next_thing_to_type(case: str, models: Hub) -> None:
    models.add_model("other/private", {"config.json": b"{}"}, private=True)
    models.add_model("other/gated", {"config.json": b"{}", "model.safetensors": save(tensors(1))}, gated="manual")
    models.add_model("org/empty", {"config.json": b"{}"})
    source, parts = PROBLEMS[case]
    done = models.client.run("taskvec", "subtract", source, "org/old", "--alpha", "1", "-o", "out")
    assert done.returncode in (1, 2), done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert all(part in done.stderr for part in parts), done.stderr
    assert not (models.client.here / "out").exists()
    assert models.token not in done.stderr


def test_no_token_at_all(models: Hub) -> None:
    models.add_model("me/secret", {"model.safetensors": save(tensors(1))}, private=True)
    assert tv.Checkpoint.open("me/secret").label == "me/secret"
    models.client.log_in(None)
    done = models.client.run("taskvec", "inspect", "me/secret")
    assert done.returncode == 1 and "hf auth login" in done.stderr and done.stderr.count("\n") == 1


def test_a_token_may_be_given_apart_and_goes_nowhere_else(models: Hub, tmp_path: Path) -> None:
    models.add_model("me/secret", {"model.safetensors": save(tensors(1))}, private=True)
    models.client.log_in(None)
    done = models.client.run("taskvec", "inspect", "me/secret", "--token", models.token)
    assert done.returncode == 0 and models.token not in done.stdout + done.stderr
    base = tv.Checkpoint.open("me/secret", token=models.token)
    (base - tv.TaskVector.between(base, "org/old")).save(tmp_path / "out", fsync=False)
    assert all(models.token.encode() not in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert models.token not in repr(base) + repr(base.__dict__)
    assert not any(request.token for request in models.requests.of(host="cdn"))


def test_an_unreachable_hub_is_said_in_one_line(models: Hub) -> None:
    models.stop()
    done = models.client.run("taskvec", "inspect", "org/base")
    models.start()
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "org/base" in done.stderr and "cannot be reached" in done.stderr


def test_a_refusal_while_downloading_loses_nothing(models: Hub, tmp_path: Path) -> None:
    base = tv.Checkpoint.open("org/base")
    edited = base - tv.TaskVector.between(base, "org/old")
    models.fault("cdn", refusal=refusals.rate_limit(), times=99)
    with pytest.raises(tv.HubError, match="org/"):
        edited.save(tmp_path / "out", fsync=False)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_sub_folder_of_a_repository_is_a_model(models: Hub) -> None:
    models.add_model("org/pipeline", {f"unet/{file}": data for file, data in sharded(1).items()})
    assert set(tv.Checkpoint.open("hf://org/pipeline/unet").tensors) == set(SHAPES)


def test_the_output_is_verified_against_the_cache_without_the_network(models: Hub, tmp_path: Path) -> None:
    tv.subtract("org/base", "org/old", alpha=0.3, output=tmp_path / "out", fsync=False)
    before = len(models.requests)
    found = tv.verify(tmp_path / "out")
    assert found.ok and not found.skipped and len(models.requests) == before


def test_the_base_an_adapter_names_is_a_hint_and_is_not_fetched(models: Hub, tmp_path: Path) -> None:
    save_file({"other.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(tv.NameMismatchError, match="names org/base as its base"):
        tv.subtract(tmp_path / "other.safetensors", "me/lora", alpha=1, output=tmp_path / "out")
    assert not [request for request in models.requests if "org/base" in request.path]


# --- what the second reading found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["offline", "the listing fails"])
def test_a_part_of_a_model_in_the_cache_does_not_pass_for_the_whole(how: str, models: Hub, tmp_path: Path) -> None:
    models.add_model("org/tuned", sharded(2))
    for repo in ("org/base", "org/tuned"):
        hf_hub_download(repo, FIRST)
    if how == "offline":
        models.client.go_offline()
    else:
        models.fault("tree", status=503, times=99)
    with pytest.raises(tv.CheckpointError, match="one of 2 shards, and there is no index"):
        tv.subtract("org/base", "org/tuned", alpha=1, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_alone_in_a_local_folder_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / FIRST).write_bytes(sharded(1)[FIRST])
    with pytest.raises(tv.CheckpointError, match="one of 2 shards"):
        tv.Checkpoint.open(tmp_path / "m")


def test_a_plan_says_when_the_hub_was_not_reached(models: Hub, tmp_path: Path) -> None:
    tv.subtract("org/base", "org/old", alpha=1, output=tmp_path / "out", fsync=False)
    repository._resolved.clear()
    files.REMOTE.clear()
    models.client.go_offline()
    plan = (tv.Checkpoint.open("org/base") - tv.TaskVector.between("org/base", "org/old")).plan()
    said = [note for note in plan.notes if "Hub was not reached" in note]
    assert len(said) == 2 and any("org/base" in note for note in said)


@pytest.mark.parametrize("source", ["org/base@feature/x", "hf://org/base@feature%2Fx"])
def test_a_branch_may_have_slashes(source: str, models: Hub) -> None:
    models.add_model("org/base", {"notes.txt": b"x"}, revision="feature/x")
    assert tv.Checkpoint.open(source).path.name == models.head("org/base", "feature/x")


@pytest.mark.parametrize("end", ["\n", " ", "\r\n"])
def test_a_token_with_what_a_file_ends_in_is_trimmed(end: str, models: Hub) -> None:
    models.add_model("me/secret", {"model.safetensors": save(tensors(1))}, private=True)
    models.client.log_in(None)
    assert tv.Checkpoint.open("me/secret", token=models.token + end).label == "me/secret"


def test_a_password_in_an_address_is_refused_and_not_shown(models: Hub) -> None:
    for name in ("https://me:hf_SECRET@huggingface.co/org/x", "http://hf_SECRET@127.0.0.1/org/x"):
        with pytest.raises(tv.UsageError) as caught:
            tv.Checkpoint.open(name)
        assert "SECRET" not in str(caught.value)


def test_a_look_without_a_token_does_not_take_it_from_who_has_one(models: Hub, tmp_path: Path) -> None:
    models.add_model("me/secret", {"model.safetensors": save(tensors(1))}, private=True)
    models.client.log_in(None)
    base = tv.Checkpoint.open("me/secret", token=models.token)
    with pytest.raises(tv.HubError):
        tv.inspect("me/secret")
    (base - tv.TaskVector.between(base, "org/old")).save(tmp_path / "out", fsync=False)


def test_hashes_of_shards_that_are_not_needed_come_from_the_hub(models: Hub, tmp_path: Path) -> None:
    models.add_model("org/tuned", sharded(2))
    saved = tv.extract("org/base", "org/tuned", output=tmp_path / "v.safetensors", include=["model.h.1.*"], fsync=False)
    assert saved.tensors == ("model.h.1.q.weight",)
    tuned = models.client.cache / "models--org--tuned"
    assert {path.name for path in tuned.rglob("*.safetensors")} == {SECOND}
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        about = json.loads(file.metadata()["taskvec"])
    assert about["sha256"][f"org/tuned/{FIRST}"] == hashlib.sha256(sharded(2)[FIRST]).hexdigest()


def test_a_link_of_the_cache_to_nothing_is_fetched_anew(models: Hub, tmp_path: Path) -> None:
    tv.subtract("org/base", "org/old", alpha=1, output=tmp_path / "a", fsync=False)
    (shard,) = (models.client.cache / "models--org--old").rglob("model.safetensors")
    shard.resolve().unlink()
    repository._resolved.clear()
    tv.subtract("org/base", "org/old", alpha=1, output=tmp_path / "b", fsync=False)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
