"""Where the parts of a difference go, where names are apt to be taken for others: PEFT is asked which modules it adapts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from taskvec import Checkpoint
from taskvec.delta.adapters import tied
from taskvec.errors import AdapterError
from taskvec.run.lora.extract import extract_lora
from taskvec.run.lora.layout import lay_out

from ...delta.adapters import peft_oracle as oracle

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]


class Block(nn.Module):
    """A Linear, one that holds another, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 6, bias=False)
        self.norm = nn.LayerNorm(8)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(8)


class Model(Tower):
    """Names of the tower in it end as its own do: `layers.0.q`, `vision.layers.0.q`; one has an underscore where another has
    a dot; and a container is called as Linears are."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = Tower()
        self.vision_layers = nn.ModuleList([Block()])
        self.q = nn.ModuleDict({"inner": nn.Linear(8, 6)})


def tuned(base: dict[str, torch.Tensor], ranks: dict[str, int]) -> dict[str, torch.Tensor]:
    """Another model: products of these ranks added to some weights, vectors replaced (rank 0)."""
    generator, found = torch.Generator().manual_seed(4), dict(base)
    for name, rank in ranks.items():
        value = base[name]
        if rank:
            left, right = (torch.randn(s, generator=generator) for s in ((len(value), rank), (rank, value.shape[1])))
            found[name] = value + left @ right
        else:
            found[name] = value + torch.randn(value.shape, generator=generator)
    return found


NORMS = dict.fromkeys((name for name in Model().state_dict() if "norm" in name), 0)
CASES: dict[str, dict[str, int]] = {
    "one of two names that end alike": {"layers.0.q.weight": 2},
    "the longer of two names": {"vision.layers.0.q.weight": 2},
    "both, of other ranks": {"layers.0.q.weight": 2, "vision.layers.0.q.weight": 3},
    "both, the shorter of the larger rank": {"layers.0.q.weight": 3, "vision.layers.0.q.weight": 2},
    "three ranks": {"layers.0.q.weight": 1, "vision.layers.0.q.weight": 2, "vision.layers.1.q.weight": 3},
    "a dot that is an underscore in another": {"vision.layers.0.q.weight": 2, "vision_layers.0.q.weight": 3},
    "what lies in a module of the name of others": {"q.inner.weight": 2, "layers.1.q.weight": 2},
    "a bias beside factors": {"q.inner.weight": 2, "q.inner.bias": 0},
    "a bias alone": {"layers.1.q.weight": 2, "q.inner.bias": 0},
    "a norm": {"layers.1.q.weight": 2, "layers.1.norm.weight": 0},
    "a norm whose name others end in": {"layers.1.q.weight": 2, "norm.bias": 0},
    "every norm": {"layers.1.q.weight": 2, **NORMS},
}


@pytest.mark.parametrize("case", CASES)
def test_peft_finds_exactly_what_changed(case: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = {name: value.detach() for name, value in Model().state_dict().items()}
    after = tuned(base, CASES[case])
    for name, tensors in (("base.safetensors", base), ("tuned.safetensors", after)):
        save_file(tensors, tmp_path / name)
    old, new = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    report = extract_lora(old, new, output=tmp_path / "lora", energy=0.999999, fsync=False)
    assert {t.layer.name: t.rank for t in report.tensors} == {name: rank for name, rank in CASES[case].items() if rank}
    model = Model()
    model.load_state_dict(base)
    adapted = PeftModel.from_pretrained(model, tmp_path / "lora")
    found = {n.removeprefix("base_model.model.") for n, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert found == {tensor.layer.module for tensor in report.tensors}
    torch.testing.assert_close(adapted.merge_and_unload().state_dict(), after, rtol=0, atol=1e-4)


@pytest.mark.parametrize("other", ["x.norm.q.weight", "x.xnorm.weight"])
def test_a_norm_for_which_peft_would_take_another_module_is_refused(other: str, tmp_path: Path) -> None:
    """Below `x.norm` PEFT adapts nothing if `norm` is saved; and it would save `x.xnorm`, a Linear, too."""
    base = {"norm.weight": torch.ones(4), other: torch.ones(6, 4), "a.q.weight": torch.ones(6, 4)}
    after = {name: value + 1 for name, value in base.items()}
    for name, tensors in (("base.safetensors", base), ("tuned.safetensors", after)):
        save_file(tensors, tmp_path / name)
    old, new = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    with pytest.raises(AdapterError, match=r"norm\.weight \(PEFT would take"):
        extract_lora(old, new, output=tmp_path / "lora", rank=1, fsync=False)
    extract_lora(old, new, output=tmp_path / "lora", rank=1, exclude=["norm.weight"], fsync=False)


def test_a_leaf_name_is_used_where_it_means_nothing_else(tmp_path: Path) -> None:
    base = {f"layers.{i}.q.weight": torch.randn(4, 4) for i in range(3)}
    save_file(base, tmp_path / "base.safetensors")
    save_file({name: value + 1 for name, value in base.items()}, tmp_path / "tuned.safetensors")
    extract_lora(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", output=tmp_path / "lora", rank=1, fsync=False)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["target_modules"] == ["q"]
    assert load_file(tmp_path / "lora" / "adapter_model.safetensors").keys() == {
        f"base_model.model.layers.{i}.q.lora_{x}.weight" for i in range(3) for x in "AB"
    }


def kinds(tmp_path: Path, tensors: dict[str, tuple[int, ...]], **config: Any) -> dict[str, str]:
    """Name of every weight of two axes -> what it is taken for."""
    tmp_path.joinpath("config.json").write_text(json.dumps(config))
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "model.safetensors")
    base = Checkpoint.open(tmp_path)
    changed = {name: tensor for name, tensor in base.tensors.items() if len(tensor.shape) == 2}
    layout = lay_out(base, changed, base.tensors.__getitem__)
    return {layer.name: layer.kind for layer in layout.layers}


EMBEDDINGS = [
    *tied._EMBEDDINGS, "wpe.weight", "position_embeddings.weight", "token_type_embeddings.weight",
    "position_embedding.weight", "embed_positions.weight", "relative_attention_bias.weight",
]  # fmt: skip
LINEARS = [*tied._HEADS, "q_proj.weight", "vision_embed_tokens.weight", "embeddings_project.weight"]


def test_embeddings_are_known_by_their_names(tmp_path: Path) -> None:
    names = {f"model.{i}.{name}": "embedding" for i, name in enumerate(EMBEDDINGS)}
    names.update({f"model.{i}.{name}": "linear" for i, name in enumerate(LINEARS)})
    assert kinds(tmp_path, dict.fromkeys(names, (6, 4))) == names


def test_what_has_a_bias_is_no_embedding(tmp_path: Path) -> None:
    assert kinds(tmp_path, {"m.x_embedding.weight": (6, 4), "m.x_embedding.bias": (6,)}) == {"m.x_embedding.weight": "linear"}


def test_a_conv1d_is_known_by_its_model(tmp_path: Path) -> None:
    found = kinds(tmp_path, {"h.0.attn.c_proj.weight": (4, 4), "lm_head.weight": (6, 4)}, model_type="gpt2")
    assert found == {"h.0.attn.c_proj.weight": "conv1d", "lm_head.weight": "linear"}
