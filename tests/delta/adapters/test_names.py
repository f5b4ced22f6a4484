"""Names in an adapter become names in the base by one rule for all of them, or the adapter is refused."""

from __future__ import annotations

import pytest

from taskvec import NameMismatchError
from taskvec.delta.adapters.names import map_names, peft_name

LAYER = "layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (f"base_model.model.model.{LAYER}.lora_A.weight", f"model.{LAYER}.lora_A.weight"),
        (f"base_model.model.model.{LAYER}.lora_A.default.weight", f"model.{LAYER}.lora_A.weight"),
        (f"base_model.model.{LAYER}.lora_B.weight", f"{LAYER}.lora_B.weight"),
        (f"model.{LAYER}.lora_B.weight", f"model.{LAYER}.lora_B.weight"),
        ("base_model.encoder.q.lora_A.weight", "encoder.q.lora_A.weight"),
        ("base_model.model.x.lora_B.default.bias", "x.lora_B.bias"),
        ("base_model.model.x.lora_embedding_A.default", "x.lora_embedding_A"),
        ("base_model.model.x.base_layer.bias", "x.bias"),
        ("base_model.model.score.modules_to_save.default.weight", "score.weight"),
        ("base_model.model.score.modules_to_save.weight", "score.weight"),
        ("_orig_mod.base_model.model.x.weight", "x.weight"),
        ("base_model.model._orig_mod.x._fsdp_wrapped_module._checkpoint_wrapped_module.y.weight", "x.y.weight"),
        ("base_model.model.default.weight", "default.weight"),
        ("base_model.model.x.defaults.weight", "x.defaults.weight"),
        ("base_model.model.x_base_layer.weight", "x_base_layer.weight"),
    ],
)
def test_a_key_loses_what_peft_and_wrappers_put_into_it_and_nothing_else(key: str, name: str) -> None:
    assert peft_name(key) == name


def test_names_that_fit_are_taken_as_they_are() -> None:
    base = ["model.a.weight", "a.weight", "model.b.weight"]
    assert map_names(["model.a.weight"], base, "adapter", "base") == {"model.a.weight": "model.a.weight"}


def test_a_first_component_is_dropped_when_the_base_has_none() -> None:
    mapped = map_names(["transformer.h.0.w", "transformer.h.1.w"], ["h.0.w", "h.1.w", "wte"], "adapter", "base")
    assert mapped == {"transformer.h.0.w": "h.0.w", "transformer.h.1.w": "h.1.w"}


def test_a_first_component_of_the_base_is_added_when_the_adapter_has_none() -> None:
    mapped = map_names(["h.0.w"], ["lm_head.w", "model.h.0.w"], "adapter", "base")
    assert mapped == {"h.0.w": "model.h.0.w"}


def test_one_tensor_under_two_prefixes_goes_to_the_first_prefix_that_holds_all_names() -> None:
    base = ["vision.h.0.w", "text.h.0.w", "text.h.1.w"]
    assert map_names(["h.0.w", "h.1.w"], base, "adapter", "base") == {"h.0.w": "text.h.0.w", "h.1.w": "text.h.1.w"}


def test_dropping_is_one_rule_whatever_is_dropped() -> None:
    assert map_names(["x.a", "y.b"], ["a", "b", "z"], "adapter", "base") == {"x.a": "a", "y.b": "b"}


@pytest.mark.parametrize(
    ("names", "base", "unmatched"),
    [
        (["model.a", "b"], ["model.a", "model.b"], "b"),
        (["a", "b", "c"], ["vision.a", "text.b", "text.c"], "a"),
        (["a.w"], [], "a.w"),
    ],
)
def test_what_no_single_rule_maps_is_listed(names: list[str], base: list[str], unmatched: str) -> None:
    with pytest.raises(NameMismatchError) as caught:
        map_names(names, base, "my-adapter", "my-base")
    expected = f"my-adapter: 1 of {len(names)} adapted tensors are not in my-base: {unmatched}. "
    assert str(caught.value).startswith(expected)


def test_a_name_asked_for_twice_is_mapped_once() -> None:
    assert map_names(["a", "a"], ["a"], "adapter", "base") == {"a": "a"}


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    with pytest.raises(NameMismatchError) as caught:
        map_names(["evil\x1b[2J\n"], ["a"], "adapter", "base")
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)
