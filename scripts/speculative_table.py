"""Greedy decoding of a trained model with MTP modules, with and without its own drafts: same text, passes, time.

Each prompt is continued by both ways in turn, by ``--rounds`` rounds; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from zoo.generation import generate
from zoo.model import Decoder
from zoo.speculative import Acceptance, speculate
from zoo.weights.loading import load_with_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: scripts/speculative_table.py runs/deepseek-v3-mtp/final --text corpus.txt",
    )
    parser.add_argument("checkpoint", type=Path, help="a model with MTP modules and its tokenizer")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="prompts are begun with its lines")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="lines taken, spread evenly (default 8)")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_with_tokenizer(str(args.checkpoint))
    lines = [line for line in args.text.read_text(encoding="utf-8").splitlines() if len(line.split()) >= 20]
    texts = [" ".join(line.split()[:10]) for line in lines[:: max(1, len(lines) // args.prompts)][: args.prompts]]
    found = measure(model, [tokenizer.encode(text, bos=True) for text in texts], args.max_new_tokens, args.rounds)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print(
            f"{found['tokens']} tokens in {found['passes']} passes: {found['tokens_per_pass']:.2f} a pass, "
            f"{found['acceptance_rate']:.0%} of {found['drafted']} drafts accepted, "
            f"{found['speed_up']:.2f} times as fast as without; the same text"
        )


def measure(model: Decoder, prompts: list[list[int]], new_tokens: int, rounds: int) -> dict[str, float]:
    """Continue every prompt by both ways.

    Raises:
        SystemExit: the texts differ.
    """
    counts = Acceptance()
    plain = [generate(model, [prompt], max_new_tokens=new_tokens)[0] for prompt in prompts]
    drafted = [list(speculate(model, prompt, max_new_tokens=new_tokens, acceptance=counts)) for prompt in prompts]
    if plain != drafted:
        sys.exit("speculative decoding gave another text than greedy decoding")

    def with_drafts() -> None:
        for prompt in prompts:
            list(speculate(model, prompt, max_new_tokens=new_tokens))

    def without() -> None:
        for prompt in prompts:
            generate(model, [prompt], max_new_tokens=new_tokens)

    times = [(seconds(without), seconds(with_drafts)) for _ in range(rounds)]
    tokens, passes = sum(map(len, drafted)), counts.passes + len(prompts)  # the prompt's own pass gives the first token
    return {
        "tokens": tokens,
        "passes": passes,
        "tokens_per_pass": tokens / passes,
        "drafted": counts.drafted,
        "acceptance_rate": counts.rate,
        "greedy_seconds": statistics.median(a for a, _ in times),
        "speculative_seconds": statistics.median(b for _, b in times),
        "speed_up": statistics.median(a / b for a, b in times),
    }


def seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
