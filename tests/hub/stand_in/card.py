"""What the Hub checks in the front matter of a README.md. PyYAML comes with huggingface_hub."""

from __future__ import annotations

import re
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
RELATIONS = ("adapter", "finetune", "merge", "quantized")
_LICENSE_IDS = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl array artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0
lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 open-mdw
openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(_LICENSE_IDS.split())


def front_matter(text: str) -> dict[str, Any] | None:
    """The metadata of a card; None where there is none. Raises yaml.YAMLError where it is no YAML."""
    found = FRONT_MATTER.match(text)
    if found is None:
        return None
    value = yaml.safe_load(found[1])
    return value if isinstance(value, dict) else None


def problems(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings, in the Hub's words where we have seen them."""
    try:
        data = front_matter(text)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}".replace("\n", " ")], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    return [*_base_model(data), *_license(data), *_relation(data), *_tags(data)], []


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _base_model(data: dict[str, Any]) -> list[str]:
    wrong = [x for x in _listed(data.get("base_model")) if not (isinstance(x, str) and MODEL_ID.fullmatch(x))]
    return [f'"base_model" with value "{x}" is not valid. Use a model id from https://hf.co/models.' for x in wrong]


def _license(data: dict[str, Any]) -> list[str]:
    wrong = [x for x in _listed(data.get("license")) if x not in LICENSES]
    return ['"license" must be one of [' + ", ".join(sorted(LICENSES)) + "]"] if wrong else []


def _relation(data: dict[str, Any]) -> list[str]:
    relation = data.get("base_model_relation")
    return [] if relation in (None, *RELATIONS) else [f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]']


def _tags(data: dict[str, Any]) -> list[str]:
    tags = data.get("tags")
    fine = tags is None or (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags))
    return [] if fine else ['"tags" must be an array of strings']
