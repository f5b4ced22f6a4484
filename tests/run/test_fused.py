"""The fused GPU kernel gives numpy's bits: run by Triton's interpreter where there is no GPU, and compiled without one to
look for the fused multiply-add that the contract forbids."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

INTERPRETED = """
import itertools
import numpy as np, torch
from taskvec.run import fused
from taskvec.run.jobs import Tile
from taskvec.run.kernel import NumpyKernel
from tests.run.test_native import COUNT, DTYPES, job

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
for base, tuned, alpha in itertools.product(DTYPES, DTYPES, (0.3, -1.7)):
    case, raw = job((base, base, tuned, base), (alpha,))
    expected, counts = NumpyKernel(lambda tensor: raw[tensor]).edit(case, Tile(0, COUNT, 0, 1, 0, COUNT), raw)
    left = torch.from_numpy(raw[case.base].copy()).view(TORCH[base])
    right = torch.from_numpy(raw[case.terms[0].delta.tuned].copy()).view(TORCH[tuned])
    out, found = torch.empty_like(left), fused.counts_on("cpu")
    fused.edit(left, right, float(np.float32(alpha)), out, found)
    assert out.view(torch.uint8).numpy().tobytes() == expected.tobytes(), (base, tuned, alpha)
    assert found.tolist() == [counts.intended, counts.changed, counts.overflow, counts.nonfinite], (base, tuned, alpha)
for rank, columns in ((1, 5), (16, 1500), (11, 1024)):
    generator = np.random.default_rng(rank)
    left = generator.standard_normal((3, rank)).astype(np.float32)
    wide = generator.standard_normal((rank, columns + 8)).astype(np.float32)
    expected = np.empty((3, columns), np.float32)
    NumpyKernel(lambda tensor: None)._multiply(left, wide[:, 4:-4], expected)
    found = fused.product(torch.from_numpy(left), torch.from_numpy(wide)[:, 4:-4])
    assert found.numpy().tobytes() == expected.tobytes(), (rank, columns)
print("equal")
"""

COMPILED = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from taskvec.run import fused

signature = dict(base_at="*i16", tuned_at="*i16", out_at="*i16", counts_at="*i64", size="i64", alpha="fp32", limit="fp32")
settings = dict(NEGATED=False, CANONICAL=0x7FC0, BASE="bfloat16", TUNED="bfloat16", LENGTH=4096)
source = ASTSource(fused._edit, {**signature, **dict.fromkeys(settings, "constexpr")}, settings)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
instructions = re.findall(r"(fma|mul|sub)[.](?:rn[.])?f32", compiled.asm["ptx"])
assert instructions.count("mul") > 0 and instructions.count("sub") == 2 * instructions.count("mul"), instructions
assert "fma" not in instructions
print("unfused")
"""


def run(script: str, **environment: str) -> str:
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    command = [sys.executable, "-W", "ignore", "-c", script]
    # the interpreter reads the source of what it runs: from files, not from this string
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_fused_kernel_gives_the_bits_and_counts_of_numpy_under_the_interpreter() -> None:
    assert run(INTERPRETED, TRITON_INTERPRET="1").endswith("equal")


def test_the_fused_kernel_compiles_for_sm_90_without_a_fused_multiply_add() -> None:
    assert run(COMPILED).endswith("unfused")
