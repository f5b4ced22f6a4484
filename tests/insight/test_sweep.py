"""`tv.sweep`: what is evaluated, which α is chosen, what is kept and not done again."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import taskvec as tv
from taskvec.insight import pins
from taskvec.insight.evaluator import Command
from taskvec.insight.rule import Rule, Trial
from taskvec.insight.sweep import Sweep
from taskvec.insight.sweep_folder import SweepFolder

from ..run.checkpoints import write_model

SHAPES = {"embed.weight": (50, 8), "h.0.w": (8, 24), "h.0.b": (24,), "h.1.w": (8, 24)}
Tensors = dict[str, torch.Tensor]


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base", tensors(1), shards=2)
    write_model(tmp_path / "old", tensors(2))
    return tmp_path


@pytest.fixture
def vector(here: Path) -> tv.TaskVector:
    return tv.TaskVector.between("base", "old")


def loaded(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def subtracted(alpha: float) -> Tensors:
    """The formula in numpy, every operation rounded to float32."""
    found = {}
    for name, base in tensors(1).items():
        delta = tensors(2)[name].numpy() - base.numpy()
        found[name] = torch.from_numpy(base.numpy() - np.float32(alpha) * delta)
    return found


def equal(found: Any, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# what is evaluated


def test_a_checkpoint_is_evaluated_as_a_folder_for_each_alpha(here: Path, vector: tv.TaskVector) -> None:
    seen: dict[float, Tensors] = {}

    def evaluate(folder: Path) -> float:
        assert (folder / "config.json").is_file()
        seen[len(seen)] = loaded(folder)
        return float(len(seen))

    found = tv.sweep("base", vector, [1.0, 0.25], evaluate=evaluate, output="out")
    assert [t.alpha for t in found.trials] == [0, 0.25, 1] and [t.target for t in found.trials] == [1, 2, 3]
    for number, alpha in enumerate((0, 0.25, 1)):
        assert equal(seen[number], subtracted(alpha))
    assert sorted(path.name for path in (here / "out").iterdir()) == ["sweep.jsonl", "sweep.svg"]
    assert equal(loaded(here / "base"), tensors(1))


def test_without_an_output_nothing_is_left(here: Path, vector: tv.TaskVector) -> None:
    before = sorted(here.iterdir())
    places: list[Path] = []
    tv.sweep("base", "old", [0.5], evaluate=lambda folder: places.append(folder) or 1.0)
    assert sorted(here.iterdir()) == before and not any(place.parent.exists() for place in places)


def test_there_is_one_candidate_at_a_time(here: Path, vector: tv.TaskVector) -> None:
    def evaluate(folder: Path) -> float:
        return len([path for path in Path("out").rglob("config.json") if path.parent != folder])

    assert [t.target for t in tv.sweep("base", vector, [0.5, 1], evaluate=evaluate, output="out").trials] == [0, 0, 0]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.held = torch.nn.ParameterDict({name.replace(".", "_"): torch.nn.Parameter(t) for name, t in tensors(1).items()})

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        return {name: self.held[name.replace(".", "_")] for name in SHAPES}


@pytest.mark.parametrize("make", [Model, lambda: tensors(1)], ids=["module", "state dict"])
def test_a_model_in_memory_is_edited_and_put_back(make: Callable[[], Any], vector: tv.TaskVector) -> None:
    model, seen = make(), []

    def evaluate(given: Any) -> dict[str, float]:
        assert given is model
        held = given.state_dict() if isinstance(given, Model) else given
        seen.append({name: tensor.detach().clone() for name, tensor in held.items()})
        return {"old": 1 - len(seen) / 10, "rest": 1.0}

    found = tv.sweep(model, vector, [-0.5, 0.3, 0.3], evaluate=evaluate, metric="/old", control="/rest")
    assert all(equal(held, subtracted(alpha)) for held, alpha in zip(seen, (0, 0.3, -0.5))) and len(seen) == 3
    assert [t.alpha for t in found.trials] == [-0.5, 0, 0.3] and found.chosen == -0.5
    assert equal(model.state_dict() if isinstance(model, Model) else model, tensors(1))


def test_a_failing_evaluation_puts_the_model_back_and_removes_the_candidate(here: Path, vector: tv.TaskVector) -> None:
    def evaluate(given: Any) -> float:
        raise RuntimeError("out of memory")

    model = tensors(1)
    with pytest.raises(RuntimeError, match="out of memory"):
        tv.sweep(model, vector, [0.3], evaluate=evaluate)
    assert equal(model, tensors(1))
    with pytest.raises(RuntimeError, match="out of memory"):
        tv.sweep("base", vector, [0.3], evaluate=evaluate, output="out")
    assert [path.name for path in (here / "out").iterdir()] == ["sweep.jsonl"]


# which is chosen


def chosen(rule: Rule, *trials: tuple[float, float, float | None]) -> float | None:
    held = [Trial(alpha, target, control, 0.0) for alpha, target, control in trials]
    return Sweep(tuple(held), rule, "f", control="/c" if rule.control else None).chosen


KEPT = Rule(control=True)
SMALL = Rule(control=True, control_goal="min")
CHOICES: dict[str, tuple[Rule, list[tuple[float, float, float | None]], float | None]] = {
    "the strongest that keeps it": (KEPT, [(0, 1, 1), (1, 0.5, 0.99), (2, 0.9, 0.96), (3, 0, 0.9)], 2),
    "of a negative side too": (KEPT, [(0, 1, 1), (-2, 0.5, 1), (1, 0.9, 1)], -2),
    "just the floor is kept": (KEPT, [(0, 1, 1), (1, 0.5, 0.95)], 1),
    "just below it is not": (KEPT, [(0, 1, 1), (1, 0.5, 0.9499999)], None),
    "a gap does not matter": (KEPT, [(0, 1, 1), (1, 0.5, 0.1), (2, 0.5, 0.96)], 2),
    "another floor": (Rule(control=True, control_floor=0.5), [(0, 1, 1), (1, 0.5, 0.5), (2, 0.1, 0.49)], 1),
    "none keeps it": (KEPT, [(0, 1, 1), (1, 0, 0)], None),
    "a nan keeps nothing": (KEPT, [(0, 1, 1), (1, 0, math.nan)], None),
    "a base without a number limits all": (KEPT, [(0, 1, math.nan), (1, 0, 1)], None),
    "of a control of 0 no share is kept": (KEPT, [(0, 1, 0), (1, 0, 0), (2, 0, 1)], None),
    "nor of a small one of 0": (SMALL, [(0, 1, 0), (1, 0, 0), (2, 0, -1)], None),
    "nor of one that is infinite": (SMALL, [(0, 1, math.inf), (1, 0, 20), (2, 0, 30)], None),
    "nor of one that is infinite upwards": (KEPT, [(0, 1, math.inf), (1, 0, math.inf)], None),
    "not a nan, though it keeps the control": (KEPT, [(0, 1, 1), (1, 0.5, 1), (2, math.nan, 1)], 1),
    "not a nan, though all of them are": (KEPT, [(0, math.nan, 1), (1, math.nan, 1)], None),
    "not a nan where the base is one": (Rule(), [(0, math.nan, None), (1, math.nan, None), (2, 5, None)], 2),
    "an infinite target": (Rule("max", control=True), [(0, 1, 1), (1, 5, 1), (2, math.inf, 1)], 2),
    "a negative control, better upwards": (KEPT, [(0, 1, -2), (1, 0, -2.09), (2, 0, -2.11)], 1),
    "a perplexity may grow a little": (SMALL, [(0, 1, 20), (1, 0, 20.9), (2, 0, 21.1), (3, 0, math.inf)], 1),
    "a negative control, better downwards": (SMALL, [(0, 1, -2), (1, 0, -1.91), (2, 0, -1.89)], 1),
    "the smallest target": (Rule(), [(0, 1, None), (1, 0.5, None), (2, 0.7, None)], 1),
    "the largest target": (Rule("max"), [(0, 1, None), (1, 1.5, None), (2, 1.2, None)], 1),
    "of equals the weakest": (Rule(), [(0, 1, None), (2, 0.5, None), (-1, 0.5, None), (3, 0.5, None)], -1),
    "none is better": (Rule(), [(0, 1, None), (1, 1, None), (2, math.nan, None)], None),
    "all better than no number": (Rule(), [(0, math.nan, None), (1, 3, None), (2, 2, None)], 2),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_the_rule_chooses(case: str) -> None:
    rule, trials, expected = CHOICES[case]
    assert chosen(rule, *sorted(trials)) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [({"goal": "less"}, "goal less"), ({"control_goal": "x"}, "control_goal x"), ({"metric": "old"}, "JSON Pointer"),
     ({"control_floor": 1.5}, "control_floor 1.5"), ({"control_floor": math.nan}, "control_floor nan"),
     ({"control": "x"}, "JSON Pointer")],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused_before_anything_is_evaluated(
    options: dict[str, Any], words: str, vector: tv.TaskVector
) -> None:
    with pytest.raises(tv.UsageError, match=words):
        tv.sweep("base", vector, [0.5], evaluate=lambda folder: pytest.fail("evaluated"), output="out", **options)


@pytest.mark.parametrize("alphas", [[], [0.0], [-0.0], [math.nan], [math.inf]])
def test_alphas_are_finite_and_not_only_0(alphas: list[float], vector: tv.TaskVector) -> None:
    with pytest.raises(tv.UsageError):
        tv.sweep("base", vector, alphas, evaluate=lambda folder: pytest.fail("evaluated"))


WARNINGS: dict[str, tuple[Rule, list[tuple[float, float, float | None]], list[str]]] = {
    "a control of 0": (KEPT, [(0, 1, 0), (1, 0, 0)], ["the control /c is 0 at α = 0, of which no share can be kept"]),
    "an infinite one": (SMALL, [(0, 1, math.inf), (1, 0, 9)], ["the control /c is inf at α = 0, of which"]),
    "a target without a number": (KEPT, [(0, 1, 1), (1, 0.5, 1), (2, math.nan, 1)], ["the target is NaN at α = 2:"]),
    "a target that is no better": (KEPT, [(0, 1, 1), (1, 1, 1)], ["the target is no better at α = 1 than at α = 0"]),
    "a base without a number": (KEPT, [(0, math.nan, 1), (1, 1, 1)], ["the target is NaN at α = 0:"]),
    "nothing": (KEPT, [(0, 1, 1), (1, 0.5, 1)], []),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_what_a_person_must_know_of_the_choice_is_said_and_in_the_summary(case: str) -> None:
    rule, trials, expected = WARNINGS[case]
    sweep = make(*trials, rule=rule)
    assert len(sweep.warnings) == len(expected) and sweep.summary()["warnings"] == sweep.warnings
    assert all(found.startswith(words) for found, words in zip(sweep.warnings, expected)), sweep.warnings


# the random vector


def deltas(held: Tensors) -> Tensors:
    return {name: held[name].double() - tensor.double() for name, tensor in tensors(1).items()}


def random_of(model: Any, vector: Any, seed: int, **options: Any) -> tuple[Sweep, Tensors, Tensors]:
    """The sweep, the chosen candidate's differences from base, and those of the random one."""
    seen: list[Tensors] = []

    def evaluate(given: Any) -> float:
        held = loaded(given) if isinstance(given, Path) else {name: t.clone() for name, t in given.items()}
        seen.append(deltas(held))
        return -float(len(seen))

    found = tv.sweep(model, vector, [0.5], evaluate=evaluate, random_control=True, seed=seed, **options)
    return found, seen[1], seen[2]


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_the_random_vector_has_the_norm_of_each_tensor_and_another_direction(place: str, vector: tv.TaskVector) -> None:
    found, true, random = random_of("base" if place == "disk" else tensors(1), vector, 0)
    assert found.random is not None and found.random.random and found.random.alpha == 0.5 and found.random.target == -3
    for name in SHAPES:
        assert math.isclose(true[name].norm(), random[name].norm(), rel_tol=1e-5)
        assert abs((true[name] * random[name]).sum() / true[name].norm() ** 2) < 0.5
    assert len(found.trials) == 2  # it is no trial of the curve


