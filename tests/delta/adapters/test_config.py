"""An adapter folder: its two files, its config, and PEFT's rule for the patterns in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taskvec as tv
from taskvec.delta.adapters import FAMILIES, open_adapter
from taskvec.delta.adapters.config import AdapterFolder
from taskvec.delta.adapters.patterns import Patterns

from .handmade import lora, write_adapter, write_base

Q = lora("m.q", 6, 4)


def opened(folder: Path, **config: Any) -> AdapterFolder:
    return AdapterFolder.open(write_adapter(folder, Q, **config))


# --- the two files ----------------------------------------------------------------------------------------------------


def test_weights_without_a_config_are_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", Q)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(tv.AdapterError, match=r"adapter_model\.safetensors without adapter_config\.json.*alpha/r"):
        tv.subtract(write_base(tmp_path / "base"), adapter, alpha=1, output=tmp_path / "out")


@pytest.mark.parametrize("pickle", [True, False])
def test_a_config_without_weights_is_refused_and_a_pickle_is_named(pickle: bool, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", Q)
    (adapter / "adapter_model.safetensors").unlink()
    if pickle:
        (adapter / "adapter_model.bin").write_bytes(b"\x80\x02never opened")
    with pytest.raises(tv.AdapterError, match=r"no adapter_model\.safetensors") as caught:
        tv.subtract(write_base(tmp_path / "base"), adapter, alpha=1, output=tmp_path / "out")
    assert ("adapter_model.bin" in str(caught.value)) is pickle
    assert ("pickles" in str(caught.value)) is pickle


def test_the_weight_file_of_an_adapter_stands_for_its_folder(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter", Q)
    by_folder = tv.subtract(base, adapter, alpha=1, output=tmp_path / "a", fsync=False)
    by_file = tv.subtract(base, adapter / "adapter_model.safetensors", alpha=1, output=tmp_path / "b", fsync=False)
    assert by_folder.tensors == by_file.tensors
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_folder_that_is_no_adapter_is_refused_as_one(tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match=r"base: not an adapter folder.*adapter_config\.json"):
        tv.TaskVector.from_adapter(write_base(tmp_path / "base"))


def test_a_folder_with_a_model_and_an_adapter_is_ambiguous(tmp_path: Path) -> None:
    base, both = write_base(tmp_path / "base"), write_adapter(tmp_path / "both", Q)
    (both / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with pytest.raises(tv.CheckpointError, match="both an adapter and a model"):
        tv.subtract(base, both, alpha=1, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[1]", "JSON list"), (b"{}", "no peft_type"), (b"", "not JSON"),
        (b'{"peft_type": 7}', "no peft_type"), (b'{"peft_type": "NEXT"}', "peft_type NEXT"), (b"[" * 10**5, "not JSON"),
    ],
)  # fmt: skip
def test_a_config_that_is_none_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", Q)
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(tv.TaskvecError, match=rf"adapter_config\.json: .*{reason}"):
        open_adapter(adapter)


def test_the_families_are_those_that_refusals_name(tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError) as caught:
        open_adapter(write_adapter(tmp_path / "adapter", Q, peft_type="FOURIERFT"))
    assert all(family in str(caught.value) for family in FAMILIES)


def test_the_peft_type_may_be_lower_case(tmp_path: Path) -> None:
    assert opened(tmp_path / "adapter", peft_type="lora").family == "LORA"


def test_a_linked_adapter_is_called_by_the_name_of_the_link(tmp_path: Path) -> None:
    write_adapter(tmp_path / "secret-project", Q)
    (tmp_path / "old").symlink_to("secret-project")
    assert open_adapter(tmp_path / "old").label == "old"


@pytest.mark.parametrize(
    ("name", "quantised"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", True), ("x/y-bnb-8bit", True), ("x/model-4bit", True), ("x/y-8bit", True),
        ("meta-llama/Llama-2-7b-hf", False), ("x/4bit-study", False), (None, False), (7, False),
    ],
)  # fmt: skip
def test_a_quantised_base_is_known_by_its_name(name: object, quantised: bool, tmp_path: Path) -> None:
    found = opened(tmp_path / "adapter", base_model_name_or_path=name).quantized_base
    assert found == (name if quantised else None)


# --- patterns ---------------------------------------------------------------------------------------------------------


def pattern_matches(pattern: str, module: str) -> bool:
    return Patterns([pattern]).first(module) is not None


def by_peft(pattern: str, module: str) -> bool:
    """PEFT 0.21, utils/other.py, get_pattern_key."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj", "lm_head", "h.1.attn.c_attn", "a.b.a.b", ""]
