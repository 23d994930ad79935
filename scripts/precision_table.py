"""What lower precision costs and saves on a CPU: a model in fp32, bf16, int8, int8-dynamic and int4 on one text.

Each way predicts every token of the same windows of the text, and is held against fp32: perplexity, the share of
positions whose most probable token is the same, the divergence KL(fp32 | way) and the mean difference of logits. Then
each continues the beginning of the first window, and reads all of it, by ``--rounds`` rounds in turn; a ratio is the
median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from zoo.generation import generate
from zoo.model import Decoder
from zoo.quantize import KINDS, held_bytes, quantize
from zoo.weights.loading import load_with_tokenizer

EXACT, PROMPT = "fp32", 16
COLUMNS = {
    "weights": "{weight_bytes:,}",
    "of fp32": "{share:.2f}",
    "perplexity": "{perplexity:.2f}",
    "change": "{change:+.2%}",
    "same token": "{agreement:.2%}",
    "KL, nats": "{kl:.1e}",
    "Δ logit": "{logit_difference:.4f}",
    "new tokens/s": "{new_tokens_per_second:.0f}",
    "to fp32": "{new_tokens_ratio:.2f}",
    "read tokens/s": "{read_tokens_per_second:.0f}",
    "to fp32 ": "{read_tokens_ratio:.2f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: scripts/precision_table.py runs/mixtral/final --text corpus.txt",
    )
    parser.add_argument("checkpoint", type=Path, help="a model and its tokenizer")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--windows", type=int, default=64, metavar="N", help="taken, spread evenly (default 64)")
    parser.add_argument("--length", type=int, default=256, metavar="S", help="tokens of a window (default 256)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of a timing (default 64)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {}
    for way in (EXACT, "bf16", *KINDS):
        dtype = "bfloat16" if way == "bf16" else "float32"
        models[way], tokenizer = load_with_tokenizer(str(args.checkpoint), dtype=dtype, device="cpu")
        if way in KINDS:
            quantize(models[way], way)
    ids = torch.tensor(tokenizer.encode(args.text.read_text(encoding="utf-8")))
    if len(ids) < args.windows * (args.length + 1):
        sys.exit(f"{args.text}: {len(ids)} tokens are less than {args.windows} windows of {args.length}; give fewer")
    windows = ids.unfold(0, args.length + 1, len(ids) // args.windows)[: args.windows]
    found = losses(models, windows)
    for way, speed in speeds(models, windows[0], args.max_new_tokens, args.rounds).items():
        found[way] |= speed
    print(json.dumps(found, indent=1) if args.json else table(found))


@torch.inference_mode()
def losses(models: Mapping[str, Decoder], windows: Tensor) -> dict[str, dict[str, float]]:
    """Of every model over ``windows`` [N, S + 1]."""
    sums = {way: torch.zeros(4, dtype=torch.float64) for way in models}
    for window in tqdm(windows, desc="windows"):
        exact = models[EXACT](window[None, :-1]).logits[0].float()
        for way, model in models.items():
            logits = exact if way == EXACT else model(window[None, :-1]).logits[0].float()
            nll = F.cross_entropy(logits, window[1:])
            same = (logits.argmax(-1) == exact.argmax(-1)).float().mean()
            pair = (logits.log_softmax(-1), exact.log_softmax(-1))
            kl = F.kl_div(*pair, reduction="batchmean", log_target=True)
            sums[way] += torch.stack((nll, same, kl, (logits - exact).abs().mean())) / len(windows)
    return {
        way: {
            "weight_bytes": held_bytes(models[way]),
            "share": held_bytes(models[way]) / held_bytes(models[EXACT]),
            "perplexity": math.exp(float(nll)),
            "change": math.exp(float(nll - sums[EXACT][0])) - 1,
            "agreement": float(same),
            "kl": float(kl),
            "logit_difference": float(difference),
        }
        for way, (nll, same, kl, difference) in sums.items()
    }


def speeds(models: Mapping[str, Decoder], window: Tensor, new_tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Tokens per second of every model: continuing the first tokens of ``window`` [S + 1], and reading all of it."""
    prompt = window[:PROMPT].tolist()
    ways = {way: partial(generate, model, [prompt], max_new_tokens=new_tokens) for way, model in models.items()}
    made = taken(ways, rounds)
    with torch.inference_mode():
        read = taken({way: partial(model, window[None]) for way, model in models.items()}, rounds)
    found: dict[str, dict[str, float]] = {way: {} for way in models}
    for name, count, times in (("new_tokens", new_tokens, made), ("read_tokens", len(window), read)):
        for way, seconds in times.items():
            found[way][f"{name}_per_second"] = count / statistics.median(seconds)
            pairs = zip(times[EXACT], seconds, strict=True)
            found[way][f"{name}_ratio"] = statistics.median(exact / own for exact, own in pairs)
    return found


def taken(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way, in turn in each round, after one that does not count."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, call in ways.items():
            began = time.perf_counter()
            call()
            if number:
                times[way].append(time.perf_counter() - began)
    return times


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown."""
    lines = [["", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
    lines += [[way, *(form.format(**values) for form in COLUMNS.values())] for way, values in found.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