def test_the_seed_draws_the_random_vector(vector: tv.TaskVector) -> None:
    one, again, other = (random_of("base", vector, seed)[2] for seed in (0, 0, 1))
    assert equal(one, again) and not equal(one, other)
    w0, w1 = one["h.0.w"], one["h.1.w"]
    assert abs((w0 * w1).sum() / (w0.norm() * w1.norm())) < 0.5  # of one shape, and drawn apart


def test_tensors_that_are_left_out_are_left_out_of_the_random_vector(vector: tv.TaskVector) -> None:
    _, _, random = random_of("base", vector, 0, include=["h.*"])
    assert random["embed.weight"].norm() == 0 and random["h.0.w"].norm() > 0


def test_what_has_to_be_left_out_is_left_out_of_the_random_vector_too(here: Path) -> None:
    write_model(here / "resized", {**tensors(2), "embed.weight": torch.ones(51, 8)})
    _, true, random = random_of("base", "resized", 0, exclude=["embed.*"])
    assert random["embed.weight"].norm() == 0 and math.isclose(true["h.0.w"].norm(), random["h.0.w"].norm(), rel_tol=1e-5)


def test_a_model_in_memory_may_have_more_than_its_checkpoint(vector: tv.TaskVector) -> None:
    _, true, random = random_of({**tensors(1), "inv_freq": torch.ones(4)}, vector, 0)
    assert math.isclose(true["h.0.w"].norm(), random["h.0.w"].norm(), rel_tol=1e-5)


