"""Generation from prompts that share their beginning, beside prompts of the same lengths that share nothing.

Both ways take turns, by ``--rounds`` rounds; a ratio is the median of the rounds' ratios. Weights are fresh ones.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from functools import partial

import torch

from zoo.bench.timing import interleaved
from zoo.generation import generate
from zoo.model import Decoder, build
from zoo.prefix import compute_prefix
from zoo.registry import find_spec


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: scripts/prefix_table.py mixtral-tiny deepseek-v3-tiny",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names from `zoo list`")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="continued together (default 8)")
    parser.add_argument("--shared", type=int, default=256, metavar="N", help="tokens that all begin with (default 256)")
    parser.add_argument("--own", type=int, default=16, metavar="N", help="tokens of each behind them (default 16)")
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {name: measure(build(find_spec(name).model).eval(), args) for name in args.models}
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for name, ratios in found.items():
        print(f"{name}: {ratios['shared']:.2f} times as fast; {ratios['kept']:.2f} with the prefix of an earlier call")


def measure(model: Decoder, args: argparse.Namespace) -> dict[str, float]:
    """Ratios of the time without a shared beginning to that with one, computed in the call or before it.

    Raises:
        SystemExit: a shared beginning changes what is generated.
    """
    draw = random.Random(0)
    vocabulary = range(model.config.vocab_size)
    beginning = draw.choices(vocabulary, k=args.shared)
    sharing = [beginning + draw.choices(vocabulary, k=args.own) for _ in range(args.prompts)]
    apart = [draw.choices(vocabulary, k=args.shared + args.own) for _ in range(args.prompts)]
    proceed = partial(generate, model, max_new_tokens=args.max_new_tokens)
    if proceed(sharing) != [proceed([prompt])[0] for prompt in sharing]:
        sys.exit("sharing the beginning gave another text than each prompt alone")
    ways = {"apart": partial(proceed, apart), "shared": partial(proceed, sharing)}
    ways["kept"] = partial(proceed, sharing, prefix=compute_prefix(model, beginning))
    seconds = interleaved(ways, args.rounds)
    return {
        name: statistics.median(a / b for a, b in zip(seconds["apart"], seconds[name], strict=True))
        for name in ("shared", "kept")
    }


if __name__ == "__main__":
    main()
