"""--alpha-for, --alpha-layers and --mask."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import SHAPES, Command, Tensors, files_under, random_tensors

BASE, OLD = random_tensors(1), random_tensors(2)
EMBED, WEIGHT, BIAS, LATER = SHAPES


def weights(folder: Path) -> Tensors:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_edited(folder: Path, alphas: dict[str, float], masks: Tensors | None = None) -> None:
    """base − α·(mask·(old − base)), one float32 operation at a time, rounded once."""
    found = weights(folder)
    assert found.keys() == BASE.keys()
    for name, tensor in BASE.items():
        expected = tensor
        if alphas.get(name):
            step = OLD[name].float() - tensor.float()
            step = step * masks[name].float() if masks and name in masks else step
            expected = (tensor.float() - torch.tensor(alphas[name], dtype=torch.float32) * step).to(tensor.dtype)
        assert found[name].equal(expected), name


def subtract(taskvec: Command, *options: str) -> int:
    return taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out", *options).code


def test_the_first_alpha_for_that_matches_wins_and_the_rest_get_alpha(taskvec: Command, here: Path) -> None:
    assert subtract(taskvec, "--alpha-for", "*.h.0.q.bias=2", "--alpha-for", "*.h.0.*=-0.5") == 0
    assert_edited(here / "out", {EMBED: 0.3, WEIGHT: -0.5, BIAS: 2.0, LATER: 0.3})


def test_the_order_of_the_options_is_the_order_of_the_patterns(taskvec: Command, here: Path) -> None:
    assert subtract(taskvec, "--alpha-for", "*.weight=0.5", "--alpha-for", "*=0") == 0
    assert_edited(here / "out", {EMBED: 0.5, WEIGHT: 0.5, BIAS: 0.0, LATER: 0.5})


def test_layers_get_a_ramp_unless_a_pattern_says_otherwise(taskvec: Command, here: Path) -> None:
    assert subtract(taskvec, "--alpha-layers", "0.1:0.6", "--alpha-for", "*bias=1.5") == 0
    assert_edited(here / "out", {EMBED: 0.3, WEIGHT: 0.1, BIAS: 1.5, LATER: 0.6})


def test_add_has_the_other_sign(taskvec: Command, here: Path) -> None:
    assert taskvec("add", "base", "old", "-a", "0.3", "--alpha-layers=-1:2", "-o", "out").code == 0
    assert_edited(here / "out", {EMBED: -0.3, WEIGHT: 1.0, BIAS: 1.0, LATER: -2.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.uint8])
def test_a_mask_weighs_the_difference(taskvec: Command, here: Path, dtype: torch.dtype) -> None:
    masks = {name: (torch.rand(SHAPES[name]) * 2).to(dtype) for name in (WEIGHT, LATER)}
    save_file(masks, here / "mask.safetensors")
    outcome = taskvec(
        "subtract", "base", "old", "-a", "0.3", "-o", "out", "--mask", "mask.safetensors", "--alpha-for", f"{LATER}=0.7"
    )
    assert outcome.code == 0
    assert_edited(here / "out", {EMBED: 0.3, WEIGHT: 0.3, BIAS: 0.3, LATER: 0.7}, masks)
    assert f"note: 2 tensors without a mask in mask.safetensors: {EMBED}, {BIAS}" in outcome.err


def test_the_same_options_work_with_an_adapter_and_a_saved_vector(taskvec: Command, here: Path) -> None:
    taskvec("extract", "base", "old", "-o", "v.safetensors")
    save_file({WEIGHT: torch.rand(SHAPES[WEIGHT])}, here / "mask.safetensors")
    options = ("-a", "0.3", "--alpha-for", "*.h.0.*=0.5", "--mask", "mask.safetensors")
    for old in ("old", "v.safetensors", "lora"):
        assert taskvec("subtract", "base", old, *options, "-o", f"{old} out").code == 0
    one, two, three = (weights(here / f"{old} out") for old in ("old", "v.safetensors", "lora"))
    assert all(one[name].equal(two[name]) for name in one)
    assert [name for name in BASE if not three[name].equal(BASE[name])] == [WEIGHT]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--alpha-for", "*.mlp.*=0.5"), 2, "'*.mlp.*' chooses no tensor that is edited"),
        (("--alpha-for", "*=0.5", "--alpha-for", "*.h.*=1"), 2, "'*.h.*' chooses no tensor that is edited"),
        (("--alpha-for", "*bias=0.5", "--alpha-for", "*bias=1"), 2, "'*bias' chooses no tensor that is edited"),
        (("--alpha-for", "model.position_ids=1"), 2, "chooses no tensor that is edited"),
        (("--alpha-for", "*"), 2, "expected GLOB=A"),
        (("--alpha-for", "=1"), 2, "expected GLOB=A"),
        (("--alpha-for", "*=x"), 2, "'x' is not a finite number"),
        (("--alpha-for", "*=nan"), 2, "'nan' is not a finite number"),
        (("--alpha-for", "*=1e40"), 2, "outside float32"),
        (("--alpha-layers", "0.5"), 2, "expected A:B"),
        (("--alpha-layers", "0:inf"), 2, "'inf' is not a finite number"),
        (("--mask", "missing.safetensors"), 1, "missing.safetensors"),
        (("--mask", "other.safetensors"), 3, "1 mask of tensors that base lacks: another.w"),
        (("--force-base",), 2, "force_base is for saved vectors"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_leaves_nothing(
    taskvec: Command, here: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    before = files_under(here)
    for extra in ((), ("--dry-run",)):
        outcome = taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out", *options, *extra)
        assert outcome.code == code and words in outcome.err and outcome.err.count("\n") == 1, outcome
        assert files_under(here) == before


def test_the_formula_tells_the_weights(taskvec: Command, here: Path) -> None:
    save_file({WEIGHT: torch.ones(SHAPES[WEIGHT])}, here / "mask.safetensors")
    outcome = taskvec(
        "subtract", "base", "old", "-a", "0.3", "-o", "out", "--alpha-for", "*bias=2", "--alpha-layers", "0:1",
        "--mask", "mask.safetensors", "--dry-run",
    )  # fmt: skip
    assert outcome.out.splitlines()[0] == (
        "edited = base − 1·mask.safetensors⊙(old − base)[*bias 2, layers 0 to 1, else 0.3]"
    )