def test_a_random_vector_that_cannot_be_made_is_refused_before_anything_is_evaluated(vector: tv.TaskVector) -> None:
    vector.save("saved.safetensors")  # knows the name of its base, not where that is
    saved = tv.TaskVector.open("saved.safetensors")
    with pytest.raises(tv.UsageError, match=r"is not certain.* Name it with base="):
        tv.sweep(tensors(1), saved, [0.5], evaluate=lambda model: pytest.fail("evaluated"), random_control=True)
    assert random_of(tensors(1), saved, 0, base="base")[0].random is not None


def test_without_a_choice_there_is_no_random_vector(vector: tv.TaskVector) -> None:
    assert tv.sweep("base", vector, [0.5], evaluate=lambda folder: 1.0, random_control=True).random is None


# what is kept

SCORE = """
import json, pathlib, sys
model, out, alpha = sys.argv[1:4]
with open("calls", "a") as calls:
    calls.write(alpha + " ")
assert (pathlib.Path(model) / "config.json").exists()
alpha = float(alpha)
content = {"results": {"old": {"acc,none": 1 - alpha / 2}, "rest": {"acc,none": 1 - alpha**2 / 50}, "inf": 1e999}}
(pathlib.Path(out) / f"results_{alpha}.json").write_text(json.dumps(content))
"""
LINE = f"{shlex.quote(sys.executable)} score.py {{model}} {{out}} {{alpha}}"
METRICS = {"metric": "/results/old/acc,none", "control": "/results/rest/acc,none"}


