"""The stand-in against the real clients: huggingface_hub, its `hf` command, transformers. They are the oracle here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.numpy import save

from .stand_in import Hub, refusals

WEIGHTS = "model.safetensors"


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that neither compress nor repeat."""
    return hashlib.shake_256(seed.to_bytes(4, "big")).digest(size)


def model(seed: int = 0, size: int = 300_000) -> dict[str, bytes]:
    import numpy

    tensor = numpy.frombuffer(noise(size, seed), dtype=numpy.uint8)
    return {"config.json": b'{"model_type": "llama"}', WEIGHTS: save({"w": tensor}), "sub/notes.txt": b"caf\xc3\xa9"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def read(folder: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def adds(files: dict[str, bytes]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, data) for path, data in files.items()]


# Reading


def test_a_snapshot_holds_the_files_and_the_token_never_goes_to_the_cdn(either_hub: Hub) -> None:
    sha = either_hub.add_model("org/tiny", model())
    folder = Path(snapshot_download("org/tiny"))
    assert folder.name == sha
    assert read(folder) == either_hub.files("org/tiny")
    assert not any(request.token for request in either_hub.requests.of(host="cdn"))
    assert all(request.token for request in either_hub.requests.of("info", "tree", "resolve"))


def test_large_files_come_from_the_cdn_or_from_xet(hub: Hub, tmp_path: Path) -> None:
    hub.add_model("org/tiny", model())
    snapshot_download("org/tiny")
    assert [request.file for request in hub.requests.of("cdn")] == [WEIGHTS]
    assert hub.requests.of("cdn").sent == len(model()[WEIGHTS])


def test_xet_files_do_not_pass_the_cdn(xet_hub: Hub) -> None:
    xet_hub.add_model("org/tiny", model())
    snapshot_download("org/tiny")
    assert xet_hub.requests.of("xet_read_token")
    assert not xet_hub.requests.of("cdn")
    told = get_hf_file_metadata(hf_hub_url("org/tiny", WEIGHTS)).xet_file_data
    assert told is not None and told.file_hash == HfApi().get_paths_info("org/tiny", [WEIGHTS])[0].xet_hash


def test_a_client_without_xet_reads_what_one_with_xet_wrote(xet_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    api = HfApi()
    api.create_repo("me/tiny")
    api.create_commit("me/tiny", adds(model()), commit_message="By Xet")
    assert xet_hub.requests.of("xet_write_token") and not xet_hub.requests.of("lfs_batch")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert Path(hf_hub_download("me/tiny", WEIGHTS)).read_bytes() == model()[WEIGHTS]
    assert xet_hub.requests.of("cdn").sent == len(model()[WEIGHTS])


def test_a_dry_run_tells_the_sizes_and_fetches_nothing(hub: Hub) -> None:
    hub.add_model("org/tiny", model())
    one = hf_hub_download("org/tiny", WEIGHTS, dry_run=True)
    assert (one.file_size, one.will_download, one.is_cached) == (len(model()[WEIGHTS]), True, False)
    all_files = snapshot_download("org/tiny", dry_run=True)
    assert {info.filename for info in all_files} == set(hub.files("org/tiny"))
    assert hub.requests.of("cdn", "resolve_cache", method="GET") == []


def test_a_dropped_download_goes_on_where_it_stopped(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 65536)  # 10 MiB, else: the client keeps whole chunks only
    hub.add_model("org/tiny", model())
    hub.fault("cdn", file=WEIGHTS, after_bytes=200_000)
    assert Path(hf_hub_download("org/tiny", WEIGHTS)).read_bytes() == model()[WEIGHTS]
    first, second = hub.requests.of("cdn")
    assert (first.dropped, first.sent, first.range) == (True, 200_000, None)
    assert (second.dropped, second.range, second.status) == (False, "bytes=196608-", 206)


def test_headers_of_safetensors_are_read_by_one_range(either_hub: Hub) -> None:
    either_hub.add_model("org/tiny", model())
    found = HfApi().parse_safetensors_file_metadata("org/tiny", WEIGHTS)
    assert found.tensors["w"].shape == [300_000]
    (request,) = either_hub.requests.of("cdn")
    assert (request.range, request.sent) == ("bytes=0-100000", 100_001)


def test_metadata_says_commit_hash_size_and_a_signed_link(hub: Hub) -> None:
    sha = hub.add_model("org/tiny", model())
    weights = model()[WEIGHTS]
    found = get_hf_file_metadata(hf_hub_url("org/tiny", WEIGHTS))
    assert (found.commit_hash, found.etag, found.size) == (sha, hashlib.sha256(weights).hexdigest(), len(weights))
    part = get_session().get(found.location, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, weights[10:20])
    assert get_session().get(found.location, headers={"Range": "bytes=-5"}).content == weights[-5:]
    assert get_session().get(found.location, headers={"Range": f"bytes={len(weights)}-"}).status_code == 416
    hub.expire_links()
    assert get_session().get(found.location).status_code == 403


def test_a_link_of_the_cdn_refuses_a_token(hub: Hub) -> None:
    hub.add_model("org/tiny", model())
    link = get_hf_file_metadata(hf_hub_url("org/tiny", WEIGHTS)).location
    assert get_session().get(link, headers={"Authorization": f"Bearer {hub.token}"}).status_code == 400


def test_branches_tags_and_commits_are_revisions(hub: Hub) -> None:
    first = hub.add_model("org/tiny", model(1), tags=["v1"])
    second = hub.add_model("org/tiny", model(2), revision="next")
    api = HfApi()
    assert [api.model_info("org/tiny", revision=r).sha for r in ("main", "v1", first, "next")] == [
        first,
        first,
        first,
        second,
    ]
    refs = api.list_repo_refs("org/tiny")
    assert {branch.name: branch.target_commit for branch in refs.branches} == {"main": first, "next": second}
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v1": first}
    assert Path(hf_hub_download("org/tiny", WEIGHTS, revision="next")).read_bytes() == model(2)[WEIGHTS]
    assert [commit.commit_id for commit in api.list_repo_commits("org/tiny", revision="next")][:2] == [second, first]


def test_a_listing_of_many_pages_is_whole(hub: Hub) -> None:
    files = {f"folder{n % 3}/{n:02}.txt": bytes([n]) for n in range(20)}
    hub.add_model("org/many", files)
    hub.page_size = 4
    assert set(HfApi().list_repo_files("org/many")) == set(hub.files("org/many"))
    listed = set()
    for entry in HfApi().list_repo_tree("org/many", recursive=True, expand=True):
        listed.add(entry.path)
    assert listed == {*hub.files("org/many"), "folder0", "folder1", "folder2"}
    assert len(hub.requests.of("tree")) == 2 * 6  # 24 entries in pages of 4
    top = {entry.path for entry in HfApi().list_repo_tree("org/many")}
    assert top == {".gitattributes", "folder0", "folder1", "folder2"}


def test_paths_tell_hashes_and_what_is_missing_is_left_out(either_hub: Hub) -> None:
    either_hub.add_model("org/tiny", model())
    found = {
        entry.path: entry for entry in HfApi().get_paths_info("org/tiny", [WEIGHTS, "config.json", "sub", "no"], expand=True)
    }
    assert set(found) == {WEIGHTS, "config.json", "sub"}
    assert found[WEIGHTS].lfs.sha256 == hashlib.sha256(model()[WEIGHTS]).hexdigest()
    assert (found[WEIGHTS].xet_hash is not None) == either_hub.xet.enabled
    assert found["config.json"].lfs is None
    assert HfApi().file_exists("org/tiny", WEIGHTS)
    assert not HfApi().file_exists("org/tiny", "no")


def test_a_model_tells_its_files_its_card_and_who_may_see_it(hub: Hub) -> None:
    card = b"---\nlicense: mit\ntags: [a, b]\n---\nHello"
    hub.add_model("me/tiny", {**model(), "README.md": card}, private=True, gated="manual")
    found = HfApi().model_info("me/tiny", files_metadata=True)
    assert (found.private, found.gated, found.card_data.license, found.tags) == (True, "manual", "mit", ["a", "b"])
    assert {sibling.rfilename: sibling.size for sibling in found.siblings} == {
        path: len(data) for path, data in hub.files("me/tiny").items()
    }
    expanded = HfApi().model_info("me/tiny", expand=["private"])
    assert (expanded.private, expanded.siblings) == (True, None)


def nobody(hub: Hub) -> None:
    hub.client.log_in(None)


def stay(hub: Hub) -> None: ...


REFUSED: dict[str, tuple[Callable[[Hub], None], str, str, str, type[Exception], str]] = {
    "gated, not logged in": (nobody, "org/gated", "main", WEIGHTS, GatedRepoError, "Please log in"),
    "gated, not on the list": (stay, "org/gated", "main", WEIGHTS, GatedRepoError, "not in the authorized list"),
    "private, not logged in": (
        nobody,
        "org/private",
        "main",
        WEIGHTS,
        RepositoryNotFoundError,
        "Invalid username or password",
    ),
    "private, another's": (stay, "org/private", "main", WEIGHTS, RepositoryNotFoundError, "Repository Not Found"),
    "missing repository": (stay, "org/none", "main", WEIGHTS, RepositoryNotFoundError, "Repository Not Found"),
    "missing, not logged in": (nobody, "org/none", "main", WEIGHTS, RepositoryNotFoundError, "Invalid username or password"),
    "missing revision": (stay, "org/open", "v9", WEIGHTS, RevisionNotFoundError, "Invalid rev id: v9"),
    "missing file": (stay, "org/open", "main", "no.safetensors", EntryNotFoundError, "Entry Not Found"),
    "wrong token": (
        lambda hub: hub.client.log_in("hf_no"),
        "org/open",
        "main",
        WEIGHTS,
        HfHubHTTPError,
        "Invalid credentials",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_not_be_read_is_refused_in_the_hubs_words(hub: Hub, case: str) -> None:
    prepare, repo, revision, file, error, words = REFUSED[case]
    for name, settings in {"org/open": {}, "org/gated": {"gated": True}, "org/private": {"private": True}}.items():
        hub.add_model(name, model(), **settings)
    prepare(hub)
    with pytest.raises(error, match=words) as refused:
        hf_hub_download(repo, file, revision=revision)
    if error is HfHubHTTPError:
        assert not isinstance(refused.value, RepositoryNotFoundError)
    assert hub.requests.of("cdn") == []


def test_who_is_on_the_list_reads_a_gated_repository_and_everybody_lists_it(hub: Hub) -> None:
    hub.add_model("org/gated", model(), gated=True)
    assert WEIGHTS in HfApi(token=False).list_repo_files("org/gated")
    hub.grant("org/gated")
    assert Path(hf_hub_download("org/gated", WEIGHTS)).read_bytes() == model()[WEIGHTS]


def test_a_hub_that_does_not_answer_leaves_the_cache_usable(hub: Hub) -> None:
    hub.add_model("org/tiny", model())
    path = hf_hub_download("org/tiny", WEIGHTS)
    hub.stop()
    assert hf_hub_download("org/tiny", WEIGHTS) == path
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("org/tiny", "config.json")
    hub.start()
    assert hf_hub_download("org/tiny", "config.json")


def test_offline_only_the_cache_answers(hub: Hub) -> None:
    hub.add_model("org/tiny", model())
    path = hf_hub_download("org/tiny", WEIGHTS)
    hub.client.go_offline()
    hub.requests.clear()
    assert hf_hub_download("org/tiny", WEIGHTS) == path
    with pytest.raises(LocalEntryNotFoundError, match="cannot find the requested files in the local cache"):
        hf_hub_download("org/tiny", "config.json")
    assert hub.client.run("hf", "download", "org/tiny", "config.json").returncode == 1
    assert hub.requests == []


def test_the_file_system_of_the_hub_lists_and_reads_ranges(hub: Hub) -> None:
    hub.add_model("org/tiny", model())
    files = HfFileSystem(endpoint=hub.endpoint, token=hub.token, skip_instance_cache=True)
    assert files.ls("org/tiny/sub", detail=False) == ["org/tiny/sub/notes.txt"]
    with files.open(f"org/tiny/{WEIGHTS}", cache_type="none") as stream:
        stream.seek(1000)
        assert stream.read(100) == model()[WEIGHTS][1000:1100]
    assert hub.requests.of("cdn").sent == 100


# Writing


def test_shards_are_uploaded_first_and_appear_in_one_commit(either_hub: Hub, tmp_path: Path) -> None:
    api = HfApi()
    api.create_repo("me/new", private=True)
    start = api.model_info("me/new").sha
    folder = write(tmp_path / "out", {**model(), "model-2.safetensors": noise(90_000, 7)})
    operations = [CommitOperationAdd(path, folder / path) for path in read(folder)]
    for operation in operations:
        api.preupload_lfs_files("me/new", [operation])
    assert set(either_hub.files("me/new")) == {".gitattributes"}
    made = api.create_commit("me/new", operations, commit_message="Edited", commit_description="How", parent_commit=start)
    files = either_hub.files("me/new")
    files.pop(".gitattributes")
    assert files == read(folder)
    newest, initial = either_hub.commits("me/new")
    assert (newest.sha, newest.parent, newest.title, newest.description) == (made.oid, start, "Edited", "How")
    assert initial.sha == start
    assert len(either_hub.requests.of("commit")) == 1
    verified = api.verify_repo_checksums("me/new", local_dir=folder)
    assert (verified.checked_count, verified.mismatches, verified.missing_paths) == (4, [], [".gitattributes"])
    (folder / "config.json").write_bytes(b"{}")
    (folder / WEIGHTS).write_bytes(b"other")
    mismatches = api.verify_repo_checksums("me/new", local_dir=folder).mismatches
    assert {mismatch["path"] for mismatch in mismatches} == {"config.json", WEIGHTS}


def test_a_stale_parent_is_refused_and_nothing_changes(either_hub: Hub) -> None:
    api = HfApi()
    start = either_hub.add_model("me/new", model())
    either_hub.fault("commit", then=lambda: either_hub.rival_commit("me/new"))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        api.create_commit("me/new", adds({WEIGHTS: noise(50)}), commit_message="Late", parent_commit=start)
    assert refused.value.response.status_code == 412
    assert [commit.title for commit in either_hub.commits("me/new")] == ["Rival", "Add files", "initial commit"]


def test_what_was_uploaded_is_not_sent_again_after_a_failed_commit(either_hub: Hub) -> None:
    api = HfApi()
    api.create_repo("me/new")
    either_hub.fault("commit", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.create_commit("me/new", adds(model()), commit_message="First")
    sent, stored = either_hub.requests.of("lfs_put").received, either_hub.xet.stored
    assert max(sent, stored) >= len(model()[WEIGHTS])
    api.create_commit("me/new", adds(model()), commit_message="Again")
    assert (either_hub.requests.of("lfs_put").received, either_hub.xet.stored) == (sent, stored)
    assert either_hub.files("me/new")[WEIGHTS] == model()[WEIGHTS]


def test_an_upload_that_was_killed_sends_only_the_rest(hub: Hub) -> None:
    write(hub.client.here, {f"model-{n}.safetensors": noise(200_000, n) for n in range(3)})
    push = (
        "from huggingface_hub import *; api = HfApi(); api.create_repo('me/new', exist_ok=True)\n"
        "ops = [CommitOperationAdd(f'model-{n}.safetensors', f'model-{n}.safetensors') for n in range(3)]\n"
        "for op in ops: api.preupload_lfs_files('me/new', [op])\n"
        "print(api.create_commit('me/new', ops, commit_message='All').oid)"
    )
    hub.fault("lfs_put", skip=1, after_bytes=100_000, then=lambda: process.kill())
    process = hub.client.start("python", "-c", push)
    process.communicate()
    hub.settle()
    whole, cut = hub.requests.of("lfs_put")
    assert (whole.received, whole.dropped, cut.dropped) == (200_000, False, True)
    hub.requests.clear()
    assert hub.client.python(push).strip() == hub.head("me/new")
    assert [request.received for request in hub.requests.of("lfs_put")] == [200_000, 200_000]
    assert {path: data for path, data in hub.files("me/new").items() if path != ".gitattributes"} == read(hub.client.here)


def test_a_dropped_upload_is_sent_once_more(hub: Hub) -> None:
    api = HfApi()
    api.create_repo("me/new")
    hub.fault("lfs_put", after_bytes=100_000)
    api.create_commit("me/new", adds(model()), commit_message="All")
    weights = model()[WEIGHTS]
    assert [(request.received, request.dropped) for request in hub.requests.of("lfs_put")] == [
        (100_000, True),
        (len(weights), False),
    ]
    assert hub.files("me/new")[WEIGHTS] == weights


def test_a_very_large_file_goes_in_parts(hub: Hub) -> None:
    hub.multipart_above = 100_000
    api = HfApi()
    api.create_repo("me/new")
    api.create_commit("me/new", adds(model()), commit_message="All")
    assert [request.received for request in hub.requests.of("lfs_part")] == [
        100_000,
        100_000,
        100_000,
        len(model()[WEIGHTS]) - 300_000,
    ]
    assert hub.files("me/new")[WEIGHTS] == model()[WEIGHTS]
    assert not any(request.token for request in hub.requests.of("lfs_part", "lfs_complete"))


def test_a_folder_goes_up_and_an_unchanged_one_makes_no_commit(either_hub: Hub, tmp_path: Path) -> None:
    folder = write(tmp_path / "out", model())
    api = HfApi()
    api.create_repo("me/new")
    first = api.upload_folder(repo_id="me/new", folder_path=folder).oid
    assert api.upload_folder(repo_id="me/new", folder_path=folder).oid == first == either_hub.head("me/new")
    assert len(either_hub.requests.of("commit")) == 1


def test_a_pull_request_leaves_main_alone(either_hub: Hub, tmp_path: Path) -> None:
    start = either_hub.add_model("org/theirs", model())
    api = HfApi()
    made = api.create_commit("org/theirs", adds({WEIGHTS: noise(500, 1)}), commit_message="Please", create_pr=True)
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    second = api.upload_folder(
        repo_id="org/theirs", folder_path=write(tmp_path / "o", {WEIGHTS: noise(9, 2)}), create_pr=True
    )
    assert second.pr_revision == "refs/pr/2"
    assert either_hub.head("org/theirs") == start
    assert either_hub.files("org/theirs", "refs/pr/1")[WEIGHTS] == noise(500, 1)
    assert either_hub.files("org/theirs", "refs/pr/2")[WEIGHTS] == noise(9, 2)
    api.create_commit("org/theirs", adds({"more.txt": b"1"}), commit_message="More", revision="refs/pr/1")
    assert Path(hf_hub_download("org/theirs", "more.txt", revision="refs/pr/1")).read_bytes() == b"1"
    requests = api.list_repo_refs("org/theirs", include_pull_requests=True).pull_requests
    assert [request.ref for request in requests] == ["refs/pr/1", "refs/pr/2"]


def test_a_branch_must_exist_before_a_commit_goes_there(hub: Hub) -> None:
    start = hub.add_model("me/new", model())
    api = HfApi()
    with pytest.raises(RevisionNotFoundError):
        api.create_commit("me/new", adds({"a.txt": b"a"}), commit_message="A", revision="side/branch")
    api.create_branch("me/new", branch="side/branch")
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch("me/new", branch="side/branch")
    api.create_branch("me/new", branch="side/branch", exist_ok=True)
    api.create_commit("me/new", adds({"a.txt": b"a"}), commit_message="A", revision="side/branch")
    assert hub.head("me/new") == start
    assert hub.files("me/new", "side/branch")["a.txt"] == b"a"
    api.create_tag("me/new", tag="v1", revision="side/branch")
    api.delete_branch("me/new", branch="side/branch")
    assert hub.head("me/new", "v1") != start
    with pytest.raises(KeyError):
        hub.head("me/new", "side/branch")


def test_files_are_deleted_and_a_missing_one_is_refused(hub: Hub) -> None:
    hub.add_model("me/new", model())
    api = HfApi()
    operations = [CommitOperationDelete("config.json"), CommitOperationDelete("sub/")]
    api.create_commit("me/new", operations, commit_message="Less")
    assert set(hub.files("me/new")) == {".gitattributes", WEIGHTS}
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.create_commit("me/new", [CommitOperationDelete("config.json")], commit_message="Again")


def test_a_repository_is_created_once_and_keeps_its_visibility(hub: Hub) -> None:
    api = HfApi()
    assert api.create_repo("me/new", private=True).repo_id == "me/new"
    with pytest.raises(HfHubHTTPError, match="You already created this model repo"):
        api.create_repo("me/new")
    assert api.create_repo("me/new", private=False, exist_ok=True).repo_id == "me/new"
    assert api.repo_info("me/new").private is True
    api.update_repo_settings("me/new", private=False)
    assert hub.repos["me/new"].private is False
    assert api.create_repo("team/other").repo_id == "team/other"
    api.delete_repo("me/new")
    assert not api.repo_exists("me/new")


def test_tokens_that_may_not_write_are_told_so(either_hub: Hub) -> None:
    either_hub.add_model("me/mine", model())
    either_hub.add_model("org/theirs", model())
    reader = HfApi(token=either_hub.add_token("read"))
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="You don't have the rights to create a model under the namespace"):
        reader.create_repo("me/new")
    assert reader.create_repo("me/mine", exist_ok=True).repo_id == "me/mine"  # no proof that one may write
    with pytest.raises(HfHubHTTPError, match="you must use a write token"):
        reader.create_commit("me/mine", adds({"a.txt": b"a"}), commit_message="A")
    with pytest.raises(HfHubHTTPError, match="create_pr=1"):
        HfApi().create_commit("org/theirs", adds({"a.txt": b"a"}), commit_message="A")
    with pytest.raises(HfHubHTTPError, match="rights to create"):
        HfApi().create_repo("org/new")
    narrow = HfApi(token=either_hub.add_token("fineGrained", repos=("me/mine",)))
    assert narrow.create_commit("me/mine", adds({WEIGHTS: noise(100)}), commit_message="A").oid == either_hub.head("me/mine")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()


CARDS = {
    "base_model: org/base": None,
    "base_model: [org/base, org/tuned]\nbase_model_relation: merge\nlicense: apache-2.0\ntags: [merge]": None,
    "base_model: /home/me/base": "base_model",
    "license: my-own": "license",
    "base_model_relation: sibling": "base_model_relation",
    "tags: merge": "tags",
    "a: [": "YAML Metadata Error",
}


@pytest.mark.parametrize("metadata", CARDS)
def test_a_card_is_validated_before_anything_is_sent(hub: Hub, metadata: str) -> None:
    hub.create("me/new")
    operations = adds({"README.md": f"---\n{metadata}\n---\nHello".encode(), WEIGHTS: noise(100)})
    if (words := CARDS[metadata]) is None:
        HfApi().create_commit("me/new", operations, commit_message="Card")
    else:
        with pytest.raises(ValueError, match=words):
            HfApi().create_commit("me/new", operations, commit_message="Card")
        assert not hub.requests.of("preupload", "lfs_put", "commit")


def test_a_card_without_metadata_is_warned_about(hub: Hub) -> None:
    hub.create("me/new")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        HfApi().create_commit("me/new", adds({"README.md": b"Hello"}), commit_message="Card")


# Breaking


QUOTAS = {
    "private": (refusals.storage_limit(), HfHubHTTPError, "Private repository storage limit reached"),
    "private, as 400": (refusals.storage_limit(400), BadRequestError, "Private repository storage limit reached"),
    "public": (refusals.storage_pattern(), HfHubHTTPError, "Your storage patterns tripped our internal systems"),
    "commit": (refusals.too_large(), HfHubHTTPError, "413"),
    "mirror": (refusals.no_space(), HfHubHTTPError, "507"),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_a_full_account_is_refused_in_the_hubs_words(hub: Hub, case: str) -> None:
    refusal, error, words = QUOTAS[case]
    hub.create("me/new")
    hub.fault("commit", refusal=refusal)
    with pytest.raises(error, match=words):
        HfApi().create_commit("me/new", adds(model()), commit_message="All")


def test_requests_fail_as_often_as_asked(hub: Hub) -> None:
    hub.create("me/new")
    hub.fault("lfs_put", status=503, times=2)
    hub.fault("lfs_put", refusal=refusals.rate_limit())
    HfApi().create_commit("me/new", adds(model()), commit_message="All")
    assert [request.status for request in hub.requests.of("lfs_put")] == [503, 503, 429, 200]


def test_a_commit_whose_reply_is_lost_was_made(hub: Hub) -> None:
    hub.create("me/new")
    hub.fault("commit", reply_lost=True)
    with pytest.raises(Exception, match="disconnected"):
        HfApi().create_commit("me/new", adds({"a.txt": b"a"}), commit_message="Lost")
    assert [commit.title for commit in hub.commits("me/new")] == ["Lost", "initial commit"]


def test_a_request_the_stand_in_does_not_know_is_marked(hub: Hub) -> None:
    with pytest.raises(HfHubHTTPError, match="no route for GET /api/collections/a/b"):
        HfApi().get_collection("a/b")
    assert hub.requests.of("unsupported")
    hub.requests.clear()  # or the fixture fails this test


# Other clients


@pytest.mark.parametrize("hub_name", ["hub", "xet_hub"])
def test_the_hf_command_uploads_and_downloads(request: pytest.FixtureRequest, hub_name: str) -> None:
    hub: Hub = request.getfixturevalue(hub_name)
    write(hub.client.here / "out", model())
    up = hub.client.run("hf", "upload", "me/new", "out", "--private")
    assert up.returncode == 0, up.stderr
    assert hub.repos["me/new"].private
    down = hub.client.run("hf", "download", "me/new", "--local-dir", "in")
    assert down.returncode == 0, down.stderr
    assert read(hub.client.here / "in") == hub.files("me/new")
    assert {"config.json", WEIGHTS} < set(hub.files("me/new"))
    assert hub.token not in up.stdout + up.stderr + down.stdout + down.stderr


def test_transformers_pushes_and_loads_a_model(either_hub: Hub) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    made.push_to_hub("me/llama", private=True)
    assert either_hub.repos["me/llama"].private
    loaded = AutoModelForCausalLM.from_pretrained("me/llama")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in made.state_dict().items())
    files = {path: data for path, data in either_hub.files("me/llama").items() if path != ".gitattributes"}
    either_hub.add_model("org/llama", files, gated=True)
    with pytest.raises(OSError, match="gated repo"):
        AutoModelForCausalLM.from_pretrained("org/llama")
    either_hub.grant("org/llama")
    assert AutoModelForCausalLM.from_pretrained("org/llama").config.hidden_size == 8
    assert json.loads(files["config.json"])["model_type"] == "llama"


def test_a_child_process_sees_nothing_of_this_machines_account(hub: Hub) -> None:
    out = hub.client.python(
        "from huggingface_hub import constants, get_token, HfApi\n"
        "print(constants.ENDPOINT, constants.HF_HOME, get_token(), HfApi().whoami()['name'], sep='|')"
    )
    assert out.strip().split("|") == [hub.endpoint, str(hub.client.home), hub.token, "me"]
    hub.client.log_in(None)
    assert hub.client.python("from huggingface_hub import get_token; print(get_token())").strip() == "None"
    assert "HF_TOKEN" not in os.environ
