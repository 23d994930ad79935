"""``zoo export``: checkpoints go back into the layout that their family is published in, adapters into that of PEFT."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.finetune.peft import PeftExport
    from zoo.weights.convert import Conversion

EXAMPLE = """example:
  zoo export checkpoints/mixtral-tiny exported/mixtral-tiny
  python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('exported/mixtral-tiny')"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Convert a zoo checkpoint into config.json and safetensors that transformers loads, or an adapter directory of "
        "`zoo fit` into one that peft loads."
    )
    parser.epilog = EXAMPLE
    parser.add_argument("source", metavar="CKPT", help="zoo checkpoint directory, or adapter directory")
    parser.add_argument("out", metavar="HFDIR", help="directory to make; it must not exist")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the parameters (default: as they are stored)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from zoo.config import CONFIG_FILE
    from zoo.weights.target import ADAPTER_FILE

    source = Path(args.source)
    result: PeftExport | Conversion
    if (source / ADAPTER_FILE).is_file() and not (source / CONFIG_FILE).is_file():
        from zoo.finetune.peft import export_peft

        if args.dtype:
            raise ValueError(f"--dtype {args.dtype}: adapters are exported as they are stored; leave it out")
        result = export_peft(source, args.out)
    else:
        import torch

        from zoo.weights.convert import export_checkpoint

        dtype = getattr(torch, args.dtype) if args.dtype else None
        result = export_checkpoint(source, args.out, dtype=dtype, progress=not args.json)
    print(result.as_json() if args.json else result.as_text())
    return 0