@pytest.fixture
def score(here: Path) -> Callable[[], list[str]]:
    """The evaluator as a file; gives the α's that it was run with since the last look."""
    (here / "score.py").write_text(SCORE)

    def calls() -> list[str]:
        path = here / "calls"
        content = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return content

    return calls


def run(**options: Any) -> Sweep:
    settings = {"evaluate": LINE, "output": "out", **METRICS, **options}
    return tv.sweep("base", "old", settings.pop("alphas", [0.5, 1, 2]), **settings)


def test_a_command_is_run_for_each_alpha_and_the_strongest_that_keeps_the_control_is_chosen(
    here: Path, score: Callable[[], list[str]]
) -> None:
    found = run()
    assert score() == ["0", "0.5", "1", "2"]
    assert [(t.alpha, t.target, t.control) for t in found.trials] == [
        (0, 1, 1),
        (0.5, 0.75, 0.995),
        (1, 0.5, 0.98),
        (2, 0, 0.92),
    ]
    assert found.chosen == 1
    assert [line["alpha"] for line in lines(here)] == [0, 0.5, 1, 2]
    assert kept(here, "logs", "alpha-0.5.log").read_text().startswith("$ ")
    assert sorted(path.name for path in (here / "out").iterdir()) == ["logs", "results", "sweep.jsonl", "sweep.svg"]


def lines(here: Path) -> list[dict[str, Any]]:
    """The evaluations that sweep.jsonl lists."""
    held = [json.loads(line) for line in (here / "out" / "sweep.jsonl").read_text().splitlines()]
    return [line for line in held if "alpha" in line]


def kept(here: Path, *names: str) -> Path:
    """The one of that name, whatever was evaluated."""
    (found,) = (here / "out" / names[0]).glob("/".join(("*", *names[1:])))
    return found


def test_finished_alphas_are_not_run_again(here: Path, score: Callable[[], list[str]]) -> None:
    first = run(alphas=[0.5, 1])
    score()
    again = run(alphas=[0.5, 1])
    assert score() == [] and again == first
    more = run(alphas=[0.5, 1, 2], random_control=True)
    assert score() == ["2", "1"] and more.chosen == 1 and more.random is not None and more.random.target == 0.5
    assert run(random_control=True) == more and score() == []
    assert not list((here / "out").glob("*.safetensors"))  # as large as the model, and drawn anew from its seed
    run(random_control=True, seed=7)
    assert score() == ["1"]


def replace_keeping_times(target: Path, source: Path) -> None:
    """As `cp -p` after both were touched at once: the same name, size and modification time."""
    status = target.stat()
    target.write_bytes(source.read_bytes())
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_weights_keeping_times(here: Path) -> dict[str, Any]:
    write_model(here / "third", tensors(3))
    replace_keeping_times(here / "old" / "model.safetensors", here / "third" / "model.safetensors")
    return {}


OTHER_INPUTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "weights of the model": lambda here: write_model(here / "base", tensors(3), shards=2) and {},
    "weights of the old one": lambda here: write_model(here / "old", tensors(3)) and {},
    "weights of equal times": change_weights_keeping_times,
    "the config": lambda here: (here / "base" / "config.json").write_text('{"rope_theta": 1}') and {},
    "a tokenizer": lambda here: (here / "base" / "tokenizer.json").write_text("{}") and {},
    "the evaluator's file": lambda here: (here / "score.py").write_text(SCORE + "# changed") and {},
    "a file it is given": lambda here: (here / "tasks.yaml").write_text("hellaswag") and {},
    "another command": lambda here: {"evaluate": f"{LINE} --tasks=tasks.yaml more"},
    "other tensors": lambda here: {"include": ["h.*"]},
    "a shell": lambda here: {"evaluate": Command(GIVEN, shell=True)},
}
GIVEN = f"{LINE} --tasks=tasks.yaml"


