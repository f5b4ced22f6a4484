"""PEFT: load the model, set the adapter's scale to −ALPHA, merge_and_unload, save. BASE ADAPTER OUT ALPHA"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, out, alpha = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
model = PeftModel.from_pretrained(model, adapter)
with torch.no_grad():
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling = {name: -alpha * scale for name, scale in module.scaling.items()}
model.merge_and_unload().save_pretrained(out)
