"""LoRA on the experts of a layer against PEFT: what PEFT merges and transformers saves is what taskvec makes on disk.

PEFT 0.17 to 0.19.0 laid the factors out in other ways; those files are made from the present ones, whose merge they share.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

import taskvec as tv

from . import peft_oracle as oracle
from .handmade import write_adapter, write_base

CHATTER = [*oracle.PEFT_CHATTER, "ignore:The following rank_pattern keys:RuntimeWarning"]  # it looks at modules alone
pytestmark = [pytest.mark.filterwarnings(line) for line in CHATTER]

TEXT: dict[str, Any] = dict(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4
)
E, H = 3, 16
UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def mixtral(width: int = 12) -> Any:
    sizes = dict(intermediate_size=width, num_local_experts=E, num_experts_per_tok=2)
    return oracle.random_model(MixtralForCausalLM(MixtralConfig(**TEXT, **sizes)))


def qwen2_moe(width: int = 12) -> Any:
    sizes = dict(moe_intermediate_size=width, shared_expert_intermediate_size=12, num_experts=E, num_experts_per_tok=2)
    return oracle.random_model(Qwen2MoeForCausalLM(Qwen2MoeConfig(**TEXT, **sizes)))


def qwen3_moe(width: int = 12) -> Any:
    """Its second layer has no experts."""
    sizes = dict(moe_intermediate_size=width, mlp_only_layers=[1], num_experts=E, num_experts_per_tok=2)
    return oracle.random_model(Qwen3MoeForCausalLM(Qwen3MoeConfig(**TEXT, **sizes, intermediate_size=20)))


def gpt_oss(width: int = 12) -> Any:
    """[E, in, out], on disk too."""
    sizes = dict(intermediate_size=width, num_local_experts=E, num_experts_per_tok=2)
    return oracle.random_model(GptOssForCausalLM(GptOssConfig(**TEXT, **sizes)))


def nemotron_h(width: int = 12) -> Any:
    """Experts without a gate: up_proj alone."""
    sizes = dict(moe_intermediate_size=width, n_routed_experts=E, num_experts_per_tok=2, n_group=1, topk_group=1)
    sizes |= dict(intermediate_size=20, mamba_num_heads=4, mamba_head_dim=4, ssm_state_size=4, n_groups=1)
    return oracle.random_model(NemotronHForCausalLM(NemotronHConfig(**TEXT, **sizes, layers_block_type=["moe", "attention"])))


def qwen3_vl_moe(width: int = 12) -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4, "mrope_interleaved": True}
    text = {**TEXT, "num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": width, "rope_parameters": rope}
    vision = dict(
        hidden_size=16, intermediate_size=16, depth=1, num_heads=2, out_hidden_size=16, deepstack_visual_indexes=[0]
    )
    return oracle.random_model(
        Qwen3VLMoeForConditionalGeneration(
            Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
        )
    )


MAKES: dict[str, Callable[..., Any]] = {
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
}


def config(*parameters: str, **fields: Any) -> LoraConfig:
    settings = dict(r=2, lora_alpha=3, target_modules=["q_proj"])
    return LoraConfig(**{**settings, "target_parameters": list(parameters), **fields})


def check(base: Path, adapter: Path, merged: oracle.Tensors, output: Path, *touched: str) -> None:
    """base − 0.7(merged − base), tensor by tensor; and that tensors of each kind in `touched` did change."""
    edited = oracle.edited_by_taskvec(base, adapter, output, alpha=0.7)
    before = oracle.weights_of(base)
    oracle.assert_is_base_minus(edited, before, merged, 0.7, oracle.identity)
    for kind in touched:
        assert any(kind in name and not edited[name].equal(before[name]) for name in edited), kind


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path, oracle.Tensors]]:
    """trained("mixtral", 12, UP, DOWN) -> base, adapter and PEFT's merge, each made once and only read."""
    made: dict[tuple[Any, ...], tuple[Path, Path, oracle.Tensors]] = {}

    def make(kind: str, width: int, *parameters: str) -> tuple[Path, Path, oracle.Tensors]:
        key = (kind, width, *parameters)
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            base = oracle.save_model(MAKES[kind](width), folder / "base")
            adapter = oracle.train(MAKES[kind](width), folder / "adapter", config(*parameters))
            made[key] = base, adapter, oracle.merged_on_disk(MAKES[kind](width), base, adapter, folder / "merged")
        return made[key]

    return make