@pytest.mark.parametrize("small", [True, False], ids=["small files", "large files"])
@pytest.mark.parametrize("case", OTHER_INPUTS)
def test_other_inputs_are_evaluated_anew_and_earlier_results_stay(
    case: str, small: bool, here: Path, score: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pins, "_SMALL", pins._SMALL if small else -1)
    (here / "tasks.yaml").write_text("arc_easy")
    run(alphas=[1], evaluate=GIVEN)
    score()
    results = {path: path.read_bytes() for path in (here / "out" / "results").rglob("*.json")}
    options = {"evaluate": GIVEN, **OTHER_INPUTS[case](here)}
    run(alphas=[1], **options)
    assert score() == ["0", "1"] and len(lines(here)) == 4
    run(alphas=[1], **options)
    assert score() == [] and all(path.read_bytes() == content for path, content in results.items())
    if options != {"evaluate": GIVEN}:  # the first inputs again, as they were
        run(alphas=[1], evaluate=GIVEN)
        assert score() == []


def test_a_line_says_for_people_what_it_is_of(here: Path, score: Callable[[], list[str]]) -> None:
    run(alphas=[1])
    line = lines(here)[1]
    assert line["formula"] == "base − α·(old − base)" and line["eval"] == LINE
    assert line["metrics"] == {METRICS["metric"]: 0.5, METRICS["control"]: 0.98}
    assert json.loads((here / "out" / line["result"]).read_text())["results"]["old"]["acc,none"] == 0.5
    assert "−" in (here / "out" / "sweep.jsonl").read_text()


def test_another_metric_or_rule_is_read_from_the_results_that_are_there(here: Path, score: Callable[[], list[str]]) -> None:
    run()
    score()
    other = run(metric=METRICS["control"], control=METRICS["metric"], goal="max", control_goal="min")
    assert [(t.target, t.control) for t in other.trials] == [(1, 1), (0.995, 0.75), (0.98, 0.5), (0.92, 0)]
    assert run(control=None).chosen == 2 and run().chosen == 1
    assert score() == [] and len(lines(here)) == 4


def test_a_mistyped_metric_costs_no_second_evaluation(here: Path, score: Callable[[], list[str]]) -> None:
    for _ in range(2):
        with pytest.raises(tv.TaskvecError, match="nothing at /results/new"):
            run(metric="/results/new/acc,none")
    assert score() == ["0"] and lines(here)[0]["metrics"] == {METRICS["control"]: 1.0}
    assert run().chosen == 1 and score() == ["0.5", "1", "2"]


def test_results_that_are_gone_or_broken_are_evaluated_anew(here: Path, score: Callable[[], list[str]]) -> None:
    run()
    score()
    kept(here, "results", "alpha-0.5", "*.json").unlink()
    kept(here, "results", "alpha-2", "*.json").write_text("{")
    assert run().chosen == 1 and score() == ["0.5", "2"]


def test_fresh_evaluates_everything_again(here: Path, score: Callable[[], list[str]]) -> None:
    run(alphas=[1])
    (here / "score.py").touch()
    score()
    run(alphas=[1], fresh=True)
    assert score() == ["0", "1"] and len(lines(here)) == 4
    assert run(alphas=[1]).chosen == 1 and score() == []


def test_a_line_that_was_not_finished_is_run_again_and_the_next_ones_stay_readable(
    here: Path, score: Callable[[], list[str]]
) -> None:
    run(alphas=[0.5, 1])
    path = here / "out" / "sweep.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    score()
    run(alphas=[0.5, 1])
    assert score() == ["1"]
    run(alphas=[0.5, 1])
    assert score() == []


