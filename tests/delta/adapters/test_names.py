"""Names in an adapter become names in the base by one rule for all of them, or the adapter is refused.

The names of transformers 5 in memory are checked against what transformers itself saves for models of the kind.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from peft import LoraConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from taskvec import NameMismatchError
from taskvec.delta.adapters.names import RENAMINGS, map_names, peft_name

from . import peft_oracle as oracle

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]
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
        ("base_model.model.x.base_layer.base_layer.weight", "x.weight"),
        ("base_model.model.x.base_layer.lora_A.weight", "x.base_layer.lora_A.weight"),
        ("base_model.model.x.base_layer.base_layer.lora_B.default.weight", "x.base_layer.base_layer.lora_B.weight"),
        ("base_model.model.x.base_layer.out_proj.lora_A.weight", "x.base_layer.out_proj.lora_A.weight"),
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


def test_a_head_has_no_first_component_to_add_or_drop() -> None:
    base = ["model.layers.0.w", "lm_head.weight"]
    assert map_names(["layers.0.w", "lm_head.weight"], base, "adapter", "base") == dict(zip(["layers.0.w", base[1]], base))
    base = ["layers.0.w", "lm_head.weight"]
    assert map_names(["model.layers.0.w", "lm_head.weight"], base, "a", "b") == dict(zip(["model.layers.0.w", base[1]], base))


def test_names_that_fit_under_two_prefixes_are_refused() -> None:
    with pytest.raises(NameMismatchError) as caught:
        map_names(["h.0.w"], ["vision.h.0.w", "text.h.0.w"], "my-adapter", "my-base")
    assert str(caught.value).startswith("my-adapter: h.0.w and the others could be of vision or text in my-base. Name ")


def test_half_of_a_multi_head_attention_is_refused_for_what_it_is() -> None:
    with pytest.raises(NameMismatchError, match=r"not in b: x\.attn\.weight\. PEFT applies its LoRA of an nn\.Multihead"):
        map_names(["x.attn.weight"], ["x.attn.in_proj_weight", "x.attn.out_proj.weight"], "a", "b")


# --- names of transformers 5 -------------------------------------------------------------------------------------------

TEXT: dict[str, Any] = dict(
    vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
EXPERTS = dict(
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, **TEXT
)
IMAGE = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
)  # fmt: skip
SWIN = dict(embed_dim=8, depths=[1, 1], num_heads=[2, 2], image_size=16, patch_size=2, window_size=2)
SEGFORMER = dict(hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8)
EMU3 = dict(
    vocabulary_map={"<image>": 1, **{f"<|visual token {i:06d}|>": i + 2 for i in range(8)}},
    text_config={**TEXT, "pad_token_id": 0},
)
MODELS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": EXPERTS,
    "MiniMaxForCausalLM": EXPERTS,
    "PhimoeForCausalLM": EXPERTS,
    "GraniteMoeForCausalLM": EXPERTS,
    "HYV3ForCausalLM": EXPERTS,
    "LagunaForCausalLM": EXPERTS,
    "NemotronHForCausalLM": {**EXPERTS, "num_hidden_layers": 4},
    "GPTNeoXForCausalLM": dict(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    ),
    "ViTForImageClassification": IMAGE,
    "BeitForImageClassification": IMAGE,
    "DeiTForImageClassification": IMAGE,
    "Dinov2ForImageClassification": IMAGE,
    "SwinForImageClassification": SWIN,
    "SegformerForSemanticSegmentation": SEGFORMER,
    "CLIPVisionModel": IMAGE,
    "Qwen2VLForConditionalGeneration": {},
    "Qwen2_5_VLForConditionalGeneration": {},
    "LlavaForConditionalGeneration": {},
    "VideoLlavaForConditionalGeneration": {},
    "Gemma3ForConditionalGeneration": {},
    "Mistral3ForConditionalGeneration": {},
    "MllamaForConditionalGeneration": {},
    "AriaForConditionalGeneration": {},
    "Emu3ForConditionalGeneration": EMU3,
    "Qwen3_5ForCausalLM": {},
}


def shortened(config: Any) -> Any:
    """The default configs of the larger models, with two layers in each of their towers."""
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        if getattr(part, "num_hidden_layers", 0) > 4:
            part.num_hidden_layers = 2
            if getattr(part, "layer_types", None):
                part.layer_types = part.layer_types[:2]
    return config


def saved_names(kind: str) -> tuple[dict[str, str], list[str]]:
    """Names in memory -> on disk, of what one tensor on disk holds, and all names on disk."""
    make = getattr(transformers, kind)
    with torch.device("meta"):
        model = make(shortened(make.config_class(**MODELS[kind])))
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)  # as if it were loaded
    tensors = model.state_dict()
    one_by_one = {name: list(revert_weight_conversion(model, {name: tensor})) for name, tensor in tensors.items()}
    disk = list(revert_weight_conversion(model, tensors))
    weights = (".weight", ".gate_up_proj", ".down_proj")
    return {k: v[0] for k, v in one_by_one.items() if len(v) == 1 and k.endswith(weights) and v[0] in disk}, disk


@pytest.mark.parametrize("kind", MODELS)
def test_names_in_memory_become_the_names_transformers_saves(kind: str) -> None:
    saved, disk = saved_names(kind)
    assert any(memory != name for memory, name in saved.items()), "nothing is renamed: the test proves nothing"
    assert map_names(saved, disk, "adapter", "base") == saved
    projections = {memory: name for memory, name in saved.items() if memory.endswith(("q_proj.weight", "qkv.weight"))}
    assert map_names(projections, disk, "adapter", "base") == projections


@pytest.mark.parametrize("kind", ["MixtralForCausalLM", "ViTForImageClassification", "LlavaForConditionalGeneration"])
def test_names_as_they_are_on_disk_are_never_renamed(kind: str) -> None:
    _, disk = saved_names(kind)
    assert map_names(disk, disk, "adapter", "base") == dict(zip(disk, disk))


def test_an_adapter_of_the_body_alone_is_renamed_too() -> None:
    saved, disk = saved_names("ViTForImageClassification")
    body = {memory.removeprefix("vit."): name for memory, name in saved.items() if memory.startswith("vit.")}
    assert map_names(body, disk, "adapter", "base") == body


def test_a_base_of_the_body_alone_is_found_under_its_names_on_disk() -> None:
    saved, disk = saved_names("ViTForImageClassification")
    body = {memory: name.removeprefix("vit.") for memory, name in saved.items() if memory.startswith("vit.")}
    headless = [name.removeprefix("vit.") for name in disk]
    assert map_names(body, headless, "adapter", "base") == body


def test_the_norms_of_old_checkpoints_are_gamma_and_beta() -> None:
    base = ["bert.x.LayerNorm.gamma", "bert.x.LayerNorm.beta", "bert.x.dense.weight", "bert.c.weight_g", "bert.c.weight_v"]
    names = [
        "bert.x.LayerNorm.weight", "bert.x.LayerNorm.bias", "bert.x.dense.weight",
        "bert.c.parametrizations.weight.original0", "bert.c.parametrizations.weight.original1",
    ]  # fmt: skip
    assert map_names(names, base, "adapter", "base") == dict(zip(names, base))


def test_checkpoints_that_repeat_the_name_of_the_language_model_are_matched() -> None:
    name = "model.language_model.layers.0.mlp.weight"
    base = ["model.language_model.model.layers.0.mlp.weight", "lm_head.weight"]
    assert map_names([name, "lm_head.weight"], base, "adapter", "base") == dict(zip([name, "lm_head.weight"], base))


def test_one_name_that_no_renaming_has_is_named_alone() -> None:
    saved, disk = saved_names("MixtralForCausalLM")
    with pytest.raises(NameMismatchError) as caught:
        map_names([*saved, "model.layers.9.mlp.gate.weight"], disk, "adapter", "base")
    assert f"1 of {len(saved) + 1} adapted tensors are not in base: model.layers.9.mlp.gate.weight" in str(caught.value)


def test_every_renaming_says_where_it_is_from() -> None:
    assert RENAMINGS[0].steps == ()
    assert all(renaming.source and renaming.steps for renaming in RENAMINGS[1:])


# --- from the adapter to the output --------------------------------------------------------------------------------------

ROPE = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
QWEN2_VL = dict(
    text_config={**TEXT, "rope_parameters": ROPE},
    vision_config=dict(depth=1, embed_dim=16, hidden_size=16, num_heads=2, mlp_ratio=2, patch_size=2),
)
CLIP = dict(model_type="clip_vision_model", **IMAGE)
LLAVA = dict(text_config={**TEXT, "model_type": "llama"}, vision_config=CLIP)
ADAPTED: dict[str, tuple[dict[str, Any], list[str]]] = {  # targets are names in memory
    "ViTForImageClassification": (IMAGE, ["q_proj", "o_proj", "fc1", "fc2"]),
    "SwinForImageClassification": (SWIN, ["v_proj", "o_proj", "fc2"]),
    "Qwen2VLForConditionalGeneration": (QWEN2_VL, ["q_proj", "down_proj", "qkv", "proj"]),
    "LlavaForConditionalGeneration": (LLAVA, ["q_proj", "fc1", "linear_1", "down_proj"]),
    "GPTNeoXForCausalLM": (MODELS["GPTNeoXForCausalLM"], ["query_key_value", "lm_head"]),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_renamed_models_are_edited_as_peft_merges_and_transformers_saves_them(kind: str, tmp_path: Path) -> None:
    fields, targets = ADAPTED[kind]
    make = getattr(transformers, kind)

    def model() -> Any:
        return oracle.random_model(make(make.config_class(**fields)))

    base = oracle.save_model(model(), tmp_path / "base")
    settings = dict(r=2, lora_alpha=3, target_modules=targets, bias="all")
    adapter = oracle.train(model(), tmp_path / "adapter", LoraConfig(**settings))
    merged = oracle.merged_on_disk(model(), base, adapter, tmp_path / "merged")
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged, 0.7, oracle.identity)
