"""Files of sd-scripts and LyCORIS: flattened names, alpha beside the factors. Every Δ is computed again here, in float64.

LyCORIS 4.1.3 itself gives the same numbers (modules/locon.py and the weights its LoHa and LoKr modules train with; its
get_merged_weight multiplies those two by the scale twice).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import taskvec as tv
from taskvec.delta.adapters import open_adapter
from taskvec.delta.adapters.unet_names import second_names

from . import peft_oracle as oracle
from .conftest import Bases
from .loose import Array, Tensors, assert_changed, base_of, draw, edited, exact, refusal, write

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]

UNET = {
    "down.0.attn.to_q.weight": (6, 6),
    "down.0.attn.to_k.weight": (6, 6),
    "down.0.ff.net_0.proj.weight": (8, 6),
    "down.0.ff.net_0.proj.bias": (8,),
    "conv_in.weight": (6, 4, 3, 3),
    "proj_in.weight": (4, 6, 1, 1),
    "temporal.weight": (6, 4, 3),
    "norm.weight": (6,),
}
Q, FF, CONV, POINT, LINE = "down.0.attn.to_q", "down.0.ff.net_0.proj", "conv_in", "proj_in", "temporal"


def flat(module: str, prefix: str = "lora_unet") -> str:
    return f"{prefix}_{module.replace('.', '_')}"


def pair(module: str, rank: int = 2, dtype: torch.dtype = torch.float32, prefix: str = "lora_unet") -> Tensors:
    """lora_down and lora_up of one module of UNET, as sd-scripts shapes them."""
    out, inside, *kernel = UNET[f"{module}.weight"]
    down, up = draw(rank, inside, *kernel, dtype=dtype), draw(out, rank, *(1 for _ in kernel), dtype=dtype)
    return {f"{flat(module, prefix)}.lora_down.weight": down, f"{flat(module, prefix)}.lora_up.weight": up}


def product(factors: Tensors, module: str, scale: float, prefix: str = "lora_unet") -> Array:
    down, up = (exact(factors[f"{flat(module, prefix)}.lora_{half}.weight"]) for half in ("down", "up"))
    return scale * np.einsum("or,r...->o...", up.reshape(len(up), -1), down)


def alpha(module: str, value: float = 3.0, prefix: str = "lora_unet") -> Tensors:
    return {f"{flat(module, prefix)}.alpha": torch.tensor(value)}


# --- LoRA ---------------------------------------------------------------------------------------------------------------

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("kept", DTYPES)
def test_every_kind_of_layer_changes_by_its_product_times_alpha_over_rank(kept: str, stored: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET, DTYPES[kept])
    ranks = {Q: 2, FF: 4, CONV: 2, POINT: 3, LINE: 2}
    factors: Tensors = {}
    for module, rank in ranks.items():
        factors |= pair(module, rank, DTYPES[stored]) | {f"{flat(module)}.alpha": torch.tensor(3.0, dtype=DTYPES[stored])}
    adapter = write(tmp_path / "lora.safetensors", factors)
    assert_changed(base, adapter, {f"{m}.weight": product(factors, m, 3 / rank) for m, rank in ranks.items()})


def test_it_is_what_peft_merges_from_the_same_factors(bases: Bases, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj", "v_proj", "down_proj"])
    adapter = oracle.train(oracle.llama(), tmp_path / "adapter", config)
    converted: Tensors = {}
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, half = key.removeprefix("base_model.model.").rpartition(".lora_")
        converted[f"{flat(module)}.lora_{ {'A': 'down', 'B': 'up'}[half[0]] }.weight".replace(" ", "")] = tensor
        converted[f"{flat(module)}.alpha"] = torch.tensor(7.0)
    single = write(tmp_path / "single.safetensors", converted)
    found = oracle.edited_by_taskvec(bases("llama"), single, tmp_path / "out", alpha=0.7)
    merged = oracle.merged_by_peft(oracle.llama(), bases("llama"), adapter)
    oracle.assert_is_base_minus(found, oracle.weights_of(bases("llama")), merged, 0.7, oracle.identity)


@pytest.mark.parametrize(
    "prefix", ["lora_unet", "lora_transformer", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lycoris"]
)
def test_a_part_of_a_pipeline_alone_is_a_base_whatever_its_prefix(prefix: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "part.safetensors", UNET)
    factors = pair(Q, prefix=prefix) | alpha(Q, prefix=prefix)
    adapter = write(tmp_path / "lora.safetensors", factors)
    assert_changed(base, adapter, {f"{Q}.weight": product(factors, Q, 1.5, prefix)})


SCALARS = [
    torch.tensor(3.0, dtype=torch.float16), torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor([3.0]),
    torch.tensor(3.0, dtype=torch.float64), torch.tensor(3), torch.tensor([3], dtype=torch.int32),
]  # fmt: skip


@pytest.mark.parametrize("stored", SCALARS, ids=lambda stored: f"{stored.dtype} {list(stored.shape)}")
def test_alpha_is_read_however_it_is_stored(stored: torch.Tensor, tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    factors = pair(Q) | {f"{flat(Q)}.alpha": stored}
    assert_changed(base, write(tmp_path / "lora.safetensors", factors), {f"{Q}.weight": product(factors, Q, 1.5)})


def test_without_alpha_the_product_is_taken_as_it_is_and_a_note_says_so(tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    factors = pair(Q) | pair(FF, 4) | alpha(FF)
    adapter = write(tmp_path / "lora.safetensors", factors)
    deltas = {f"{Q}.weight": product(factors, Q, 1), f"{FF}.weight": product(factors, FF, 0.75)}
    assert_changed(base, adapter, deltas)
    (note,) = open_adapter(adapter).resolve(tv.Checkpoint.open(base), lambda name: True).notes
    assert "lora.safetensors says no alpha for 1 module (lora_unet_down_0_attn_to_q)" in note and "s = 1" in note


@pytest.mark.parametrize("module", [CONV, POINT, LINE])
def test_a_core_between_the_factors_of_a_convolution_is_contracted_with_both(module: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    out, inside, *kernel = UNET[f"{module}.weight"]
    ones = [1] * len(kernel)
    down, mid, up = draw(3, inside, *ones), draw(3, 3, *kernel), draw(out, 3, *ones)
    factors = {f"{flat(module)}.lora_{half}.weight": t for half, t in (("down", down), ("mid", mid), ("up", up))}
    delta = np.einsum("op,pq...,qi->oi...", exact(up).reshape(out, 3), exact(mid), exact(down).reshape(3, inside))
    adapter = write(tmp_path / "lora.safetensors", factors | alpha(module, 2))
    assert_changed(base, adapter, {f"{module}.weight": 2 / 3 * delta})


@pytest.mark.parametrize("module", [Q, FF, CONV])
def test_dora_scale_is_the_length_of_every_row_of_the_merged_weight(module: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    weight = exact(load_file(base)[f"{module}.weight"])
    length = draw(len(weight), *(1 for _ in weight.shape[1:])) + 4
    factors = pair(module) | alpha(module) | {f"{flat(module)}.dora_scale": length}
    direction = weight + product(factors, module, 1.5)
    norm = np.sqrt((direction.reshape(len(weight), -1) ** 2).sum(1)).reshape(length.shape)
    adapter = write(tmp_path / "lora.safetensors", factors)
    assert_changed(base, adapter, {f"{module}.weight": exact(length) / norm * direction - weight})


# --- LoHa and LoKr in these names: their formulas are tested with their families ------------------------------------------


@pytest.mark.parametrize("module", [Q, FF, CONV])
def test_loha_is_scaled_by_alpha_over_rank(module: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    shape = UNET[f"{module}.weight"]
    columns = int(np.prod(shape[1:]))
    parts = {"w1_a": draw(shape[0], 2), "w1_b": draw(2, columns), "w2_a": 1 + draw(shape[0], 2), "w2_b": 1 - draw(2, columns)}
    factors = {f"{flat(module)}.hada_{part}": tensor for part, tensor in parts.items()} | alpha(module)
    w1a, w1b, w2a, w2b = map(exact, parts.values())
    adapter = write(tmp_path / "loha.safetensors", factors)
    assert_changed(base, adapter, {f"{module}.weight": 1.5 * ((w1a @ w1b) * (w2a @ w2b)).reshape(shape)})


LOKR: dict[str, tuple[Tensors, float]] = {  # of [8, 6]; the scale for alpha = 3
    "both whole: alpha is not used": ({"w1": draw(2, 3), "w2": draw(4, 2)}, 1.0),
    "the second a product": ({"w1": draw(2, 3), "w2_a": draw(4, 2), "w2_b": draw(2, 2)}, 1.5),
    "the first a product": ({"w1_a": draw(2, 1), "w1_b": draw(1, 3), "w2": draw(4, 2)}, 3.0),
    "both products": ({"w1_a": draw(2, 2), "w1_b": draw(2, 3), "w2_a": draw(4, 2), "w2_b": draw(2, 2)}, 1.5),
}


@pytest.mark.parametrize("case", LOKR)
def test_lokr_is_scaled_by_alpha_over_rank_unless_both_factors_are_whole(case: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    parts, scale = LOKR[case]
    factors = {f"{flat(FF)}.lokr_{part}": tensor for part, tensor in parts.items()} | alpha(FF)
    w1, w2 = (exact(parts[w]) if w in parts else exact(parts[f"{w}_a"]) @ exact(parts[f"{w}_b"]) for w in ("w1", "w2"))
    adapter = write(tmp_path / "lokr.safetensors", factors)
    assert_changed(base, adapter, {f"{FF}.weight": scale * np.kron(w1, w2)})


def test_a_whole_lokr_factor_of_a_convolution_keeps_its_kernel(tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    w1, w2 = draw(3, 2), draw(2, 2, 3, 3)
    adapter = write(tmp_path / "lokr.safetensors", {f"{flat(CONV)}.lokr_w1": w1, f"{flat(CONV)}.lokr_w2": w2} | alpha(CONV))
    kron = np.einsum("ac,bdkl->abcdkl", exact(w1), exact(w2)).reshape(6, 4, 3, 3)
    assert_changed(base, adapter, {f"{CONV}.weight": kron})


def test_one_file_may_hold_several_kinds_for_several_modules(tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    w1, w2 = draw(2, 3), draw(4, 2)
    factors = pair(Q) | alpha(Q) | {f"{flat(FF)}.lokr_w1": w1, f"{flat(FF)}.lokr_w2": w2}
    adapter = write(tmp_path / "mixed.safetensors", factors)
    assert_changed(base, adapter, {f"{Q}.weight": product(factors, Q, 1.5), f"{FF}.weight": np.kron(exact(w1), exact(w2))})
    assert open_adapter(adapter).family == "LOKR+LORA"


# --- names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", ["model.diffusion_model.", "diffusion_model.", "unet.", "transformer."])
def test_a_checkpoint_of_a_whole_pipeline_is_a_base_too(home: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "all.safetensors", {f"{home}{name}": shape for name, shape in UNET.items()})
    factors = pair(Q) | alpha(Q)
    assert_changed(base, write(tmp_path / "lora.safetensors", factors), {f"{home}{Q}.weight": product(factors, Q, 1.5)})


TEXT = {
    "lora_te": "cond_stage_model.transformer.", "lora_te1": "conditioner.embedders.0.transformer.",
    "lora_te2": "text_encoders.clip_g.transformer.", "lora_te3": "text_encoders.t5xxl.transformer.",
}  # fmt: skip


@pytest.mark.parametrize("prefix", TEXT)
def test_a_denoiser_and_a_text_encoder_are_found_where_one_checkpoint_keeps_them(prefix: str, tmp_path: Path) -> None:
    homes = {"lora_unet": "model.diffusion_model.", prefix: TEXT[prefix]}
    base = base_of(tmp_path / "all.safetensors", {f"{home}{n}": s for home in homes.values() for n, s in UNET.items()})
    factors = pair(Q) | alpha(Q) | pair(Q, prefix=prefix) | alpha(Q, 5, prefix)
    adapter = write(tmp_path / "lora.safetensors", factors)
    deltas = {
        f"model.diffusion_model.{Q}.weight": product(factors, Q, 1.5),
        f"{TEXT[prefix]}{Q}.weight": product(factors, Q, 2.5, prefix),
    }
    assert_changed(base, adapter, deltas)


def test_a_name_that_flattens_as_another_does_is_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", {"a.b_c.weight": (6, 6), "a_b.c.weight": (6, 6), **UNET})
    factors = {"lora_unet_a_b_c.lora_down.weight": draw(2, 6), "lora_unet_a_b_c.lora_up.weight": draw(6, 2)}
    message = refusal(base, write(tmp_path / "lora.safetensors", factors))
    assert "module lora_unet_a_b_c: may be any of a.b_c.weight, a_b.c.weight" in message
    edited(base, write(tmp_path / "other.safetensors", pair(Q)))  # the ambiguity is no one's who does not meet it


def test_a_base_that_has_the_module_in_two_places_is_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path / "all.safetensors", {f"{home}{Q}.weight": (6, 6) for home in ("unet.", "transformer.")})
    message = refusal(base, write(tmp_path / "lora.safetensors", pair(Q)))
    assert f"may be any of transformer.{Q}.weight, unet.{Q}.weight" in message


def test_a_file_for_more_than_the_base_is_refused_naming_what_is_left_over(tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    factors = (
        pair(Q)
        | pair(FF)
        | {"lora_te1_text_fc1.lora_down.weight": draw(2, 6), "lora_te1_text_fc1.lora_up.weight": draw(6, 2)}
    )
    message = refusal(base, write(tmp_path / "lora.safetensors", factors))
    assert "1 of 3 adapted tensors are not in" in message and "(of lora_te1): lora_te1_text_fc1.weight" in message
    assert "Save the tensors of each part to a file of its own" in message


def test_two_text_encoders_are_never_laid_on_one(tmp_path: Path) -> None:
    base = base_of(tmp_path / "text_encoder.safetensors", UNET)
    message = refusal(base, write(tmp_path / "lora.safetensors", pair(Q, prefix="lora_te1") | pair(Q, prefix="lora_te2")))
    assert "lora_te1_down_0_attn_to_q.weight and lora_te2_down_0_attn_to_q.weight would both change" in message


def test_a_file_for_another_model_is_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", {"blocks.0.q.weight": (6, 6)})
    message = refusal(base, write(tmp_path / "lora.safetensors", pair(Q)))
    assert "1 of 1 adapted tensor are not in" in message and "another model" in message


# names of SDXL's and SD 1.5's modules as diffusers 0.42 itself converts them (convert_ldm_unet_checkpoint)
LDM_NAMES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.out_layers.0": "down_blocks.0.resnets.0.norm2",
    "input_blocks.2.0.emb_layers.1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.5.1.transformer_blocks.0.attn1.to_v": "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_v",
    "input_blocks.7.1.transformer_blocks.7.norm1": "down_blocks.2.attentions.0.transformer_blocks.7.norm1",
    "middle_block.0.in_layers.2": "mid_block.resnets.0.conv1",
    "middle_block.1.transformer_blocks.4.ff.net.0.proj": "mid_block.attentions.0.transformer_blocks.4.ff.net.0.proj",
    "middle_block.2.skip_connection": "mid_block.resnets.1.conv_shortcut",
    "output_blocks.1.1.transformer_blocks.9.attn2.to_q": "up_blocks.0.attentions.1.transformer_blocks.9.attn2.to_q",
    "output_blocks.2.1.transformer_blocks.0.attn2.to_out.0": "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0",
    "output_blocks.2.0.out_layers.3": "up_blocks.0.resnets.2.conv2",
    "output_blocks.3.0.in_layers.0": "up_blocks.1.resnets.0.norm1",
    "output_blocks.4.1.proj_out": "up_blocks.1.attentions.1.proj_out",
    "output_blocks.5.0.skip_connection": "up_blocks.1.resnets.2.conv_shortcut",
    "output_blocks.10.1.transformer_blocks.0.attn1.to_v": "up_blocks.3.attentions.1.transformer_blocks.0.attn1.to_v",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_TWO_LAYERS = {"down_blocks.0.resnets.1.conv1.weight": (6, 6)}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("stored", ["ldm", "diffusers"])
def test_the_two_layouts_of_a_unet_stand_for_each_other(stored: str, prefix: str, tmp_path: Path) -> None:
    names = dict(LDM_NAMES) if stored == "diffusers" else {d: ldm for ldm, d in LDM_NAMES.items()}
    shapes = {f"{prefix}{name}.weight": (6, 6) for name in names.values()}
    shapes |= {f"{prefix}{name}": shape for name, shape in _TWO_LAYERS.items()} if stored == "diffusers" else {}
    base = base_of(tmp_path / "unet.safetensors", shapes)
    factors: Tensors = {}
    for n, name in enumerate(names):
        factors[f"{flat(name)}.lora_down.weight"] = draw(2, 6) + n
        factors[f"{flat(name)}.lora_up.weight"] = draw(6, 2)
    adapter = write(tmp_path / "lora.safetensors", factors)
    assert_changed(base, adapter, {f"{prefix}{to}.weight": product(factors, name, 1) for name, to in names.items()})


def test_a_unet_of_other_blocks_has_other_second_names_or_none() -> None:
    two = [f"down_blocks.0.resnets.{n}.conv1.weight" for n in range(2)]
    assert second_names(two)["input_blocks.2.0.in_layers.2.weight"] == "down_blocks.0.resnets.1.conv1.weight"
    without_attention = ["input_blocks.3.0.op.weight", "output_blocks.2.1.conv.weight"]
    assert second_names(without_attention)["up_blocks.0.upsamplers.0.conv.weight"] == "output_blocks.2.1.conv.weight"
    assert second_names([*two, "down_blocks.0.resnets.2.conv1.weight"]) == {}
    assert second_names(["model.layers.0.weight"]) == {}


# --- refusals -------------------------------------------------------------------------------------------------------------

W1 = {f"{flat(Q)}.lokr_w1": draw(2, 3)}
REFUSED: dict[str, tuple[Callable[[], Tensors], str]] = {
    "half a pair": (lambda: {f"{flat(Q)}.lora_down.weight": draw(2, 6)} | pair(FF), "but no lora_B.weight"),
    "the other half": (lambda: {f"{flat(Q)}.lora_up.weight": draw(6, 2)} | pair(FF), "but no lora_A.weight"),
    "half a LoKr": (lambda: W1, "module lora_unet_down_0_attn_to_q"),
    "only alpha": (lambda: alpha(Q) | pair(FF) | pair(CONV), "expected the factors of one LoRA, LoHa or LoKr"),
    "two kinds in one module": (lambda: pair(Q) | W1, "expected the factors of one LoRA, LoHa or LoKr"),
    "LoKr with dora_scale": (lambda: W1 | {f"{flat(Q)}.dora_scale": draw(6, 1)}, "expected the factors of one"),
    "OFT": (
        lambda: {f"{flat(Q)}.oft_blocks": draw(2, 3, 3)},
        f"tensor {flat(Q)}.oft_blocks: no kind of adapter that is known (OFT)",
    ),
    "a full difference": (lambda: pair(Q) | {f"{flat(FF)}.diff": draw(8, 6)}, "(a full difference)"),
    "GLoRA": (lambda: pair(Q) | {f"{flat(FF)}.a1.weight": draw(8, 6)}, f"{flat(FF)}.a1.weight: no kind of adapter"),
    "a textual inversion": (lambda: pair(Q) | {"bundle_emb.x.string_to_param.*": draw(2, 6)}, "(a textual inversion)"),
    "alpha NaN": (lambda: pair(Q) | alpha(Q, float("nan")), ".alpha: found nan, expected one finite number"),
    "alpha inf": (lambda: pair(Q) | alpha(Q, float("inf")), ".alpha: found inf"),
    "alpha 0": (lambda: pair(Q) | alpha(Q, 0.0), ".alpha: found 0.0"),
    "two alphas": (lambda: pair(Q) | {f"{flat(Q)}.alpha": draw(2)}, ".alpha: found F32 [2]"),
    "a true alpha": (lambda: pair(Q) | {f"{flat(Q)}.alpha": torch.tensor(True)}, ".alpha: found BOOL []"),
    "integers": (lambda: {k: v.to(torch.int32) for k, v in pair(Q).items()}, "found I32 [2, 6], expected floats"),
    "nothing": (lambda: pair(Q) | {f"{flat(FF)}.lora_up.weight": draw(8, 0)}, "found F32 [8, 0], expected floats"),
    "NaN": (lambda: {k: v * float("nan") for k, v in pair(Q).items()}, "holds NaN or inf"),
    "inf": (lambda: {k: v * float("inf") for k, v in pair(Q).items()}, "holds NaN or inf"),
    "another width": (
        lambda: pair(Q) | {f"{flat(Q)}.lora_down.weight": draw(2, 5)},
        "lora_down.weight: found shape [2, 5], expected [any, 6]",
    ),
    "another height": (lambda: pair(Q) | {f"{flat(Q)}.lora_up.weight": draw(5, 2)}, "its Δ is [5, 6], expected [6, 6]"),
    "the other way round": (
        lambda: {f"{flat(FF)}.lora_down.weight": draw(2, 8), f"{flat(FF)}.lora_up.weight": draw(6, 2)},
        "expected [any, 6]",
    ),
    "a convolution for a matrix": (
        lambda: {f"{flat(Q)}.lora_down.weight": draw(2, 6, 1, 1), f"{flat(Q)}.lora_up.weight": draw(6, 2, 1, 1)},
        "found shape [2, 6, 1, 1], expected [any, 6]",
    ),
    "ranks that differ": (lambda: pair(Q) | {f"{flat(Q)}.lora_up.weight": draw(6, 3)}, "their ranks differ"),
    "a vector": (lambda: pair(Q) | alpha(Q) | {f"{flat(Q)}.lora_down.weight": draw(6)}, "no two factors of one product"),
    "a scalar": (
        lambda: pair(Q) | alpha(Q) | {f"{flat(Q)}.lora_down.weight": torch.tensor(1.0)}, "no two factors of one product"
    ),
    "a core of another kernel": (
        lambda: pair(POINT) | {f"{flat(POINT)}.lora_mid.weight": draw(2, 2, 3, 3)},
        "lora_mid.weight: found shape [2, 2, 3, 3], expected [2, 2, 1, 1]",
    ),
    "a core and another width": (
        lambda: pair(POINT) | {f"{flat(POINT)}.lora_mid.weight": draw(2, 2, 1, 1),
                               f"{flat(POINT)}.lora_down.weight": draw(2, 5, 1, 1)},
        "lora_down.weight: found shape [2, 5, 1, 1], expected [2, 6, 1, 1]",
    ),
    "a core and another height": (
        lambda: pair(POINT) | {f"{flat(POINT)}.lora_mid.weight": draw(2, 2, 1, 1),
                               f"{flat(POINT)}.lora_up.weight": draw(3, 2, 1, 1)},
        "lora_up.weight: found shape [3, 2, 1, 1], expected [4, 2, 1, 1]",
    ),
    "a core of a vector": (lambda: pair(POINT) | {f"{flat(POINT)}.lora_mid.weight": draw(4)}, "found shape [4]"),
    "a core and a vector": (
        lambda: {f"{flat(POINT)}.lora_mid.weight": draw(2, 2, 1, 1), f"{flat(POINT)}.lora_up.weight": draw(4),
                 f"{flat(POINT)}.lora_down.weight": draw(2, 6, 1, 1)},
        "no two factors of one product",
    ),
    "a core for a matrix": (
        lambda: pair(Q) | {f"{flat(Q)}.lora_mid.weight": draw(2, 2, 1, 1)},
        f"lora_mid.weight is for a convolution, and {Q}.weight is [6, 6]",
    ),
    "a length for every column": (
        lambda: pair(Q) | {f"{flat(Q)}.dora_scale": draw(1, 6)}, "dora_scale is [1, 6], expected [6, 1]"
    ),
    "a core for a vector": (
        lambda: {f"lora_unet_norm.lora_{half}.weight": draw(2, 2) for half in ("down", "mid", "up")},
        "lora_mid.weight is for a convolution, and norm.weight is [6]",
    ),
    "a vector's": (
        lambda: {f"lora_unet_norm.lora_{half}.weight": draw(2, 2) for half in ("down", "up")},
        "lora_down.weight: found shape [2, 2], expected [any]",
    ),
    "a core and lengths": (
        lambda: pair(POINT) | {f"{flat(POINT)}.lora_mid.weight": draw(2, 2, 1, 1),
                               f"{flat(POINT)}.dora_scale": draw(4, 1, 1, 1)},
        "lora_mid together with dora_scale",
    ),
    "one factor by two names": (
        lambda: pair(Q) | {f"{flat(Q)}.lora_A.weight": draw(2, 6)}, "are the same tensor of one module"
    ),
    "ranks of LoKr that differ": (
        lambda: {f"{flat(FF)}.lokr_{p}": t for p, t in {"w1_a": draw(2, 1), "w1_b": draw(1, 3), "w2_a": draw(4, 2),
                                                        "w2_b": draw(2, 2)}.items()},
        "ranks [1, 2], expected one",
    ),
    "LoHa of another size": (
        lambda: {f"{flat(Q)}.hada_{p}": draw(*s) for p, s in {"w1_a": (6, 2), "w1_b": (2, 5), "w2_a": (6, 2),
                                                              "w2_b": (2, 5)}.items()},
        "hada_w1_b: found shape [2, 5], expected [2, 6]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_covered_is_refused_by_name_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    tensors, expected = REFUSED[case]
    base = base_of(tmp_path / "unet.safetensors", UNET)
    message = refusal(base, write(tmp_path / "lora.safetensors", tensors()))
    assert expected in message, message


# --- what is shown --------------------------------------------------------------------------------------------------------


def test_it_is_shown_by_the_parts_of_the_pipeline_and_a_refusal_is_shown_too(tmp_path: Path) -> None:
    factors = pair(Q) | alpha(Q) | pair(FF, 4) | pair(Q, prefix="lora_te1") | {f"{flat(Q)}.dora_scale": draw(6, 1)}
    found = tv.inspect(write(tmp_path / "lora.safetensors", factors))
    assert found.adapter is not None and found.refused is None
    assert found.adapter["targets"] == {"lora_unet": 2, "lora_te1": 1} and found.adapter["variants"] == ["DoRA"]
    assert found.adapter["scales"] == {"1": 2, "1.5": 1} and found.adapter["ranks"] == {"2": 2, "4": 1}
    refused = tv.inspect(write(tmp_path / "oft.safetensors", {f"{flat(Q)}.oft_blocks": draw(2, 3, 3)}))
    assert refused.adapter == {} and "(OFT)" in str(refused.refused)


# --- what pins it ---------------------------------------------------------------------------------------------------------


def test_alpha_is_pinned_by_the_digest_of_the_config(tmp_path: Path) -> None:
    digests = set()
    for n, value in enumerate((3.0, 4.0, 3.0)):
        path = write(tmp_path / f"{n}/lora.safetensors", pair(Q) | alpha(Q, value) | pair(FF))
        digests.add(open_adapter(path).config_sha256)
    assert len(digests) == 2


def test_it_is_found_in_a_folder_of_its_own_and_computed_again(tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    factors = pair(Q) | alpha(Q)
    write(tmp_path / "lora/pytorch_lora_weights.safetensors", factors)
    out = tmp_path / "out"
    tv.subtract(base, tmp_path / "lora", alpha=1, output=out, fsync=False)
    expected = exact(load_file(base)[f"{Q}.weight"]) - product(factors, Q, 1.5)
    found = exact(oracle.weights_of(out)[f"{Q}.weight"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    again = tv.verify(out, against=[base, tmp_path / "lora"])
    assert again.ok and not again.skipped and any(f"({Q}.weight)" in check for check in again.checks)


def test_an_alpha_that_changed_since_is_told_from_the_one_it_was_made_with(tmp_path: Path) -> None:
    base = base_of(tmp_path / "unet.safetensors", UNET)
    adapter = write(tmp_path / "lora.safetensors", pair(Q) | alpha(Q))
    tv.subtract(base, adapter, alpha=1, output=tmp_path / "out", fsync=False)
    write(adapter, pair(Q) | alpha(Q, 4.0))
    with pytest.raises(tv.CheckpointError, match=r"the config of adapter lora\.safetensors is another one by now"):
        tv.verify(tmp_path / "out", against=[base, adapter])