def test_inf_and_nan_come_back_as_they_were(here: Path, score: Callable[[], list[str]]) -> None:
    (here / "score.py").write_text(SCORE.replace("1e999}", "1e999, 'nan': float('nan'), 'zero': -0.0}"))
    for _ in range(2):
        found = run(metric="/results/inf", control="/results/nan", alphas=[1])
        assert found.base.target == math.inf and found.base.control is not None and math.isnan(found.base.control)
    assert math.copysign(1, run(metric="/results/zero", alphas=[1]).base.target) == 1
    assert score() == ["0", "1"]
    for line in (here / "out" / "sweep.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def test_a_failed_alpha_stops_the_sweep_and_the_next_run_goes_on_there(here: Path, score: Callable[[], list[str]]) -> None:
    stop = "import os\nassert alpha != '1' or not os.path.exists('stop'), 'no'\nalpha = float"
    (here / "score.py").write_text(SCORE.replace("alpha = float", stop))
    (here / "stop").touch()
    with pytest.raises(
        tv.TaskvecError, match=r"at α = 1 ended with exit code 1\. What it printed is in out/logs/\w{12}/alpha-1\.log"
    ):
        run()
    assert score() == ["0", "0.5", "1"] and "no" in kept(here, "logs", "alpha-1.log").read_text()
    (here / "stop").unlink()
    assert run().chosen == 1 and score() == ["1", "2"]


def test_results_of_a_run_that_failed_are_not_taken_for_those_of_the_next(here: Path, score: Callable[[], list[str]]) -> None:
    (here / "score.py").write_text("import os\nif os.path.exists('silent'):\n    sys.exit()\n".join(("import sys\n", SCORE)))
    (here / "score.py").write_text((here / "score.py").read_text() + "sys.exit(1)")
    with pytest.raises(tv.TaskvecError, match="ended with exit code 1"):
        run()
    (here / "silent").touch()
    with pytest.raises(tv.TaskvecError, match=r"at α = 0 wrote no \.json file under out/results/\w{12}/alpha-0-2"):
        run()


def test_what_an_earlier_run_left_running_does_not_write_into_the_results_of_the_next(
    here: Path, score: Callable[[], list[str]]
) -> None:
    store = SweepFolder(here / "out", "key")
    with store:
        first = store.places("alpha-1")
    with store:
        second = store.places("alpha-1")
    assert first[0] != second[0] and first[1] != second[1] and not os.listdir(second[0])


def test_a_pointer_to_nothing_names_the_file_what_is_there_and_the_log(score: Callable[[], list[str]]) -> None:
    with pytest.raises(tv.TaskvecError) as error:
        run(metric="/results/new/acc,none")
    assert re.fullmatch(
        r"out/results/\w{12}/alpha-0/results_0\.0\.json, at α = 0: nothing at /results/new\. There is old, rest, inf\. "
        r"What it printed is in out/logs/\w{12}/alpha-0\.log",
        str(error.value),
    )


def test_what_the_evaluator_left_in_the_candidate_is_no_obstacle(here: Path, score: Callable[[], list[str]]) -> None:
    (here / "score.py").write_text(SCORE + "(pathlib.Path(model) / 'cache.bin').write_text('x')")
    assert run().chosen == 1


def test_what_a_killed_sweep_left_is_removed_and_nothing_else_is(here: Path, score: Callable[[], list[str]]) -> None:
    killed = SweepFolder(here / "out", "key")
    with killed:
        left = killed.scratch()
        killed._scratch = None  # it did not come to its end
    tv.subtract("base", "old", alpha=3, output=left / "0" / "candidate", fsync=False)
    mine = here / "out" / f".sweep-{'0' * 16}"
    for folder in (mine, here / "out" / "candidate"):
        tv.subtract("base", "old", alpha=3, output=folder, fsync=False)
    (here / "out" / "random.safetensors").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in (here / "out").rglob("*") if path.is_file() and "taskvec" in path.name}
    assert run(random_control=True).chosen == 1
    assert not left.exists() and all(
        path.read_bytes() == content for path, content in before.items() if left not in path.parents
    )
    assert equal(loaded(here / "out" / "candidate"), subtracted(3)) and equal(loaded(mine), subtracted(3))
    assert (here / "out" / "random.safetensors").read_bytes() == b"mine"
    assert [path for path in (here / "out").glob(".*") if path != mine] == []


@pytest.mark.parametrize("name", ["candidate", "random.safetensors", "random.delta.safetensors"])
def test_inputs_that_lie_in_the_folder_of_a_sweep_stay(name: str, here: Path, score: Callable[[], list[str]]) -> None:
    run(alphas=[1])
    tv.subtract("base", "old", alpha=1, output=here / "out" / name, fsync=False) if name == "candidate" else tv.extract(
        "base", "old", output=here / "out" / name
    )
    before = {path: path.read_bytes() for path in (here / "out").rglob("*.safetensors")}
    found = tv.sweep(
        "base",
        here / "out" / name,
        [0.7],
        evaluate=LINE,
        output="out",
        goal="max",
        random_control=True,
        metric=METRICS["control"],
    )
    assert len(before) and {path: path.read_bytes() for path in (here / "out").rglob("*.safetensors")} == before
    assert len(found.trials) == 2


