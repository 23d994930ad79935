"""The table of docs/families.md: what each family can do, every cell with a link to the test that shows it.

    python scripts/families_table.py            # write it
    python scripts/families_table.py --check    # exit 1 if it is not what the tests say

Tests are collected, not run: a cell is filled where there is a test of that family for that ability.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- table: scripts/families_table.py -->\n", "<!-- end of table -->\n"

PARITY, PUBLISHED = "tests/parity/test_families.py", "tests/parity/test_published_configs.py"
CARDS = "tests/parity/test_cards.py"
STACKS, STACK_CONFIGS = "tests/parity/test_encoder_decoder.py", "tests/parity/test_encoder_decoder_configs.py"
COLUMNS = {
    "config": [(file, "test_every_config_goes_to_its_family_and_back") for file in (PUBLISHED, STACK_CONFIGS)],
    "import": [
        (PARITY, "test_sharded_and_fused_layouts_give_the_same_weights"),
        (STACKS, "test_sharded_layout_and_stored_copies_give_the_same_weights"),
    ],
    "export": [(file, "test_export_is_loaded_by_transformers_and_reimport_is_bit_equal") for file in (PARITY, STACKS)],
    "parity": [(file, "test_every_gradient") for file in (PARITY, STACKS)],
    "generate": [(file, "test_greedy_generation") for file in (PARITY, STACKS)],
    "train": [("tests/unit/test_training_families.py", "test_a_few_steps_lower_the_loss")],
    "expert parallel": [("tests/distributed/test_spread_families.py", "test_experts_of_every_family_are_spread")],
    "card": [
        (CARDS, "test_card_equals_the_model_of_transformers"),
        (CARDS, "test_card_equals_the_published_figures_to_the_printed_digits"),
        (STACK_CONFIGS, "test_card_equals_the_model_of_transformers"),
    ],
}
"""Column → (file, test), the best first: the test has the family, a model of it, or a case of it in brackets."""

WITHOUT_TRANSFORMERS = {
    "import": "test_logits",
    "export": "test_export_gives_back_the_published_directory",
    "parity": "test_every_gradient",
    "generate": "test_greedy_generation",
    "card": "test_published_size",
}
"""Column → test in tests/parity/test_FAMILY.py, for families that are compared with their equations written out."""


def collect() -> list[str]:
    """Ids of the tests that may stand in the table."""
    files = {file for tests in COLUMNS.values() for file, _ in tests} | {own_file(family) for family in families()}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", ""]
    present = sorted(file for file in files if (ROOT / file).is_file())
    done = subprocess.run([*command, *present], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: the tests cannot be collected:\n{done.stdout}{done.stderr}")
    return [line for line in done.stdout.splitlines() if "::" in line]


def families() -> dict[str, bool]:
    """Family → whether it has experts."""
    from zoo.registry import encoder_decoder_names, find_any_spec, model_names

    specs = [find_any_spec(name) for name in (*model_names(), *encoder_decoder_names())]
    return {s.family: any(o.model.moe for o in specs if o.family == s.family) for s in specs if s.family}


def own_file(family: str) -> str:
    return f"tests/parity/test_{family}.py"


def bracketed() -> dict[str, str]:
    """What stands in the brackets of a test → the family that it is about."""
    from zoo.families import ENCODER_DECODERS, FAMILIES
    from zoo.registry import encoder_decoder_names, find_any_spec, model_names

    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    import encoder_decoder_cases
    import hf_cases

    known = [*FAMILIES.values(), *ENCODER_DECODERS.values()]
    of_type = {family.model_type: family.name for family in known}
    models = {name: str(find_any_spec(name).family) for name in (*model_names(), *encoder_decoder_names())}
    cases = hf_cases.CASES | encoder_decoder_cases.CASES
    of_case = {case: of_type[fields["model_type"]] for case, fields in cases.items()}
    return models | of_case | {family.name: family.name for family in known}


def cells(ids: list[str]) -> dict[str, dict[str, str]]:
    """Family → column → id of the test; the first one that there is."""
    about = bracketed()
    found: dict[str, dict[str, str]] = {family: {} for family in families()}
    for column, tests in COLUMNS.items():
        for file, test in tests:
            for identity in ids:
                name, _, rest = identity.partition("[")
                family = about.get(rest.removesuffix("]"))
                if name == f"{file}::{test}" and family in found:
                    found[family].setdefault(column, identity)
    for family, row in found.items():
        for column, test in WITHOUT_TRANSFORMERS.items():
            identity = f"{own_file(family)}::{test}"
            if column not in row and identity in ids:
                row[column] = identity
    return found


def table(found: dict[str, dict[str, str]], sparse: dict[str, bool]) -> str:
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---|" + ":-:|" * len(COLUMNS)]
    for family in sorted(found, key=lambda name: (not sparse[name], name)):
        row = [_cell(found[family].get(column), column, sparse[family]) for column in COLUMNS]
        lines.append(f"| [{family}](../zoo/families/{family}.py) | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _cell(identity: str | None, column: str, sparse: bool) -> str:
    if identity is None:
        return "no experts" if column == "expert parallel" and not sparse else "–"
    file, _, test = identity.partition("::")
    return f'[yes](../{file} "{test}")'


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--json", action="store_true", help="print the cells as JSON, change nothing")
    args = parser.parse_args(argv)
    found = cells(collect())
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    right = before + BEGIN + "\n" + table(found, families()) + "\n" + END + after
    if args.check:
        if page != right:
            print(f"{PAGE.relative_to(ROOT)} is not what the tests say; run python scripts/families_table.py")
        return int(page != right)
    PAGE.write_text(right, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main(sys.argv[1:]))
