"""``zoo generate``: continue a prompt, text shown as it is made, or many prompts in batches."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.generation import Step
    from zoo.model import Decoder
    from zoo.prefix import Prefix
    from zoo.speculative import Acceptance
    from zoo.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Prompt:
    name: str
    """What an error calls it."""
    own: str
    """Its text without the prefix."""
    text: str
    ids: list[int]


@dataclass(frozen=True)
class _Continuation:
    prompt: _Prompt
    text: str
    tokens: list[int]
    tokens_per_second: float
    """New ones, of all prompts that were continued together."""
    acceptance: Acceptance | None
    """Of drafts, where there were any."""

    def as_json(self) -> str:
        drafts = self.acceptance and {"speculative": {**vars(self.acceptance), "acceptance_rate": self.acceptance.rate}}
        result = {
            "prompt": self.prompt.text,
            "text": self.text,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            **(drafts or {}),
        }
        return json.dumps(result, ensure_ascii=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Continue a prompt with a checkpoint. The text goes to standard output as it is made; tokens per second go to\n"
        "standard error at the end. Without --temperature, each token is the most probable one.\n"
        "Several prompts are continued together and printed in order; what all begin with is computed once."
    )
    parser.epilog = (
        "examples:\n"
        '  zoo generate checkpoints/mixtral-tiny --prompt "Once upon a time" --temperature 0.8 --top-p 0.95\n'
        "  zoo generate facts-mixtral --prompts questions.txt --prefix-file examples.txt --max-new-tokens 16 --json\n"
        '  zoo generate runs/deepseek-v3-mtp/final --prompt "Once upon a time" --speculative'
    )
    parser.add_argument("source", metavar="CKPT", help="checkpoint directory, hub id, or name from `zoo list`")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue; `-` reads standard input; may be given several times",
    )
    prompts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="texts to continue, one a line; of .jsonl and .ndjson the field `prompt` of every line",
    )
    beginning = parser.add_mutually_exclusive_group()
    beginning.add_argument("--prefix", default="", metavar="TEXT", help="text that every prompt begins with")
    beginning.add_argument("--prefix-file", type=Path, metavar="FILE", help="the same, all of a file")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="most prompts continued together (default 32)"
    )
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
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the step of a token first, with g++ (up to a minute; seconds the next time): twice the "
        "tokens/s of a small model on a CPU",
    )
    parser.add_argument("--device", metavar="DEVICE", help="such as cuda; the GPU by default if there is one")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print prompt, text, tokens and speed as JSON, an object a line for each prompt",
    )


def run(args: argparse.Namespace) -> int:
    from zoo.generation_checks import check_prompt
    from zoo.weights.loading import load_with_tokenizer

    if args.speculative and (args.temperature or args.top_k or args.top_p):
        raise ValueError("--speculative: its text is the greedy one; remove --temperature, --top-k and --top-p")
    if args.speculative and args.compile:
        raise ValueError("--compile: its step takes one token, and --speculative checks several; remove one")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: give a positive number of prompts")
    prefix = args.prefix if args.prefix_file is None else _text_of_file(args.prefix_file)
    texts = _texts(args.prompt) if args.prompts is None else list(_texts_of_file(args.prompts))
    if not texts:
        raise ValueError(f"--prompts {args.prompts}: the file holds no prompt; write one a line")
    model, tokenizer = load_with_tokenizer(args.source, dtype=args.dtype, device=args.device, progress=True)
    if args.quantize:
        from zoo.quantize import quantize

        quantize(model, args.quantize)
    prompts = []
    for name, own in texts:
        prompt = _Prompt(name, own, prefix + own, tokenizer.encode(prefix + own, bos=tokenizer.add_bos))
        check_prompt(model, prompt.ids, args.max_new_tokens, name)
        prompts.append(prompt)
    args.batch_size = 1 if args.speculative else min(args.batch_size, len(prompts))
    args.step = _step(model, args.compile, args.batch_size)
    (_show_one if args.prompts is None and len(prompts) == 1 else _show_many)(model, tokenizer, prompts, args)
    return 0


def _step(model: Decoder, compiled: bool, prompts: int) -> Step:
    """What computes each token after so many prompts at a time."""
    from zoo.generation import decode_step

    if not compiled:
        return decode_step
    from zoo.compiled import CompiledStep, most_prompts

    if prompts > (most := most_prompts(model)):
        note = f"--compile: experts this large are faster without where more than {most} prompts go together, as here"
        print(note, file=sys.stderr)
        return decode_step
    print("Compiling the step of a token ...", file=sys.stderr)
    return CompiledStep(model, several=prompts > 1)


def _texts(given: Sequence[str]) -> list[tuple[str, str]]:
    """(name, text) of every ``--prompt``."""
    if given.count("-") > 1:
        raise ValueError("--prompt - is given twice: standard input can be read once; give the other as text")
    names = ["--prompt"] if len(given) == 1 else [f"--prompt {number}" for number in range(1, len(given) + 1)]
    return [(name, sys.stdin.read() if text == "-" else text) for name, text in zip(names, given, strict=True)]


def _text_of_file(path: Path) -> str:
    """All of it, with the newline at its end where there is one."""
    from zoo.training.data.sources import read_text

    text = "".join(part for part, _ in read_text(path, None))
    if not text:
        raise ValueError(f"--prefix-file {path}: the file is empty; write what prompts begin with, or leave it out")
    return text


def _texts_of_file(path: Path) -> Iterator[tuple[str, str]]:
    """(file and line, text) of every line that is not blank."""
    from zoo.training.data.sources import JSONL_SUFFIXES, check_text, jsonl_rows, read_text

    if path.suffix.lower() not in JSONL_SUFFIXES:
        for number, (line, _) in enumerate(read_text(path, "\n"), start=1):
            if line.strip():
                yield f"{path}: line {number}", line.removesuffix("\r")
        return
    for where, row, _ in jsonl_rows(path, "the field 'prompt'"):
        if not isinstance(row.get("prompt"), str):
            raise ValueError(f"{where}: no text in the field 'prompt'; give the text to continue under that name")
        yield where, check_text(row["prompt"], "prompt", where)


def _show_one(model: Decoder, tokenizer: Tokenizer, prompts: Sequence[_Prompt], args: argparse.Namespace) -> None:
    """Continue the only prompt, its text printed as it is made."""

    def show(piece: str) -> None:
        if not args.json:
            print(piece, end="", flush=True)

    (made,) = _continued(model, tokenizer, prompts, args, args.seed, show=show)
    print(made.as_json() if args.json else "", flush=True)
    print(f"{len(prompts[0].ids)} + {_summary([made], made.tokens_per_second)}", file=sys.stderr)


def _show_many(model: Decoder, tokenizer: Tokenizer, prompts: Sequence[_Prompt], args: argparse.Namespace) -> None:
    """Continue the prompts batch by batch, in order, each printed when its batch is done."""
    from textwrap import shorten

    from tqdm import tqdm

    from zoo.prefix import shared_prefix

    start = time.perf_counter()
    prefix = None if args.speculative else shared_prefix(model, [prompt.ids for prompt in prompts])
    size = args.batch_size
    everything: list[_Continuation] = []
    with tqdm(total=len(prompts) * args.max_new_tokens, desc="Generating", unit="token", delay=2, disable=None) as bar:
        for number, first in enumerate(range(0, len(prompts), size)):
            batch = prompts[first : first + size]
            seed = None if args.seed is None else args.seed + number  # equal prompts of two batches draw for themselves
            for made in _continued(model, tokenizer, batch, args, seed, prefix, show=lambda _: bar.update()):
                everything.append(made)
                title = f"[{len(everything)}] {shorten(made.prompt.own, 72)}"
                bar.write(made.as_json() if args.json else f"{title}\n{made.text}\n", file=sys.stdout)
                bar.update(len(everything) * args.max_new_tokens - bar.n)  # some end before
            sys.stdout.flush()
    count = sum(len(made.tokens) for made in everything)
    summary = _summary(everything, count / (time.perf_counter() - start))
    once = "" if prefix is None else f" (the first {len(prefix.tokens)} of each computed once)"
    print(f"{len(prompts)} prompts: {sum(len(prompt.ids) for prompt in prompts)}{once} + {summary}", file=sys.stderr)


def _continued(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[_Prompt],
    args: argparse.Namespace,
    seed: int | None,
    prefix: Prefix | None = None,
    *,
    show: Callable[[str], object],
) -> list[_Continuation]:
    """Continue ``prompts`` together; ``show`` is given the text that each new token completes."""
    from zoo.generation import TextStream
    from zoo.speculative import Acceptance

    acceptance = Acceptance() if args.speculative else None
    streams = [TextStream(tokenizer, prompt.ids) for prompt in prompts]
    pieces: list[list[str]] = [[] for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    start = time.perf_counter()
    for row, token in _tokens(
        model, [prompt.ids for prompt in prompts], args, tokenizer.eos_id, seed, prefix, acceptance
    ):
        tokens[row].append(token)
        pieces[row].append(streams[row].push(token))
        show(pieces[row][-1])
    speed = sum(map(len, tokens)) / (time.perf_counter() - start)
    for text, parts in zip(streams, pieces, strict=True):
        parts.append(text.flush())
        show(parts[-1])
    texts = ["".join(parts) for parts in pieces]
    return [_Continuation(*made, speed, acceptance) for made in zip(prompts, texts, tokens, strict=True)]


def _tokens(
    model: Decoder,
    prompts: Sequence[list[int]],
    args: argparse.Namespace,
    eos_id: int | None,
    seed: int | None,
    prefix: Prefix | None,
    acceptance: Acceptance | None,
) -> Iterator[tuple[int, int]]:
    """(number of the prompt, new token) as they are made; with ``acceptance`` by drafts."""
    from zoo.generation import stream
    from zoo.speculative import speculate

    limits = {"max_new_tokens": args.max_new_tokens, "eos_id": eos_id}
    if acceptance is None:
        sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": seed}
        yield from stream(model, prompts, prefix=prefix, step=args.step, **limits, **sampling)
        return
    for row, prompt in enumerate(prompts):
        for token in speculate(model, prompt, acceptance=acceptance, **limits):
            yield row, token


def _summary(everything: Sequence[_Continuation], speed: float) -> str:
    """Number of new tokens, their speed, and how many drafts were accepted."""
    text = f"{sum(len(made.tokens) for made in everything)} tokens, {speed:.1f} new tokens/s"
    counts = [made.acceptance for made in everything if made.acceptance]
    if not counts:
        return text
    drafted = sum(count.drafted for count in counts)
    return f"{text}, {sum(count.accepted for count in counts) / max(drafted, 1):.0%} of {drafted} drafts accepted"