def test_an_input_in_what_a_killed_sweep_left_is_refused_and_stays(here: Path, score: Callable[[], list[str]]) -> None:
    killed = SweepFolder(here / "out", "key")
    with killed:
        vector = killed.scratch() / "random.safetensors"
        killed._scratch = None
    tv.extract("base", "old", output=vector)
    with pytest.raises(tv.OutputOverlapError, match="inputs are never changed"):
        tv.sweep("base", vector, [1], evaluate=LINE, output="out", **METRICS)
    assert vector.is_file() and score() == []
    with pytest.raises(tv.OutputOverlapError):
        tv.sweep(tensors(1), tv.TaskVector.open(vector), [1], evaluate=lambda model: 1.0, output="out")
    assert vector.is_file()


def in_the_way(here: Path, name: str) -> Path:
    path = here / "out" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (here / "out" / "sweep.jsonl").touch()
    return path


@pytest.mark.parametrize("name", ["logs", "results"])
def test_a_file_where_a_folder_of_the_sweep_goes_is_one_clear_line(
    name: str, here: Path, score: Callable[[], list[str]]
) -> None:
    in_the_way(here, name).write_text("mine")
    with pytest.raises(tv.OutputError, match=rf"^out/{name}/\w+: cannot make this folder: Not a directory\. Move away"):
        run()
    assert (here / "out" / name).read_text() == "mine" and score() == []


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_what_lies_where_results_go_is_left_alone(kind: str, here: Path, score: Callable[[], list[str]]) -> None:
    run(alphas=[1])
    place = kept(here, "results", "alpha-0")
    place.rename(here / "elsewhere")
    if kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(here / ("elsewhere" if kind == "link" else "nowhere"))
    held = sorted((here / "elsewhere").iterdir())
    run(alphas=[1], fresh=True)
    assert place.is_symlink() or place.read_text() == "mine"
    assert sorted((here / "elsewhere").iterdir()) == held and kept(here, "results", "alpha-0-2").is_dir()


def test_logs_of_results_that_were_removed_stay(here: Path, score: Callable[[], list[str]]) -> None:
    run(alphas=[1])
    log, result = kept(here, "logs", "alpha-1.log"), kept(here, "results", "alpha-1")
    log.write_text("mine")
    result.rename(here / "elsewhere")
    run(alphas=[1])
    assert log.read_text() == "mine" and kept(here, "logs", "alpha-1-2.log").is_file() and score()[2:] == ["1"]


@pytest.mark.parametrize("output", ["", " ", "hf://me/sweep", "out.bin"])
def test_what_is_no_name_of_a_folder_is_refused(output: str, here: Path, score: Callable[[], list[str]]) -> None:
    with pytest.raises(tv.UsageError, match=r"^output "):
        run(output=output)
    assert score() == [] and sorted(path.name for path in here.iterdir()) == ["base", "old", "score.py"]


def test_a_folder_where_the_picture_goes_is_one_clear_line(here: Path, score: Callable[[], list[str]]) -> None:
    in_the_way(here, "sweep.svg").mkdir()
    with pytest.raises(tv.OutputError, match=r"out/sweep\.svg: cannot write: Is a directory"):
        run()


def test_folders_of_others_are_left_alone(here: Path, score: Callable[[], list[str]]) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("x")
    with pytest.raises(tv.OutputExistsError, match=r"out: exists already, and holds no sweep"):
        run()
    for output in ("base", "base/sweep"):
        with pytest.raises(tv.OutputError):
            run(output=output)
    assert score() == [] and [path.name for path in (here / "out").iterdir()] == ["thesis.tex"]
    assert not (here / "base" / "sweep").exists() and not (here / "base" / "sweep.jsonl").exists()


def test_an_empty_folder_is_taken_and_a_link_to_one_is_not(here: Path, score: Callable[[], list[str]]) -> None:
    (here / "out").mkdir()
    assert run().chosen == 1
    (here / "empty").mkdir()
    (here / "link").symlink_to("empty")
    with pytest.raises(tv.OutputExistsError):
        run(output="link")


def test_two_sweeps_do_not_share_a_folder(here: Path, score: Callable[[], list[str]]) -> None:
    with SweepFolder(here / "out", None), pytest.raises(tv.OutputError, match="another sweep is using it"):
        run()
    assert score() == []


def test_a_server_that_the_evaluator_leaves_running_is_no_obstacle(here: Path, score: Callable[[], list[str]]) -> None:
    start = "import subprocess\nserver = subprocess.Popen(['sleep', '60'], close_fds=False)\n"
    start += "open('pids', 'a').write(f'{server.pid} ')\n"
    (here / "score.py").write_text(SCORE + start)
    try:
        run(alphas=[1])
        run(alphas=[1, 2])
    finally:
        for pid in map(int, (here / "pids").read_text().split()):
            os.kill(pid, signal.SIGKILL)
    assert score() == ["0", "1", "2"]


