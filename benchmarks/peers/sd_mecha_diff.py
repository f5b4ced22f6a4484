"""sd-mecha's add_difference with a negative alpha, in float32, on single files. BASE TUNED OUT ALPHA"""

import sys

import sd_mecha
import torch

base, tuned, out, alpha = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
a, b = sd_mecha.model(base), sd_mecha.model(tuned)
recipe = sd_mecha.add_difference(a, b, a, alpha=-alpha)
sd_mecha.merge(recipe, merge_device="cpu", merge_dtype=torch.float32, output_dtype=torch.bfloat16, output=out)