PATTERNS = [
    "q_proj", "self_attn.q_proj", "model.layers.0.self_attn.q_proj", "proj", "mlp", r".*\.q_proj", ".*", "", "q_proj|up_proj",
    r"layers\.\d+\.mlp\.(up|down)_proj", r"layers\.(?:0|1)\..*", r"^model\.layers\.[0-9]+\.self_attn\.q_proj$", "^q_proj",
    "h.1.attn.c_attn", "(a.b.)+a.b", "(a|b|\\.)*", "lm_head?", "l?m_head", "[^.]+_proj", r"\w+", r"layers.1\d.*", "|x", ".b",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_the_modules_that_peft_matches(pattern: str) -> None:
    assert [pattern_matches(pattern, module) for module in MODULES] == [by_peft(pattern, module) for module in MODULES]


_PIECES = ["a", "b", ".", r"\.", "*", "+", "?", "|", "(", ")", "(?:", "[ab]", "[^a]", r"\d", "^", "$", "_", "aa", "b.a"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(_PIECES), max_size=8).map("".join), st.text("ab._0", max_size=8))
def test_any_pattern_is_matched_as_by_re_or_not_understood(pattern: str, module: str) -> None:
    try:
        found = pattern_matches(pattern, module)
    except (ValueError, re.error):
        return
    assert found == by_peft(pattern, module)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([*_PIECES, "c", r"\|"]), max_size=5).map("".join), max_size=6),
    st.text("abc._0|", max_size=8),
)
def test_the_first_of_several_patterns_is_the_one_that_peft_takes(patterns: list[str], module: str) -> None:
    try:
        found = Patterns(patterns).first(module)
    except ValueError:
        return
    assert found == next((pattern for pattern in patterns if by_peft(pattern, module)), None)


def test_the_patterns_that_are_not_understood_are_few() -> None:
    # else the property above could hold by refusing everything
    for pattern in PATTERNS:
        pattern_matches(pattern, "a")


# each would take `re` longer than the age of the universe on the module below
HOSTILE = [
    "(a*)*b", "(a+)+[bc]", "(a|a)*[bc]", "a?" * 60 + "[bc]", "(a|a?)+[bc]", ".*" * 30 + "[bc]", "(?:a|aa)" * 60 + "[bc]",
]  # fmt: skip


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_hostile_pattern_does_not_hang(pattern: str, tmp_path: Path) -> None:
    module = "a" * 100
    base = write_base(tmp_path / "base", {f"{module}.weight": (6, 4)})
    adapter = write_adapter(tmp_path / "adapter", lora(module, 6, 4), alpha_pattern={pattern: 100})
    try:
        report = tv.subtract(base, adapter, alpha=1, output=tmp_path / "out", fsync=False)
    except tv.AdapterError as error:
        assert "alpha_pattern" in str(error) and "Write out the module names" in str(error)
    else:
        assert report.changes["elements_edited"] == 24


@pytest.mark.parametrize(
    "pattern", ["(a", "a{2}", r"(a)\1", "(?=a)a", "(?x:(a*) *)b", "a*?", "a++", "((a))", "[b-a]", "[[a]]", "*a", "x" * 2000]
)
def test_a_pattern_that_is_not_understood_is_refused_by_name(pattern: str, tmp_path: Path) -> None:
    folder = opened(tmp_path / "adapter", rank_pattern={pattern: 2})
    with pytest.raises(tv.AdapterError, match=r"adapter_config\.json: rank_pattern: pattern .* is not understood") as caught:
        folder.pattern_value("rank_pattern", "m.q", "r", 2)
    assert "Write out the module names" in str(caught.value)


def test_the_first_pattern_of_the_file_wins_and_without_one_the_field(tmp_path: Path) -> None:
    folder = opened(tmp_path / "adapter", alpha_pattern={"q": 1, "m.q": 2, "o": 3}, lora_alpha=9)
    found = [folder.pattern_value("alpha_pattern", module, "lora_alpha", 8) for module in ("m.q", "o", "x.qq", "v")]
    assert found == [1, 3, 9, 9]


@pytest.mark.parametrize("value", [[], "q", 7])
def test_patterns_that_are_no_object_are_refused_or_nothing(value: object, tmp_path: Path) -> None:
    folder = opened(tmp_path / "adapter", rank_pattern=value)
    if not value:
        assert folder.pattern_value("rank_pattern", "m.q", "r", 2) == 2
        return
    with pytest.raises(tv.AdapterError, match=r"rank_pattern is .* expected an object"):
        folder.pattern_value("rank_pattern", "m.q", "r", 2)


@pytest.mark.parametrize("value", ["2", None, True, [2]])
def test_a_pattern_must_give_a_number(value: object, tmp_path: Path) -> None:
    folder = opened(tmp_path / "adapter", rank_pattern={"q": value})
    with pytest.raises(tv.AdapterError, match=r"rank_pattern\[q\] is .*, expected a number"):
        folder.pattern_value("rank_pattern", "m.q", "r", 2)


def test_the_digest_of_a_config_changes_with_its_content_only(tmp_path: Path) -> None:
    first, same = opened(tmp_path / "a", r=2), opened(tmp_path / "b", r=2)
    shuffled = json.dumps(dict(reversed(list(first.config.items()))), indent=3)
    (same.path / "adapter_config.json").write_text(shuffled)
    assert AdapterFolder.open(same.path).config_sha256 == first.config_sha256
    assert opened(tmp_path / "c", r=3).config_sha256 != first.config_sha256
