"""Files of diffusers, ComfyUI and their like: dotted names, alpha in the metadata or nowhere. PEFT is the oracle for scales
that settings say, numpy in float64 for the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import taskvec as tv
from taskvec.delta.adapters import open_adapter

from . import peft_oracle as oracle
from .conftest import Bases
from .loose import Array, Tensors, assert_changed, base_of, draw, exact, refusal, write

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]

A, B = draw(2, 6), draw(6, 2)
Q, OUT, TEXT = "mid.attn1.to_q", "mid.attn1.to_out.0", "layers.0.self_attn.q_proj"
UNET = {f"{Q}.weight": (6, 6), f"{OUT}.weight": (6, 6), "mid.attn1.to_k.weight": (6, 6), "conv.weight": (6, 6, 3, 3)}
CLIP = {f"{TEXT}.weight": (6, 6), "layers.0.self_attn.out_proj.weight": (6, 6)}


def product(scale: float = 1.0) -> Array:
    return scale * exact(B) @ exact(A)


# --- names ----------------------------------------------------------------------------------------------------------------

FORMS = {  # module of the base -> what its two factors have been called
    "diffusers": (Q, f"unet.{Q}.lora_A.weight", f"unet.{Q}.lora_B.weight"),
    "a transformer": (Q, f"transformer.{Q}.lora_A.weight", f"transformer.{Q}.lora_B.weight"),
    "ComfyUI": (Q, f"diffusion_model.{Q}.lora_A.weight", f"diffusion_model.{Q}.lora_B.weight"),
    "ComfyUI with Kohya's factors": (Q, f"diffusion_model.{Q}.lora_down.weight", f"diffusion_model.{Q}.lora_up.weight"),
    "a state dict": (Q, f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"),
    "a raw state dict": (Q, f"{Q}.lora_A.default.weight", f"{Q}.lora_B.default.weight"),
    "before 0.22": (Q, f"unet.{Q}.lora.down.weight", f"unet.{Q}.lora.up.weight"),
    "a processor's": (Q, "unet.mid.attn1.processor.to_q_lora.down.weight", "unet.mid.attn1.processor.to_q_lora.up.weight"),
    "without component": (Q, "mid.attn1.processor.to_q_lora.down.weight", "mid.attn1.processor.to_q_lora.up.weight"),
    "the output": (OUT, "mid.attn1.processor.to_out_lora.down.weight", "mid.attn1.processor.to_out_lora.up.weight"),
    "a text encoder": (TEXT, f"text_encoder.{TEXT}.lora_A.weight", f"text_encoder.{TEXT}.lora_B.weight"),
    "the second": (TEXT, f"text_encoder_2.{TEXT}.lora_A.weight", f"text_encoder_2.{TEXT}.lora_B.weight"),
    "a text encoder's linear layer": (
        TEXT,
        f"text_encoder.{TEXT}.lora_linear_layer.down.weight",
        f"text_encoder.{TEXT}.lora_linear_layer.up.weight",
    ),
    "an old text encoder's": (
        TEXT,
        "text_encoder.layers.0.self_attn.to_q_lora.down.weight",
        "text_encoder.layers.0.self_attn.to_q_lora.up.weight",
    ),
    "its output": (
        "layers.0.self_attn.out_proj",
        "text_encoder.layers.0.self_attn.to_out_lora.down.weight",
        "text_encoder.layers.0.self_attn.to_out_lora.up.weight",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_name_two_factors_means_their_product(form: str, tmp_path: Path) -> None:
    module, down, up = FORMS[form]
    base = base_of(tmp_path / "part.safetensors", UNET if f"{module}.weight" in UNET else CLIP)
    adapter = write(tmp_path / "lora.safetensors", {down: A, up: B})
    assert_changed(base, adapter, {f"{module}.weight": product()})
    (note,) = open_adapter(adapter).resolve(tv.Checkpoint.open(base), lambda name: True).notes
    assert "says no alpha for its factors" in note and "s = 1" in note


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_convolution_and_small_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET, dtype)
    down, up = draw(2, 6, 3, 3, dtype=dtype), draw(6, 2, 1, 1, dtype=dtype)
    adapter = write(tmp_path / "lora.safetensors", {"unet.conv.lora_A.weight": down, "unet.conv.lora_B.weight": up})
    assert_changed(base, adapter, {"conv.weight": np.einsum("or,rikl->oikl", exact(up)[..., 0, 0], exact(down))})


def test_alpha_beside_dotted_names_counts(tmp_path: Path) -> None:
    base = base_of(tmp_path / "dit.safetensors", UNET)
    name = f"diffusion_model.{Q}"
    factors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(5.0)}
    assert_changed(base, write(tmp_path / "lora.safetensors", factors), {f"{Q}.weight": product(2.5)})


def test_a_unet_in_the_layout_of_ldm_is_found_by_the_names_of_diffusers(tmp_path: Path) -> None:
    base = base_of(
        tmp_path / "all.safetensors",
        {"model.diffusion_model.input_blocks.3.0.op.weight": (6, 6), "model.diffusion_model.middle_block.1.q.weight": (6, 6)},
    )
    adapter = write(
        tmp_path / "lora.safetensors",
        {"unet.mid_block.attentions.0.q.lora_A.weight": A, "unet.mid_block.attentions.0.q.lora_B.weight": B},
    )
    assert_changed(base, adapter, {"model.diffusion_model.middle_block.1.q.weight": product()})


def test_both_parts_of_a_pipeline_in_one_file_change_by_their_own_factors(tmp_path: Path) -> None:
    shapes = {f"unet.{name}": s for name, s in UNET.items()} | {f"text_encoder.{name}": s for name, s in CLIP.items()}
    base = base_of(tmp_path / "all.safetensors", shapes)
    factors = {f"unet.{Q}.lora_A.weight": A, f"unet.{Q}.lora_B.weight": B}
    factors |= {f"text_encoder.{TEXT}.lora_A.weight": 2 * A, f"text_encoder.{TEXT}.lora_B.weight": B}
    adapter = write(tmp_path / "lora.safetensors", factors)
    assert_changed(base, adapter, {f"unet.{Q}.weight": product(), f"text_encoder.{TEXT}.weight": product(2)})


def test_a_file_for_more_than_the_base_is_refused_naming_what_is_left_over(tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    factors = {
        f"{part}.lora_{half}.weight": t for part in (f"unet.{Q}", f"text_encoder.{TEXT}") for half, t in zip("AB", (A, B))
    }
    message = refusal(base, write(tmp_path / "lora.safetensors", factors))
    assert f"1 of 2 adapted tensors are not in {base} (of text_encoder): text_encoder.{TEXT}.weight" in message
    assert "Save the tensors of each part to a file of its own" in message


@pytest.mark.parametrize("parts", [("text_encoder", "text_encoder_2"), ("transformer", "transformer_2")])
def test_two_parts_with_the_same_names_are_never_laid_on_one(parts: tuple[str, str], tmp_path: Path) -> None:
    base = base_of(tmp_path / "part.safetensors", CLIP)
    factors = {f"{part}.{TEXT}.lora_{half}.weight": t + 0 for part in parts for half, t in zip("AB", (A, B))}
    message = refusal(base, write(tmp_path / "lora.safetensors", factors))
    assert f"{parts[0]}.{TEXT}.weight and {parts[1]}.{TEXT}.weight would both change {TEXT}.weight" in message


# --- settings in the metadata -------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "alpha": dict(r=4, lora_alpha=7, target_modules=["q_proj", "down_proj"]),
    "rslora": dict(r=4, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "patterns": dict(
        r=4,
        lora_alpha=7,
        target_modules=["q_proj", "k_proj", "v_proj"],
        rank_pattern={"q_proj": 2, r"model\.layers\.1\.self_attn\.k_proj": 6},
        alpha_pattern={"v_proj": 1, "^model.layers.0.self_attn.k_proj": 30},
    ),
    "dora": dict(r=4, lora_alpha=7, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "pissa": dict(r=4, lora_alpha=7, init_lora_weights="pissa", target_modules=["q_proj"]),
}


def as_diffusers_saves_it(adapter: Path, single: Path, component: str) -> Path:
    """A PEFT adapter as one file: the component before every name, the config (LoraConfig.to_dict) in the metadata."""
    prefix = f"{component}." if component else ""
    stored = load_file(adapter / "adapter_model.safetensors")
    tensors = {prefix + key.removeprefix("base_model.model."): tensor for key, tensor in stored.items()}
    config = json.loads((adapter / "adapter_config.json").read_text())
    return write(single, tensors, {prefix + key: value for key, value in config.items()})


@pytest.mark.parametrize("component", ["transformer", "text_encoder", ""])
@pytest.mark.parametrize("case", SETTINGS)
def test_the_settings_of_a_component_are_a_peft_config(case: str, component: str, bases: Bases, tmp_path: Path) -> None:
    adapter = oracle.train(oracle.llama(), tmp_path / "adapter", LoraConfig(**SETTINGS[case]))
    single = as_diffusers_saves_it(adapter, tmp_path / "pytorch_lora_weights.safetensors", component)
    found = oracle.edited_by_taskvec(bases("llama"), single, tmp_path / "out", alpha=0.7)
    merged = oracle.merged_by_peft(oracle.llama(), bases("llama"), adapter)
    oracle.assert_is_base_minus(found, oracle.weights_of(bases("llama")), merged, 0.7, oracle.identity)


def test_settings_of_one_component_do_not_count_for_another(tmp_path: Path) -> None:
    shapes = {f"unet.{name}": s for name, s in UNET.items()} | {f"text_encoder.{name}": s for name, s in CLIP.items()}
    base = base_of(tmp_path / "all.safetensors", shapes)
    factors = {
        f"{part}.lora_{half}.weight": t for part in (f"unet.{Q}", f"text_encoder.{TEXT}") for half, t in zip("AB", (A, B))
    }
    adapter = write(tmp_path / "lora.safetensors", factors, {"text_encoder.r": 2, "text_encoder.lora_alpha": 9})
    assert_changed(base, adapter, {f"unet.{Q}.weight": product(), f"text_encoder.{TEXT}.weight": product(4.5)})


@pytest.mark.parametrize("prefix", ["unet.", ""])
@pytest.mark.parametrize("other", ["text_encoder", "unet_2", "unet.x"])
def test_settings_of_other_components_only_are_refused(prefix: str, other: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    factors = {f"{prefix}{Q}.lora_A.weight": A, f"{prefix}{Q}.lora_B.weight": B}
    message = refusal(base, write(tmp_path / "lora.safetensors", factors, {f"{other}.r": 2, f"{other}.lora_alpha": 9}))
    assert f"lora_adapter_metadata is of {other}, but its modules are of {'unet' if prefix else 'no component'}" in message


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_lokr_in_the_hands_of_peft_is_scaled_even_if_both_factors_are_whole(alpha: float | None, tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    w1, w2 = draw(2, 3), draw(3, 2)
    settings = None if alpha is None else {"unet.r": 2, "unet.alpha": alpha, "unet.peft_type": "LOKR"}
    adapter = write(tmp_path / "lokr.safetensors", {f"unet.{Q}.lokr_w1": w1, f"unet.{Q}.lokr_w2": w2}, settings)
    assert_changed(base, adapter, {f"{Q}.weight": (1 if alpha is None else 1.5) * np.kron(exact(w1), exact(w2))})


def test_settings_are_pinned_by_the_digest_of_the_config(tmp_path: Path) -> None:
    factors = {f"unet.{Q}.lora_A.weight": A, f"unet.{Q}.lora_B.weight": B}
    files = [write(tmp_path / f"{n}.safetensors", factors, {"unet.lora_alpha": n, "unet.r": 2}) for n in (4, 5)]
    assert len({open_adapter(file).config_sha256 for file in files}) == 2


# --- refusals -------------------------------------------------------------------------------------------------------------

PAIR = {f"unet.{Q}.lora_A.weight": A, f"unet.{Q}.lora_B.weight": B}
REFUSED: dict[str, tuple[Tensors, dict[str, Any] | None, str]] = {
    "half a pair": ({f"unet.{Q}.lora_A.weight": A}, None, "but no lora_B.weight"),
    "an unknown tensor": (PAIR | {"unet.conv_in.weight": A}, None, "tensor unet.conv_in.weight: no kind of adapter"),
    "two adapters": (
        PAIR | {f"unet.{Q}.lora_A.second.weight": A},
        None,
        f"tensor unet.{Q}.lora_A.second.weight: no kind of adapter",
    ),
    "one tensor twice": (PAIR | {f"unet.{Q}.lora.down.weight": A}, None, "are the same tensor of one module"),
    "alpha in two ways": (
        PAIR | {f"unet.{Q}.alpha": torch.tensor(1.0)},
        {"unet.r": 2, "unet.lora_alpha": 4},
        f"unet.{Q} has an alpha, and so has lora_adapter_metadata",
    ),
    "another rank": (PAIR, {"unet.r": 3, "unet.lora_alpha": 4}, "found rank 2, expected 3"),
    "an unknown field": (
        PAIR,
        {"unet.r": 2, "unet.use_magic": True},
        "lora_adapter_metadata of unet: unknown field use_magic",
    ),
    "a refused field": (PAIR, {"unet.r": 2, "unet.use_qalora": True}, "lora_adapter_metadata of unet: use_qalora is set"),
    "settings of another kind": (
        PAIR,
        {"unet.r": 2, "unet.peft_type": "LOKR"},
        f"peft_type is LOKR, but module unet.{Q} has factors of LORA",
    ),
    "alpha that is no number": (PAIR, {"unet.r": 2, "unet.lora_alpha": "x"}, "of unet: lora_alpha is x, expected a number"),
    "lengths without use_dora": (
        PAIR | {f"unet.{Q}.lora_magnitude_vector": draw(6)},
        {"unet.r": 2, "unet.lora_alpha": 4},
        "use_dora is not set",
    ),
    "factors of PEFT without its config": (
        {f"base_model.model.{Q}.lora_A.weight": A, f"base_model.model.{Q}.lora_B.weight": B},
        None,
        "without its adapter_config.json, which has the scale",
    ),
    "NaN": ({name: tensor / 0 for name, tensor in PAIR.items()}, None, "holds NaN or inf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_covered_is_refused_by_name_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    tensors, settings, expected = REFUSED[case]
    base = base_of(tmp_path / "unet.safetensors", UNET)
    message = refusal(base, write(tmp_path / "lora.safetensors", tensors, settings))
    assert expected in message, message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not JSON"),
        ("[1]", "is a JSON list, expected an object"),
        ("[" * 100_000, "is not JSON"),
        ("3", "a JSON int"),
    ],
)
def test_settings_that_are_no_object_are_refused(text: str, expected: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    adapter = tmp_path / "lora.safetensors"
    save_file(PAIR, adapter, {"lora_adapter_metadata": text})
    assert f"lora_adapter_metadata {expected}" in refusal(base, adapter).replace("is a JSON int", "a JSON int")


def test_factors_of_peft_with_an_alpha_beside_them_need_no_config(tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    name = f"base_model.model.{Q}"
    factors = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B, f"{name}.alpha": torch.tensor(4.0)}
    assert_changed(base, write(tmp_path / "lora.safetensors", factors), {f"{Q}.weight": product(2)})


def test_it_is_subtracted_from_the_model_it_was_not_trained_on_too(tmp_path: Path) -> None:
    base, origin = base_of(tmp_path / "unet.safetensors", UNET), base_of(tmp_path / "origin.safetensors", UNET)
    adapter = write(tmp_path / "lora.safetensors", PAIR)
    tv.subtract(base, adapter, alpha=1, base=origin, output=tmp_path / "out.safetensors", fsync=False)
    found = exact(load_file(tmp_path / "out.safetensors")[f"{Q}.weight"])
    np.testing.assert_allclose(found, exact(load_file(base)[f"{Q}.weight"]) - product(), rtol=0, atol=1e-5)
    other = base_of(tmp_path / "other.safetensors", CLIP)
    with pytest.raises(tv.NameMismatchError, match=r"not in .*other\.safetensors"):
        tv.subtract(base, adapter, alpha=1, base=other, output=tmp_path / "no.safetensors", fsync=False)


@pytest.mark.parametrize("make", [lambda path: path, lambda path: path.parent])
def test_it_is_shown_as_an_adapter(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "lora/lora.safetensors", PAIR, {"unet.r": 2, "unet.lora_alpha": 5})
    found = tv.inspect(make(path))
    assert found.adapter is not None and found.refused is None
    shown = {key: found.adapter[key] for key in ("family", "modules", "ranks", "scales", "targets")}
    assert shown == {"family": "LORA", "modules": 1, "ranks": {"2": 1}, "scales": {"2.5": 1}, "targets": {"to_q": 1}}
    assert [tensor.name for tensor in found.tensors] == list(PAIR)