def test_a_command_needs_a_checkpoint_and_a_folder(vector: tv.TaskVector) -> None:
    for model, options in ((tensors(1), {"output": "out"}), ("base", {})):
        with pytest.raises(tv.UsageError, match="a command evaluates a checkpoint, and needs a folder"):
            tv.sweep(model, vector, [1], evaluate=LINE, **METRICS, **options)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_before_anything_is_made(here: Path, score: Callable[[], list[str]]) -> None:
    write_model(here / "other", {"x": torch.ones(2)})
    with pytest.raises(tv.NameMismatchError):
        tv.sweep("base", "other", [1], evaluate=LINE, output="out", **METRICS)
    assert not (here / "out").exists()


# the picture


def drawn(sweep: Sweep) -> ET.Element:
    return ET.fromstring(sweep.svg())


def elements(svg: ET.Element, tag: str) -> list[ET.Element]:
    return svg.findall(f".//{{http://www.w3.org/2000/svg}}{tag}")


def make(*trials: tuple[float, float, float | None], rule: Rule = KEPT, **more: Any) -> Sweep:
    held = tuple(Trial(alpha, target, control, 0.0) for alpha, target, control in trials)
    return Sweep(held, rule, more.pop("formula", "b − α·(o − b)"), "/m", "/c" if rule.control else None, **more)


def test_the_picture_has_a_point_for_each_measurement_and_marks_the_choice() -> None:
    sweep = make((0, 1, 1), (1, 0.5, 0.97), (2, 0, 0.5), random=Trial(1, 0.9, 0.99, 0.0, random=True))
    svg = drawn(sweep)
    points = elements(svg, "circle")
    assert len(points) == 6 and [p.get("class") for p in points].count("target lost") == 1
    assert len(elements(svg, "polyline")) == 2
    assert sum(r.get("class", "").endswith("random") for r in elements(svg, "rect")) == 2
    (x,) = {p.get("cx") for p in points if (p[0].text or "").startswith("α = 1:")}
    assert [path.get("d", "").partition(" ")[0] for path in elements(svg, "path") if path.get("class") == "chosen"] == [
        f"M{x}"
    ] * 2
    assert "1 chosen" in [text.text for text in elements(svg, "text")]
    assert "α 1 is chosen" in (elements(svg, "desc")[0].text or "")
    assert "prefers-color-scheme: dark" in sweep.svg() and "http" not in sweep.svg().replace("http://www.w3.org/2000/svg", "")


def test_higher_is_drawn_higher_and_larger_alpha_further_right() -> None:
    points = elements(drawn(make((-1, 3, None), (0, 2, None), (5, 1, None), rule=Rule())), "circle")
    xs, ys = ([float(p.get(name, "")) for p in points] for name in ("cx", "cy"))
    assert xs == sorted(xs) and ys == sorted(ys) and len(set(xs)) == len(set(ys)) == 3
    assert math.isclose((xs[1] - xs[0]) / (xs[2] - xs[0]), 1 / 6, rel_tol=0.01)


@pytest.mark.parametrize(
    "sweep",
    [make((0, math.nan, math.nan), (1, math.inf, math.nan)), make((0, 1, 1), (1, 1, 1)),
     make((0, 1e308, -1e308), (1, -1e308, 1e308)), make((0, 1, 1), (1, 0, 0)),
     make((0, 0, None), (1e-9, 1, None), rule=Rule("max"), formula="<&>\x07")],
    ids=["nan", "flat", "huge", "none chosen", "odd names"],
)  # fmt: skip
def test_every_sweep_can_be_drawn(sweep: Sweep) -> None:
    text = sweep.svg()
    coordinates = [
        value for e in drawn(sweep).iter() for key, value in e.attrib.items() if key in ("cx", "cy", "x", "y", "points")
    ]
    assert coordinates and not any("nan" in value or "inf" in value for value in coordinates)
    assert "\x07" not in text
    assert sweep._repr_html_() == text


def test_the_summary_is_json_whatever_was_measured() -> None:
    sweep = make((0, math.nan, math.inf), (1, 0.5, 1.0), random=Trial(1, math.nan, None, 0.0, random=True))
    summary = json.loads(json.dumps(sweep.summary(), allow_nan=False))
    assert summary["trials"][0]["target"] is None and summary["trials"][1] == {
        "alpha": 1, "target": 0.5, "control": 1.0, "seconds": 0.0, "random": False, "kept": False,
    }  # fmt: skip
    assert summary["goal"] == "min" and summary["control"] == "/c" and summary["control_floor"] == 0.95