# --- as PEFT saves them now ------------------------------------------------------------------------------------------

ON_DISK = {
    "mixtral": {UP: ("w1", "w3"), DOWN: ("w2",)},
    "qwen2_moe": {UP: ("experts.0.gate_proj", "experts.2.up_proj"), DOWN: ("experts.1.down_proj",)},
    "qwen3_moe": {UP: ("experts.0.gate_proj", "experts.2.up_proj"), DOWN: ("experts.1.down_proj",)},
    "gpt_oss": {UP: ("experts.gate_up_proj",), DOWN: ("experts.down_proj",)},
}
TARGETS = {"both": (UP, DOWN), "up": (UP,), "down": (DOWN,)}


WIDTHS = (12, H, H // 2)  # oblong; a square down_proj; a square gate_up_proj
REFUSED = {("gpt_oss", H, "down"), ("gpt_oss", H // 2, "up")}  # square and alone, see below
CASES = [case for case in itertools.product(MAKES, WIDTHS, TARGETS) if case not in REFUSED]


@pytest.mark.parametrize(("kind", "width", "targets"), CASES)
def test_experts_change_as_peft_merges_them(kind: str, width: int, targets: str, trained: Any, tmp_path: Path) -> None:
    parameters = TARGETS[targets]
    base, adapter, merged = trained(kind, width, *parameters)
    check(base, adapter, merged, tmp_path / "out", *(name for target in parameters for name in ON_DISK[kind][target]))


@pytest.mark.parametrize(("kind", "router"), [("mixtral", "mlp.gate"), ("qwen2_moe", "mlp.gate"), ("gpt_oss", "mlp.router")])
def test_a_router_beside_the_experts_is_a_plain_product(kind: str, router: str, trained: Any, tmp_path: Path) -> None:
    base, adapter, merged = trained(kind, 12, UP, DOWN, f"{router}.weight")
    check(base, adapter, merged, tmp_path / "out", f"{router.rpartition('.')[2]}.weight")


def test_experts_without_a_gate_have_an_up_proj_of_their_own(tmp_path: Path) -> None:
    base = oracle.save_model(nemotron_h(), tmp_path / "base")
    targets = ("mixer.experts.up_proj", "mixer.experts.down_proj")
    adapter = oracle.train(nemotron_h(), tmp_path / "adapter", config(*targets))
    merged = oracle.merged_on_disk(nemotron_h(), base, adapter, tmp_path / "merged")
    check(base, adapter, merged, tmp_path / "out", "backbone.layers.0.mixer.experts.2.up_proj", "experts.0.down_proj")


def test_experts_that_are_stored_whole_under_another_name_are_found(tmp_path: Path) -> None:
    sizes = dict(intermediate_size=12, num_local_experts=E, num_experts_per_tok=2)

    def granitemoe() -> Any:
        return oracle.random_model(GraniteMoeForCausalLM(GraniteMoeConfig(**TEXT, **sizes, tie_word_embeddings=False)))

    base = oracle.save_model(granitemoe(), tmp_path / "base")
    targets = [f"block_sparse_moe.{name}" for name in ("experts.gate_up_proj", "experts.down_proj", "router.weight")]
    adapter = oracle.train(granitemoe(), tmp_path / "adapter", config(*targets))
    merged = oracle.merged_on_disk(granitemoe(), base, adapter, tmp_path / "merged")
    check(base, adapter, merged, tmp_path / "out", "input_linear", "output_linear", "router.layer")


@pytest.mark.parametrize("width", [12, H])
def test_experts_that_are_stored_the_other_way_round_than_in_memory_are_turned(width: int, tmp_path: Path) -> None:
    base = oracle.save_model(qwen3_vl_moe(width), tmp_path / "base")
    path = base / "model.safetensors"

    def as_on_the_hub(tensors: oracle.Tensors) -> oracle.Tensors:
        return {k: (t.transpose(1, 2).contiguous() if k.endswith((UP, DOWN)) else t) for k, t in tensors.items()}

    if width == H:  # transformers itself takes a square one as it is
        adapter = oracle.train(qwen3_vl_moe(width), tmp_path / "adapter", config(UP, DOWN))
        merged = as_on_the_hub(oracle.merged_on_disk(qwen3_vl_moe(width), base, adapter, tmp_path / "merged"))
        save_file(as_on_the_hub(load_file(path)), path, {"format": "pt"})
    else:
        save_file(as_on_the_hub(load_file(path)), path, {"format": "pt"})
        adapter = oracle.train(qwen3_vl_moe(width), tmp_path / "adapter", config(UP, DOWN))
        merged = as_on_the_hub(oracle.merged_on_disk(qwen3_vl_moe(width), base, adapter, tmp_path / "merged"))
    check(base, adapter, merged, tmp_path / "out", UP, DOWN)


FIELDS: dict[str, dict[str, Any]] = {
    "rslora": dict(use_rslora=True, r=3),
    "patterns": dict(
        rank_pattern={r".*\.gate_up_proj": 4, "layers.1.mlp.experts.down_proj": 1},
        alpha_pattern={r"layers\.0\.mlp\.experts\.gate_up_proj": 11, "down_proj": 5, "gate.weight": 9},
    ),
    "rank one": dict(r=1),
    "more than experts": dict(r=7),
}


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_ranks_and_scales_are_those_of_one_expert(kind: str, fields: str, tmp_path: Path) -> None:
    router = "mlp.router.weight" if kind == "gpt_oss" else "mlp.gate.weight"
    base = oracle.save_model(MAKES[kind](), tmp_path / "base")
    adapter = oracle.train(MAKES[kind](), tmp_path / "adapter", config(UP, DOWN, router, **FIELDS[fields]))
    merged = oracle.merged_on_disk(MAKES[kind](), base, adapter, tmp_path / "merged")
    check(base, adapter, merged, tmp_path / "out", "experts", "q_proj")


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_bf16_experts_are_computed_in_float32_and_rounded_once(kind: str, trained: Any, tmp_path: Path) -> None:
    _, adapter, _ = trained(kind, 12, UP, DOWN)
    base = oracle.save_model(MAKES[kind](), tmp_path / "base", torch.bfloat16)
    check(
        base, adapter, oracle.merged_on_disk(MAKES[kind](), base, adapter, tmp_path / "merged"), tmp_path / "out", "experts"
    )


def test_targets_without_their_module_are_those_of_the_experts(trained: Any, tmp_path: Path) -> None:
    # as PEFT writes them when it makes target_parameters of what were w1, w2 and w3
    base, adapter, merged = trained("mixtral", 12, UP, DOWN, "mlp.gate.weight")
    copied = shutil.copytree(adapter, tmp_path / "adapter")
    oracle.rewrite_config(copied, target_parameters=["gate_up_proj", "down_proj", "gate.weight"])
    check(base, copied, merged, tmp_path / "out", "w1", "w2", "w3")


def test_targets_of_one_layer_change_that_layer_alone(tmp_path: Path) -> None:
    base = oracle.save_model(mixtral(), tmp_path / "base")
    adapter = oracle.train(mixtral(), tmp_path / "adapter", config(f"1.{UP}", f"1.{DOWN}", target_modules=["v_proj"]))
    merged = oracle.merged_on_disk(mixtral(), base, adapter, tmp_path / "merged")
    check(base, adapter, merged, tmp_path / "out", "layers.1.block_sparse_moe.experts.2.w3")
    edited, before = oracle.weights_of(tmp_path / "out"), oracle.weights_of(base)
    assert all(edited[name].equal(before[name]) for name in before if "layers.0" in name and "v_proj" not in name)


def test_the_matrices_of_the_experts_may_lie_in_any_shard(trained: Any, tmp_path: Path) -> None:
    _, adapter, merged = trained("mixtral", 12, UP, DOWN)
    base = oracle.save_model(mixtral(), tmp_path / "base", max_shard_size="2KB")
    assert len(list(base.glob("*.safetensors"))) > 5
    check(base, adapter, merged, tmp_path / "out", "w1", "w2", "w3")


def of_transformers_4(folder: Path) -> Path:
    """An adapter of Mixtral as transformers 4 had it: a module for each matrix of each expert."""
    shapes = {}
    for layer, expert in itertools.product(range(2), range(E)):
        for leaf, outside, inside in (("w1", 12, H), ("w2", H, 12), ("w3", 12, H)):
            module = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}"
            shapes |= {f"{module}.lora_A.weight": (2, inside), f"{module}.lora_B.weight": (outside, 2)}
    return write_adapter(folder, shapes, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM", peft_version="0.16.0")


def test_an_adapter_with_a_name_for_each_expert_is_matched_one_to_one(tmp_path: Path) -> None:
    base = oracle.save_model(mixtral(), tmp_path / "base")
    adapter = of_transformers_4(tmp_path / "adapter")
    check(
        base,
        adapter,
        oracle.merged_on_disk(mixtral(), base, adapter, tmp_path / "merged"),
        tmp_path / "out",
        "w1",
        "w2",
        "w3",
    )


def test_an_adapter_that_peft_made_of_one_with_a_name_for_each_expert_is_the_same(tmp_path: Path) -> None:
    base = oracle.save_model(mixtral(), tmp_path / "base")
    adapter = of_transformers_4(tmp_path / "adapter")
    merged = oracle.merged_on_disk(mixtral(), base, adapter, tmp_path / "merged")
    with oracle.quietly():
        loaded = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
        PeftModel.from_pretrained(loaded, adapter).save_pretrained(tmp_path / "fused")
    saved = json.loads((tmp_path / "fused" / "adapter_config.json").read_text())
    assert saved["rank_pattern"] and sorted(saved["target_parameters"]) == ["down_proj", "gate_up_proj"]
    check(base, tmp_path / "fused", merged, tmp_path / "out", "w1", "w2", "w3")


def test_new_values_of_the_experts_replace_those_of_each(tmp_path: Path) -> None:
    base = oracle.save_model(mixtral(), tmp_path / "base")
    adapter = oracle.train(mixtral(), tmp_path / "adapter", config(modules_to_save=["experts", "gate"]))
    assert any(key.endswith("experts.gate_up_proj") for key in load_file(adapter / "adapter_model.safetensors"))
    check(
        base,
        adapter,
        oracle.merged_on_disk(mixtral(), base, adapter, tmp_path / "merged"),
        tmp_path / "out",
        "w1",
        "w3",
        "gate",
    )


def test_with_its_origin_an_adapter_is_subtracted_from_another_model(tmp_path: Path) -> None:
    origin = oracle.save_model(mixtral(), tmp_path / "origin")
    model = oracle.save_model(oracle.random_model(mixtral(), seed=9), tmp_path / "model")
    adapter = oracle.train(mixtral(), tmp_path / "adapter", config(modules_to_save=["experts"]))
    merged = oracle.merged_on_disk(mixtral(), origin, adapter, tmp_path / "merged")
    trained_from, before = oracle.weights_of(origin), oracle.weights_of(model)
    shifted = {name: before[name].double() + merged[name].double() - trained_from[name].double() for name in before}
    edited = oracle.edited_by_taskvec(model, adapter, tmp_path / "out", alpha=0.5, base=origin)
    oracle.assert_is_base_minus(edited, before, shifted, 0.5, oracle.identity)


def test_products_of_experts_are_subtracted_from_another_model_than_their_origin(trained: Any, tmp_path: Path) -> None:
    origin, adapter, merged = trained("mixtral", 12, UP, DOWN)
    model = oracle.save_model(oracle.random_model(mixtral(), seed=9), tmp_path / "model")
    trained_from, before = oracle.weights_of(origin), oracle.weights_of(model)
    shifted = {name: before[name].double() + merged[name].double() - trained_from[name].double() for name in before}
    edited = oracle.edited_by_taskvec(model, adapter, tmp_path / "out", alpha=0.5, base=origin)
    oracle.assert_is_base_minus(edited, before, shifted, 0.5, oracle.identity)


def test_one_expert_can_be_left_out(trained: Any, tmp_path: Path) -> None:
    base, adapter, _ = trained("mixtral", 12, UP, DOWN)
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7, exclude=["*.experts.1.*"])
    before = oracle.weights_of(base)
    changed = {name for name in before if "experts" in name and not edited[name].equal(before[name])}
    assert changed == {name for name in before if "experts" in name and ".experts.1." not in name}


# --- other layouts of the same adapter ---------------------------------------------------------------------------------


def turned(adapter: Path, folder: Path, version: str | None, leaves: tuple[str, ...] = (UP, DOWN)) -> Path:
    """The same adapter with A and B on each other's side: A'_e = B_eᵀ, B'_e = A_eᵀ, so that (B'_e @ A'_e)ᵀ = B_e @ A_e."""
    copied = shutil.copytree(adapter, folder)
    oracle.rewrite_tensors(copied, _turn)
    oracle.rewrite_config(copied, peft_version=version, target_parameters=list(leaves))
    return copied


def _turn(tensors: oracle.Tensors) -> oracle.Tensors:
    out = dict(tensors)
    for key in (key for key in tensors if "experts" in key and key.endswith("lora_A.weight")):
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        a_of, b_of = a.reshape(E, -1, a.shape[1]), b.reshape(b.shape[0], -1, E)  # [E, r, a], [b, r, E]
        out[key] = b_of.permute(2, 1, 0).reshape(-1, b.shape[0])
        out[key.replace("lora_A", "lora_B")] = a_of.permute(2, 1, 0).reshape(a.shape[1], -1)
    return out


def as_saved_by(adapter: Path, folder: Path, version: str | None, leaves: tuple[str, ...] = (UP, DOWN)) -> Path:
    copied = shutil.copytree(adapter, folder)
    oracle.rewrite_config(copied, peft_version=version, target_parameters=list(leaves))
    return copied


@pytest.mark.parametrize("version", [None, "0.18.1", "0.19.0", "0.21.2", "0.22.0.dev0", 7])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_an_oblong_parameter_tells_the_layout_whatever_the_version(
    kind: str, width: int, version: Any, trained: Any, tmp_path: Path
) -> None:
    # gpt_oss as PEFT 0.19.1 took it with transformers 4, mixtral as PEFT 0.17 to 0.19.0 did
    base, adapter, merged = trained(kind, width, UP, DOWN)
    check(base, turned(adapter, tmp_path / "turned", version), merged, tmp_path / "out", "experts")
    check(base, as_saved_by(adapter, tmp_path / "as it is", version), merged, tmp_path / "out 2", "experts")


SQUARES = {  # the one parameter there is, and the width that makes it square
    "down_proj": (DOWN, H),
    "gate_up_proj": (UP, H // 2),
}


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("version", ["0.17.0", "0.18.1", "0.19.0"])
def test_a_square_parameter_alone_is_read_as_its_old_version_wrote_it(
    version: str, square: str, trained: Any, tmp_path: Path
) -> None:
    leaf, width = SQUARES[square]
    base, adapter, merged = trained("mixtral", width, leaf)
    check(base, turned(adapter, tmp_path / "adapter", version, (leaf,)), merged, tmp_path / "out", "experts")


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("version", ["0.19.1", "0.20.0", "1.0.0"])
def test_a_square_parameter_alone_is_read_as_its_new_version_wrote_it(
    version: str, square: str, trained: Any, tmp_path: Path
) -> None:
    leaf, width = SQUARES[square]
    base, adapter, merged = trained("mixtral", width, leaf)
    check(base, as_saved_by(adapter, tmp_path / "adapter", version, (leaf,)), merged, tmp_path / "out", "experts")


@pytest.mark.parametrize("version", ["0.17.1", "0.18.0"])
def test_a_square_parameter_of_gpt_oss_alone_is_read_as_its_old_version_wrote_it(
    version: str, trained: Any, tmp_path: Path
) -> None:
    base, adapter, merged = trained("gpt_oss", H, DOWN)  # a = in then as now
    check(base, as_saved_by(adapter, tmp_path / "adapter", version, (DOWN,)), merged, tmp_path / "out", "experts.down_proj")


AMBIGUOUS = {
    "gpt_oss now": ("gpt_oss", "0.21.2"),  # with transformers 4 it would be the other way round
    "gpt_oss, 0.19.0": ("gpt_oss", "0.19.0"),
    "no version": ("mixtral", None),
    "between two versions": ("mixtral", "0.19.1.dev0"),
    "no text": ("mixtral", 19),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_a_square_parameter_that_could_be_read_in_two_ways_is_refused(case: str, trained: Any, tmp_path: Path) -> None:
    kind, version = AMBIGUOUS[case]
    base, adapter, _ = trained(kind, H, DOWN)
    error = refusal(base, as_saved_by(adapter, tmp_path / "adapter", version, (DOWN,)), tmp_path / "out")
    assert "square" in error and "down_proj" in error and "peft_version" in error and "Merge it" in error


# --- against the formula -------------------------------------------------------------------------------------------------


def test_each_element_is_the_sum_over_the_rank_of_its_own_expert(tmp_path: Path) -> None:
    experts, rank, rows, columns = 3, 2, 4, 5
    base = write_base(
        tmp_path / "base",
        {f"m.mlp.experts.{e}.{leaf}.weight": (rows, columns) for e in range(experts) for leaf in ("gate_proj", "up_proj")},
    )
    factors = {"lora_A.weight": (experts * rank, columns), "lora_B.weight": (2 * rows, rank * experts)}
    adapter = write_adapter(
        tmp_path / "adapter",
        {f"m.mlp.experts.{name}": shape for name, shape in factors.items()},
        target_parameters=["experts.gate_up_proj"],
    )
    a, b = (load_file(adapter / "adapter_model.safetensors")[f"base_model.model.m.mlp.experts.{n}"] for n in factors)
    edited, before = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=2), oracle.weights_of(base)
    for e in range(experts):
        for place, leaf in enumerate(("gate_proj", "up_proj")):
            name = f"m.mlp.experts.{e}.{leaf}.weight"
            delta = np.zeros((rows, columns))
            for i in range(rows):
                for j in range(columns):
                    delta[i, j] = sum(
                        float(b[place * rows + i, k * experts + e]) * float(a[e * rank + k, j]) for k in range(rank)
                    )
            expected = before[name].double().numpy() - 2 * (4 / 2) * delta  # alpha / r = 4 / 2
            np.testing.assert_allclose(edited[name].double().numpy(), expected, atol=1e-5)


def test_a_stack_whose_experts_take_several_tiles_is_computed_alike(tmp_path: Path) -> None:
    experts, rank, inside, outside = 2, 3, 500, 701  # 1.4 MB for each expert, in tiles that end within a row
    base = write_base(tmp_path / "base", {"m.experts.gate_up_proj": (experts, inside, outside)}, model_type="gpt_oss")
    factors = {"lora_A.weight": (experts * rank, inside), "lora_B.weight": (outside, rank * experts)}
    adapter = write_adapter(
        tmp_path / "adapter",
        {f"m.experts.{name}": shape for name, shape in factors.items()},
        target_parameters=["experts.gate_up_proj"],
        r=rank,
    )
    stored = load_file(adapter / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.m.experts.{name}"].double().numpy() for name in factors)
    edited, before = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1), oracle.weights_of(base)
    expected = before["m.experts.gate_up_proj"].double().numpy().copy()
    for e in range(experts):
        expected[e] -= 4 / 3 * (b[:, e::experts] @ a[e * rank : (e + 1) * rank]).T
    np.testing.assert_allclose(edited["m.experts.gate_up_proj"].double().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("leaf", ["mlp.up_proj.weight", "self_attn.o_proj.weight"])
def test_a_parameter_of_a_plain_layer_is_a_plain_product(leaf: str, tmp_path: Path) -> None:
    base = oracle.save_model(oracle.llama(), tmp_path / "base")
    adapter = oracle.train(oracle.llama(), tmp_path / "adapter", config(leaf, alpha_pattern={leaf: 8}))
    merged = oracle.merged_on_disk(oracle.llama(), base, adapter, tmp_path / "merged")
    check(base, adapter, merged, tmp_path / "out", leaf, "q_proj")


def test_a_parameter_of_a_conv1d_is_changed_as_it_is_stored(tmp_path: Path) -> None:
    # c_proj is square, and a LoRA of the module would be turned
    base = oracle.save_model(oracle.gpt2(), tmp_path / "base")
    adapter = oracle.train(oracle.gpt2(), tmp_path / "adapter", config("attn.c_proj.weight", target_modules=[]))
    merged = oracle.merged_on_disk(oracle.gpt2(), base, adapter, tmp_path / "merged")
    check(base, adapter, merged, tmp_path / "out", "attn.c_proj.weight")


# --- refusals ------------------------------------------------------------------------------------------------------------


def refusal(base: Path, adapter: Path, output: Path) -> str:
    with pytest.raises(tv.MismatchError) as caught:
        tv.subtract(base, adapter, alpha=1, output=output)
    assert not output.exists() and "\n" not in str(caught.value)
    return str(caught.value)


def without(part: str) -> Callable[[oracle.Tensors], oracle.Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


def with_bias(tensors: oracle.Tensors) -> oracle.Tensors:
    return {**tensors, "base_model.model.model.layers.0.mlp.experts.lora_B.bias": torch.ones(H)}


def shorter(tensors: oracle.Tensors) -> oracle.Tensors:
    return {key: tensor[:-1] if "0.mlp.experts.lora_A" in key else tensor for key, tensor in tensors.items()}


def narrower(tensors: oracle.Tensors) -> oracle.Tensors:
    return {key: tensor[:, :-1] if "0.mlp.experts.lora_A" in key else tensor for key, tensor in tensors.items()}


BROKEN: dict[str, tuple[Callable[[oracle.Tensors], oracle.Tensors], str]] = {
    "one of two wrappers": (without("experts.base_layer"), "the file holds factors for 1"),
    "the inner wrapper alone": (without("experts.lora"), "the file holds factors for 1"),
    "half a pair": (without("experts.lora_B"), "no lora_B.weight"),
    "a bias": (with_bias, "there are others"),
    "ranks that differ": (shorter, "their ranks differ"),
    "another width": (narrower, "its Δ is [3, 16, 11] or its transpose"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_factors_that_are_not_whole_are_refused(case: str, trained: Any, tmp_path: Path) -> None:
    base, adapter, _ = trained("mixtral", 12, UP, DOWN)
    copied = shutil.copytree(adapter, tmp_path / "adapter")
    change, reason = BROKEN[case]
    oracle.rewrite_tensors(copied, change)
    error = refusal(base, copied, tmp_path / "out")
    assert reason in error and "experts" in error and str(copied) in error


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no targets": (dict(target_parameters=None), "target_parameters in the config does not say which"),
    "one target of two": (dict(target_parameters=[UP]), "the file holds factors for 2"),
    "three targets": (dict(target_parameters=[UP, DOWN, f"{DOWN}_bias"]), "the file holds factors for 2"),
    "unknown parameters": (dict(target_parameters=["experts.a", "experts.b"]), "a, b comes first is not known"),
    "no list": (dict(target_parameters={"a": 1}), "expected a list of names"),
    "another rank": (
        dict(rank_pattern={"down_proj": 3}),
        "A is [6, 12], expected 9 rows: 3 experts in the base, rank 3 in the config",
    ),
    "a smaller rank": (dict(rank_pattern={"down_proj": 1}), "expected 3 rows: 3 experts in the base, rank 1 in the config"),
    "half a rank": (dict(r=1.5), "expected a whole number"),
    "no rank": (dict(r=0), "expected a whole number"),
    "pissa": (dict(init_lora_weights="pissa"), "init_lora_weights: PEFT trains no such adapter"),
    "DoRA": (dict(use_dora=True), "use_dora: PEFT trains no such adapter"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_do_not_say_what_the_factors_are_are_refused(case: str, trained: Any, tmp_path: Path) -> None:
    base, adapter, _ = trained("mixtral", 12, UP, DOWN)
    copied = shutil.copytree(adapter, tmp_path / "adapter")
    fields, reason = CONFIGS[case]
    oracle.rewrite_config(copied, **fields)
    assert reason in refusal(base, copied, tmp_path / "out")


def drop(name: str) -> Callable[[oracle.Tensors], oracle.Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if name not in key}


def cut(tensors: oracle.Tensors) -> oracle.Tensors:
    return {key: tensor[:-1] if "0.block_sparse_moe.experts.1.w1" in key else tensor for key, tensor in tensors.items()}


BASES: dict[str, tuple[Callable[[oracle.Tensors], oracle.Tensors], str]] = {
    "an expert without w3": (drop("0.block_sparse_moe.experts.1.w3"), "layers.0.mlp.experts.gate_up_proj"),
    "a missing expert": (drop("0.block_sparse_moe.experts.1."), "layers.0.mlp.experts."),
    "fewer experts": (drop("0.block_sparse_moe.experts.2."), "expected 4 rows: 2 experts in the base, rank 2 in the config"),
    "experts of two sizes": (cut, "layers.0.mlp.experts.gate_up_proj"),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_whose_experts_do_not_make_the_parameter_is_refused(case: str, trained: Any, tmp_path: Path) -> None:
    base, adapter, _ = trained("mixtral", 12, UP, DOWN)
    copied = shutil.copytree(base, tmp_path / "base")
    change, reason = BASES[case]
    path = copied / "model.safetensors"
    save_file({k: t.contiguous() for k, t in change(load_file(path)).items()}, path, {"format": "pt"})
    error = refusal(copied, adapter, tmp_path / "out")
    assert reason in error and str(adapter) in error


def test_an_origin_with_other_experts_is_refused(trained: Any, tmp_path: Path) -> None:
    base, adapter, _ = trained("mixtral", 12, UP, DOWN)
    other = shutil.copytree(base, tmp_path / "other")
    path = other / "model.safetensors"
    save_file(drop("experts.2.")(load_file(path)), path, {"format": "pt"})
    with pytest.raises(tv.AdapterError, match="2 experts in the base"):
        tv.subtract(base, adapter, alpha=1, base=other, output=tmp_path / "out")
    with pytest.raises(tv.ShapeMismatchError, match="stored otherwise than in the edited model"):
        tv.subtract(other, adapter, alpha=1, base=base, output=tmp_path / "out")


def test_a_target_names_whole_components(tmp_path: Path) -> None:
    shapes = {f"m.{layer}.experts.{e}.down_proj.weight": (4, 5) for layer in (1, 11) for e in range(2)}
    base = write_base(tmp_path / "base", shapes)
    factors = {"experts.lora_A.weight": (4, 5), "experts.lora_B.weight": (4, 4)}
    fields = dict(target_parameters=["1.experts.down_proj"], peft_version="0.21.2")
    adapter = write_adapter(tmp_path / "one", {f"m.1.{name}": shape for name, shape in factors.items()}, **fields)
    report = tv.subtract(base, adapter, alpha=1, output=tmp_path / "out", fsync=False)
    assert list(report.tensors) == ["m.1.experts.0.down_proj.weight", "m.1.experts.1.down_proj.weight"]
    adapter = write_adapter(tmp_path / "eleven", {f"m.11.{name}": shape for name, shape in factors.items()}, **fields)
    assert "names 1.experts.down_proj, and the file has no factors of them" in refusal(base, adapter, tmp_path / "out 2")


def test_a_layer_of_one_expert_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"m.experts.0.down_proj.weight": (4, 5)})
    factors = {"m.experts.lora_A.weight": (2, 5), "m.experts.lora_B.weight": (4, 2)}
    adapter = write_adapter(tmp_path / "adapter", factors, target_parameters=["experts.down_proj"])
    assert "a layer of one expert" in refusal(base, adapter, tmp_path / "out")


def test_new_values_of_another_shape_are_refused(tmp_path: Path) -> None:
    base = oracle.save_model(mixtral(), tmp_path / "base")
    adapter = oracle.train(mixtral(width=13), tmp_path / "adapter", config(modules_to_save=["experts"]))
    error = refusal(base, adapter, tmp_path / "out")
    assert "experts.down_proj: found shape [3, 16, 13], expected [3, 16, 12]" in error


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x)[0]


def test_a_multi_head_attention_is_refused_because_peft_applies_it_twice(tmp_path: Path) -> None:
    model = Attention()
    base = tmp_path / "base"
    base.mkdir()
    save_file(model.state_dict(), base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text("{}")
    adapter = oracle.train(model, tmp_path / "adapter", LoraConfig(r=2, target_modules=["attn"]))
    error = refusal(base, adapter, tmp_path / "out")
    assert "attn.base_layer.out_proj" in error and "nn.MultiheadAttention" in error and "twice" in error
    oracle.rewrite_tensors(adapter, without("out_proj"))
    error = refusal(base, adapter, tmp_path / "out")
    assert "attn.weight" in error and "nn.MultiheadAttention twice" in error


def test_replicated_layers_are_refused(trained: Any, tmp_path: Path) -> None:
    base, adapter, _ = trained("mixtral", 12, UP, DOWN)
    copied = shutil.copytree(adapter, tmp_path / "adapter")
    oracle.rewrite_config(copied, layer_replication=[[0, 1], [0, 2]])
    assert "layer_replication" in refusal(base, copied, tmp_path / "out")


def test_a_summary_counts_the_rank_of_one_expert(trained: Any) -> None:
    _, adapter, _ = trained("mixtral", 12, UP, DOWN)
    summary = tv.TaskVector.from_adapter(adapter).terms[0][1].summary()  # type: ignore[attr-defined]
    assert summary["ranks"] == {"2": 6} and summary["scales"] == {"1.5": 6}
    assert summary["targets"] == {"gate_up_proj": 2, "down_proj": 2, "q_proj": 2}
    assert json.dumps(summary)
