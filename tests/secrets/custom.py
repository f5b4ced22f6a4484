"""A tiny model whose architecture and tokenizer are code in its own folder, over several files, as on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CODE = {
    "configuration_own.py": """
from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "own-of-the-tests"

    def __init__(self, width=6, **kwargs):
        self.width = width
        super().__init__(**kwargs)
""",
    "modeling_own.py": """
from transformers import PreTrainedModel

from .configuration_own import OwnConfig
from .layers import Doubled


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.inner = Doubled(config.width)
        self.post_init()

    def forward(self, x):
        return self.inner(x)
""",
    "layers.py": """
import torch

from .factor import FACTOR


class Doubled(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = torch.nn.Linear(width, width)

    def forward(self, x):
        return FACTOR * self.up(x)
""",
    "factor.py": "FACTOR = 2.0\n",
    "tokenization_own.py": """
from transformers import PreTrainedTokenizer


class OwnTokenizer(PreTrainedTokenizer):
    @property
    def vocab_size(self):
        return 256

    def get_vocab(self):
        return {chr(i): i for i in range(256)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) % 256

    def _convert_id_to_token(self, index):
        return chr(index)
""",
}
UNUSED = {"training_loop.py": "raise SystemExit('never to be run')\n"}
CONFIG = {
    "model_type": "own-of-the-tests",
    "architectures": ["OwnModel"],
    "width": 6,
    "auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"},
}
TOKENIZER = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}


def write_custom(folder: Path, seed: int) -> Path:
    """A model folder with code that its configs name, and code that they do not."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "inner.up.weight": torch.randn(6, 6, generator=generator),
        "inner.up.bias": torch.randn(6, generator=generator),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    for name, text in {**CODE, **UNUSED}.items():
        (folder / name).write_text(text)
    return folder
