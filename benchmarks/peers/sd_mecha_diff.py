"""sd-mecha on the first shard files merged to one is not possible for folders: it reads single files. BASE TUNED OUT ALPHA"""

import sys

import sd_mecha

base, tuned, out, alpha = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
sd_mecha.set_log_level("ERROR") if hasattr(sd_mecha, "set_log_level") else None
b, t = sd_mecha.model(base), sd_mecha.model(tuned)
recipe = sd_mecha.add_difference(b, t - b, alpha=-alpha)
sd_mecha.merge(recipe, output=out)
