"""Every hostile folder and special file as a model and as what is subtracted from one."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Command, everything
from .folders import FOLDERS
from .test_headers import expect_refusal

COMMANDS = {
    "model": ("subtract", "{bad}", "old.safetensors", "-a", "1", "-o", "out"),
    "old": ("subtract", "model.safetensors", "{bad}", "-a", "1", "-o", "out"),
    "inspect": ("inspect", "{bad}"),
}


@pytest.mark.parametrize(("case", "place"), [(case, place) for case, bad in FOLDERS.items() for place in bad.places])
def test_a_hostile_folder_is_one_line_and_no_output(case: str, place: str, taskvec: Command, here: Path) -> None:
    bad = FOLDERS[case]
    bad.make(here)
    before = everything(here).keys()
    told = taskvec(*(argument.format(bad=bad.model) for argument in COMMANDS[place]))
    expect_refusal(told, ("bad", *bad.words), bad.code)
    assert "secret" not in told.err and "root:" not in told.err, "the content of a file that is no model"
    assert everything(here).keys() == before, "something was left behind"
