"""What a stranger runs into: mistaken arguments, additions to an output, values that are no numbers, another place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .conftest import Command, files_under, random_tensors

SUBTRACT = ("subtract", "base", "old", "-a", "0.5")


def test_overwrite_keeps_its_hands_off_what_was_added_to_an_output(here: Path, taskvec: Command) -> None:
    assert taskvec(*SUBTRACT, "-o", "out").code == 0
    (here / "out" / "my-results").mkdir()
    (here / "out" / "my-results" / "eval.csv").write_text("1,2")
    before = files_under(here / "out")
    outcome = taskvec(*SUBTRACT, "-o", "out", "--overwrite")
    assert outcome.code == 1 and "my-results/eval.csv" in outcome.err
    assert files_under(here / "out") == before


def test_values_that_are_no_numbers_are_told_with_their_tensor(here: Path, taskvec: Command) -> None:
    tensors = random_tensors(2)
    tensors["model.h.0.q.weight"][0, 0] = float("nan")
    (here / "sick").mkdir()
    save_file(tensors, here / "sick" / "model.safetensors")
    outcome = taskvec("subtract", "base", "sick", "-a", "0.5", "-o", "out")
    assert outcome.code == 0
    assert "warning: 1 element of the output inf or NaN, as an input is there, in model.h.0.q.weight" in outcome.err
    assert "inf or NaN        1\n" in outcome.out


@pytest.mark.parametrize("alpha", ["0", "0.5"])
def test_another_model_is_refused_also_with_an_alpha_of_zero(alpha: str, taskvec: Command) -> None:
    outcome = taskvec("subtract", "base", "other.safetensors", "-a", alpha, "-o", "out")
    assert outcome.code == 3 and "no tensor name in common" in outcome.err


def test_an_alpha_of_zero_copies_and_says_that_nothing_was_edited(here: Path, taskvec: Command) -> None:
    outcome = taskvec("subtract", "base", "old", "-a", "0", "-o", "out")
    assert outcome.code == 0 and "warning: nothing was edited: every coefficient is 0" in outcome.err
    found = {name: tensor for path in (here / "out").glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert all(torch.equal(tensor, found[name]) for name, tensor in random_tensors(1).items())


def test_swapped_arguments_are_told_what_comes_first(taskvec: Command) -> None:
    outcome = taskvec("subtract", "lora", "base", "-a", "1", "-o", "out")
    assert outcome.code == 1 and "an adapter, expected a model here" in outcome.err


def test_a_lora_file_without_its_config_is_named_as_an_adapter(here: Path, taskvec: Command) -> None:
    (here / "lone.safetensors").write_bytes((here / "lora" / "adapter_model.safetensors").read_bytes())
    outcome = taskvec("subtract", "base", "lone.safetensors", "-a", "1", "-o", "out")
    assert outcome.code == 3 and "without its adapter_config.json" in outcome.err


@pytest.mark.parametrize("wrong", [("--device", "tpu"), ("--jobs", "0"), ("--memory", "1"), ("--memory", "9" * 400)])
def test_a_dry_run_refuses_what_the_run_would(wrong: tuple[str, str], taskvec: Command) -> None:
    assert taskvec(*SUBTRACT, "-o", "out", *wrong, "--dry-run").code == 2
    assert taskvec(*SUBTRACT, "-o", "out", *wrong).code == 2


@pytest.mark.parametrize("name", [".", "..", "base/.."])
def test_the_folder_one_is_in_is_no_name_for_an_output(name: str, taskvec: Command) -> None:
    assert taskvec(*SUBTRACT, "-o", name).code in (1, 2)
    assert taskvec(*SUBTRACT, "-o", name, "--overwrite").code in (1, 2)


def test_a_single_file_has_the_same_bytes_wherever_it_is_written(
    here: Path, taskvec: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert taskvec(*SUBTRACT, "-o", "a.safetensors").code == 0
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert taskvec("subtract", "../base", "../old", "-a", "0.5", "-o", "b.safetensors").code == 0
    assert (here / "a.safetensors").read_bytes() == (here / "elsewhere" / "b.safetensors").read_bytes()


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_a_tensor_called_like_the_place_of_the_checksum_keeps_its_name(output: str, here: Path, taskvec: Command) -> None:
    name = "the-checksum-of-a-file-goes-here"
    for path, value in (("x.safetensors", 1.0), ("y.safetensors", 2.0)):
        save_file({name: torch.full((4,), value)}, here / path, {"note": name})
    assert taskvec("subtract", "x.safetensors", "y.safetensors", "-a", "1", "-o", output).code == 0
    path = here / output / "model.safetensors" if output == "out" else here / output
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == [name]
        assert output != "out" or file.metadata()["note"] == name


def test_an_adapter_whose_config_changed_is_an_input_that_is_another_one_by_now(here: Path, taskvec: Command) -> None:
    assert taskvec("subtract", "base", "lora", "-a", "1", "-o", "out").code == 0
    config = here / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 5}))
    outcome = taskvec("verify", "out")
    assert outcome.code == 0 and "the config of adapter lora is another one by now" in outcome.out


def test_a_side_file_that_grows_under_the_run_ends_it(here: Path, taskvec: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskvec.run import staging

    plain = staging.Staging.copy

    def copy(self: staging.Staging, file: staging.SideFile) -> None:
        plain(self, file._replace(nbytes=file.nbytes - 1) if file.name == "tokenizer.json" else file)

    monkeypatch.setattr(staging.Staging, "copy", copy)
    outcome = taskvec(*SUBTRACT, "-o", "out")
    assert outcome.code == 1 and "tokenizer.json: changed during the run" in outcome.err
    assert not (here / "out").exists()
