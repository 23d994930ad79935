"""``zoo generate``: continue a prompt, text shown as it is made."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.model import Decoder
    from zoo.speculative import Acceptance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Continue a prompt with a checkpoint. The text goes to standard output as it is made; tokens per second go to\n"
        "standard error at the end. Without --temperature, each token is the most probable one."
    )
    parser.epilog = (
        "examples:\n"
        '  zoo generate checkpoints/mixtral-tiny --prompt "Once upon a time" --temperature 0.8 --top-p 0.95\n'
        '  zoo generate runs/deepseek-v3-mtp/final --prompt "Once upon a time" --speculative'
    )
    parser.add_argument("source", metavar="CKPT", help="checkpoint directory, hub id, or name from `zoo list`")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue; `-` reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="most new tokens (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="above 0 to sample (default 0)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the most probable tokens that sum to P")
    parser.add_argument(
        "--speculative",
        action="store_true",
        help="let the model's MTP modules draft tokens and the model check them: the greedy text in fewer passes",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling; a new one each time by default")
    parser.add_argument(
        "--dtype",
        default="float32",
        help="torch dtype of the weights (default float32), or `auto`: bfloat16 where it is native",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8", "int8-dynamic", "int4"),
        help="hold FFNs and experts in 8 or 4 bits, for a CPU; int8-dynamic rounds what enters them as well",
    )
    parser.add_argument("--device", metavar="DEVICE", help="such as cuda; the GPU by default if there is one")
    parser.add_argument("--json", action="store_true", help="print prompt, text, tokens and speed as JSON")


def run(args: argparse.Namespace) -> int:
    import json
    import sys
    import time

    from zoo.generation import TextStream
    from zoo.speculative import Acceptance
    from zoo.weights.loading import load_with_tokenizer

    if args.speculative and (args.temperature or args.top_k or args.top_p):
        raise ValueError("--speculative: its text is the greedy one; remove --temperature, --top-k and --top-p")
    model, tokenizer = load_with_tokenizer(args.source, dtype=args.dtype, device=args.device, progress=True)
    if args.quantize:
        from zoo.quantize import quantize

        quantize(model, args.quantize)
    prompt_text = sys.stdin.read() if args.prompt == "-" else args.prompt
    prompt = tokenizer.encode(prompt_text, bos=tokenizer.add_bos)
    text, acceptance = TextStream(tokenizer, prompt), Acceptance()
    pieces: list[str] = []
    tokens: list[int] = []
    start = time.perf_counter()
    for token in _tokens(model, prompt, args, tokenizer.eos_id, acceptance):
        tokens.append(token)
        pieces.append(text.push(token))
        if not args.json:
            print(pieces[-1], end="", flush=True)
    seconds = time.perf_counter() - start
    pieces.append(text.flush())
    speed = len(tokens) / seconds
    if args.json:
        result = {
            "prompt": prompt_text,
            "text": "".join(pieces),
            "tokens": tokens,
            "tokens_per_second": speed,
            **({"speculative": {**vars(acceptance), "acceptance_rate": acceptance.rate}} if args.speculative else {}),
        }
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(pieces[-1], flush=True)
    drafts = f", {acceptance.rate:.0%} of {acceptance.drafted} drafts accepted" if args.speculative else ""
    print(f"{len(prompt)} + {len(tokens)} tokens, {speed:.1f} new tokens/s{drafts}", file=sys.stderr)
    return 0


def _tokens(
    model: Decoder, prompt: list[int], args: argparse.Namespace, eos_id: int | None, acceptance: Acceptance
) -> Iterator[int]:
    from zoo.generation import stream
    from zoo.speculative import speculate

    if args.speculative:
        yield from speculate(model, prompt, max_new_tokens=args.max_new_tokens, eos_id=eos_id, acceptance=acceptance)
        return
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    for _, token in stream(model, [prompt], max_new_tokens=args.max_new_tokens, eos_id=eos_id, **sampling):
        yield token
