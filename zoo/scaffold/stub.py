"""The files that a new family begins with: its module, its model and its parity test."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.config import ModelSpec, save_spec
from zoo.families import FAMILIES
from zoo.files import write_text
from zoo.registry import configs_dir
from zoo.scaffold.proposal import Proposal

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_layers": 4,
    "intermediate_size": 80,
    "attention.num_heads": 4,
    "attention.num_kv_heads": 2,
    "attention.head_dim": 16,
    "mla.num_heads": 4,
    "mla.kv_lora_rank": 24,
    "mla.q_lora_rank": 32,
    "mla.qk_nope_head_dim": 12,
    "mla.qk_rope_head_dim": 8,
    "mla.v_head_dim": 16,
    "moe.num_experts": 8,
    "moe.top_k": 2,
    "moe.moe_intermediate_size": 24,
    "moe.num_groups": 2,
    "moe.top_k_groups": 1,
    "moe.first_k_dense": 1,
}
"""Path of a field → its size in a model that a test runs in milliseconds."""

FAMILY = '''"""{name}: what it is and where it is described, in a line.

Begun by ``zoo new-family`` from {base}, the nearest family.
"""

from __future__ import annotations

from typing import Any

from zoo.config import ModelConfig
from zoo.families import {base}
from zoo.families.base import Family
from zoo.families.fields import Fields

{comments}
def _read(fields: Fields) -> ModelConfig:
    return {base}.FAMILY.read(fields)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {base}.FAMILY.write(config)


FAMILY = Family(
    name="{name}",
    model_type={model_type},
    architectures=({architecture},),
    read=_read,
    write=_write,
    map_weights={base}.FAMILY.map_weights,
)
'''

TEST = '''"""{name} against transformers: its config, and its logits through disk."""

from __future__ import annotations

from pathlib import Path

import torch
from hf_cases import relative_difference, tokens
from transformers import AutoConfig, AutoModelForCausalLM

import zoo
from zoo.families.{name} import FAMILY
from zoo.registry import find_spec

PUBLISHED = {published}

SMALL = PUBLISHED | {small}


def test_published_config_is_the_one_of_the_zoo() -> None:
    config = FAMILY.from_hf(PUBLISHED)
    assert config == find_spec("{slug}").model
    assert FAMILY.from_hf(FAMILY.to_hf(config)) == config


@torch.no_grad()
def test_logits_through_disk(tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL)).eval()
    theirs.save_pretrained(tmp_path)
    ids = tokens(2, 100)
    assert relative_difference(zoo.load(tmp_path)(ids).logits, theirs(ids).logits) < 1e-5
'''


def checkout() -> Path:
    """The source checkout that this package runs from.

    Raises:
        ValueError: it runs from an installed wheel.
    """
    root = configs_dir().parent
    if not (root / "tests" / "parity").is_dir():
        raise ValueError(f"{root}: not a source checkout, in which a family is added; give --out DIR")
    return root


def write_stubs(name: str, hf: Mapping[str, Any], proposal: Proposal, root: Path) -> list[Path]:
    """Write the module, the model and the test of the family ``name`` into the checkout ``root``.

    Returns:
        The files written.

    Raises:
        ValueError: ``name`` is no name of a new module, the file says no model_type or architecture, or one of the
            files is there: then none is written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"{name!r}: not a name of a module; use small letters, digits and _, such as qwen3_moe")
    if name in FAMILIES:
        raise ValueError(f"{name}: a family of this name is there already (zoo/families/{name}.py)")
    slug = name.replace("_", "-")
    texts = {
        root / "zoo" / "families" / f"{name}.py": _family(name, hf, proposal),
        root / "tests" / "parity" / f"test_{name}.py": _test(name, slug, hf, proposal),
    }
    model = root / "configs" / "models" / f"{slug}.yaml"
    for path in (*texts, model):
        if path.exists() or path.is_symlink():
            raise ValueError(f"{path}: already there; choose another name, or remove it")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    model.parent.mkdir(parents=True, exist_ok=True)
    save_spec(ModelSpec(name=slug, family=name, model=proposal.config), model)
    return [*texts, model]


def _family(name: str, hf: Mapping[str, Any], proposal: Proposal) -> str:
    model_type, architectures = hf.get("model_type"), hf.get("architectures")
    if not isinstance(model_type, str):
        raise ValueError(f"model_type = {model_type!r}: expected a string; give the published config.json")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise ValueError(f"architectures = {architectures!r}: expected a list of names; give the published config.json")
    return FAMILY.format(
        name=name,
        base=proposal.family,
        model_type=literal(model_type),
        architecture=literal(architectures[0]),
        comments=_comments(proposal),
    )


def _comments(proposal: Proposal) -> str:
    """What is left to do, as comments: nothing where the nearest family reads the whole file."""
    lines = [
        f"# {asked} of {proposal.family} is spelled {there} here." for asked, there in proposal.notes.renamed.items()
    ]
    if proposal.notes.unread:
        lines.append(
            f"# What {proposal.family} cannot express. Each becomes a field of zoo/config.py that _read gives and"
        )
        lines.append("# _write writes; or fields.expect(KEY, VALUE), or fields.skip(KEY) if no output depends on it.")
    for key, value in proposal.notes.unread.items():
        known = proposal.known_to[key]
        text = f"#   {literal(key)[1:-1]} = {literal(value)}"
        lines.append((text[:90] + "…" if len(text) > 91 else text) + (f" (known to {known[0]})" if known else ""))
    return "\n".join([*lines, "", ""]) if lines else ""


def _test(name: str, slug: str, hf: Mapping[str, Any], proposal: Proposal) -> str:
    return TEST.format(name=name, slug=slug, published=literal(dict(hf)), small=literal(_small(hf, proposal)))


def _small(hf: Mapping[str, Any], proposal: Proposal) -> dict[str, Any]:
    """The fields of ``hf`` that make its model small, and lists with an item a layer cut to as many layers."""
    sizes = {key: SMALL[path] for path, key in proposal.origins.items() if path in SMALL and "." not in key}
    lists = {
        key: value[: SMALL["num_layers"]]
        for key, value in hf.items()
        if isinstance(value, list) and len(value) == proposal.config.num_layers > SMALL["num_layers"]
    }
    return sizes | lists


def literal(value: Any, indent: int = 0) -> str:
    """Python source of a JSON value, as the formatter would lay it out.

    Raises:
        ValueError: a number that is not finite.
    """
    names = {None: "None", True: "True", False: "False"}
    if value is None or isinstance(value, bool):
        return names[value]
    if isinstance(value, Mapping) or (isinstance(value, list) and len(str(value)) > 80):
        inner = " " * (indent + 4)
        keys = (
            [f"{json.dumps(str(key), ensure_ascii=False)}: " for key in value]
            if isinstance(value, Mapping)
            else [""] * len(value)
        )
        items = value.values() if isinstance(value, Mapping) else value
        lines = [f"{inner}{key}{literal(item, indent + 4)},\n" for key, item in zip(keys, items, strict=True)]
        opening, closing = "{}" if isinstance(value, Mapping) else "[]"
        return opening + ("\n" + "".join(lines) + " " * indent if lines else "") + closing
    if isinstance(value, list):
        return f"[{', '.join(literal(item, indent) for item in value)}]"
    return json.dumps(value, allow_nan=False, ensure_ascii=False)
