"""The table of docs/finetuning.md: every strategy on a small trained model, dense and upcycled to 8 experts.

    OMP_NUM_THREADS=2 python scripts/finetuning_table.py            # measure, and write the table; about 5 minutes
    python scripts/finetuning_table.py --steps 2 --out /dev/stdout  # try it

Each strategy is a run of `zoo fit` from the same weights on the same tokens. Losses are of held-out text. Memory is
counted apart from it, allocation by allocation: the most that two optimizer steps hold beyond the model's weights.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from zoo.bench.memory import Peak
from zoo.bench.results import processor
from zoo.config import from_dict
from zoo.finetune.apply import apply
from zoo.finetune.config import FinetuneConfig
from zoo.model import Decoder
from zoo.registry import find_spec
from zoo.tokenizer import Tokenizer
from zoo.training.data import TokenDataModule
from zoo.training.data.builder import build
from zoo.training.data.sources import Source
from zoo.training.fit import fit
from zoo.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer
from zoo.upcycle import derive, upcycle
from zoo.weights import load

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "finetuning.md"
BEGIN, END = "<!-- table: scripts/finetuning_table.py -->\n", "<!-- end of table -->\n"
DATA = ROOT.parent / "shared" / "data"

IN_FULL, ADAPTED, PREFIXED = 1e-3, 5e-3, 2e-2
"""Peak learning rates: an adapter begins at nothing, and small rates leave it there."""

ADAPTERS: list[tuple[dict[str, Any], float]] = [
    ({"lora": {"targets": ["attention"], "rank": 8}}, ADAPTED),
    ({"lora": {"targets": ["ffn"], "rank": 8}}, ADAPTED),
    ({"lora": {"targets": ["ffn"], "rank": 8, "rslora": True}}, ADAPTED),
    ({"lora": {"targets": ["ffn"], "rank": 8, "dora": True}}, ADAPTED),
    ({"molora": {"num_experts": 4, "rank": 4}}, ADAPTED),
    ({"prefix": {"length": 16}}, PREFIXED),
]
STRATEGIES: dict[str, list[tuple[dict[str, Any], float]]] = {
    "dense": [({}, IN_FULL), ({"train": ["dense_ffn"]}, IN_FULL), ({"train": ["attention"]}, IN_FULL), *ADAPTERS],
    "8 experts": [
        ({}, IN_FULL),
        ({"freeze": ["experts"]}, IN_FULL),
        ({"train": ["experts"]}, IN_FULL),
        ({"freeze": ["router"]}, IN_FULL),
        ({"train": ["router"]}, IN_FULL),
        *ADAPTERS,
    ],
}
"""Model → (``finetune:`` section, learning rate) of every row."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One strategy of one model."""

    section: dict[str, Any]
    trained: int
    parameters: int
    state: int
    """Bytes of the optimizer's state, which stay from step to step."""
    peak: int
    """Bytes at the peak of a step, beyond the weights."""
    loss: float
    """Nats a held-out token."""


def fine_tune(
    base: Path, section: dict[str, Any], lr: float, data: Path, run: Path, options: argparse.Namespace
) -> Path:
    """Train with ``zoo fit``; the directory of the trained checkpoint."""
    run.mkdir()
    config = {
        "model": {"name": str(base), "optimizer": {"lr": lr}, "schedule": {"warmup_steps": options.steps // 10}},
        "finetune": section,
        "data": {"data_dir": str(data), "sequence_length": options.sequence, "batch_size": options.batch},
        "trainer": {
            "default_root_dir": str(run / "run"),
            "accelerator": "cpu",
            "max_steps": options.steps,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
        },
    }
    (run / "fit.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    with contextlib.redirect_stdout(io.StringIO()):
        fit(["--config", str(run / "fit.yaml")])
    return run / "run" / "final"


@torch.no_grad()
def held_out_loss(model: Decoder, data: TokenDataModule, batches: int) -> float:
    """Mean −ln p of the first held-out batches."""
    nll, labels = 0.0, 0
    loader = data.val_dataloader()
    assert not isinstance(loader, list)
    for _, batch in zip(range(batches), loader, strict=False):
        hidden = model(batch["input_ids"], document_ids=batch["document_ids"], logits_to_keep=None).hidden
        nll += float(model.nll(hidden, batch["labels"]))
        labels += int((batch["labels"] != -100).sum())
    return nll / labels


def memory(base: Path, section: dict[str, Any], data: TokenDataModule) -> tuple[int, int, int, int]:
    """(trained parameters, all parameters, bytes of optimizer state, peak bytes) of two steps."""
    model = load(base).train()
    batch = next(iter(data.train_dataloader()))
    with Peak() as peak:
        rows = apply(model, from_dict(FinetuneConfig, section, "finetune"))
        adamw, _ = build_optimizer(model, OptimizerConfig(), ScheduleConfig(), 2)
        for _ in range(2):
            hidden = model(batch["input_ids"], document_ids=batch["document_ids"], logits_to_keep=None).hidden
            model.nll(hidden, batch["labels"]).backward()
            adamw.step()
            adamw.zero_grad()
    state = sum(t.nbytes for moments in adamw.state.values() for t in moments.values())
    _, trained, parameters = rows[-1]
    return trained, parameters, state, peak.bytes


def table(rows: dict[str, list[Row]], before: float, options: argparse.Namespace) -> str:
    """All that stands between the markers of the page."""
    today = datetime.now(UTC).date().isoformat()
    sequences = f"{options.batch} sequences of {options.sequence} tokens"
    lines = [
        f"{today}, {processor()}, {torch.get_num_threads()} threads: {options.steps} steps of {sequences} of",
        f"`{options.text.name}`. Before fine-tuning the held-out loss of both models is {before:.3f}.",
        "",
        "| model | `finetune:` | trained | of | optimizer state | peak beyond the weights | held-out loss |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, of_model in rows.items():
        for row in of_model:
            section = json.dumps(row.section).replace('"', "") if row.section else "{} (full)"
            lines.append(
                f"| {name} | `{section}` | {row.trained:,} | {row.parameters:,} | {row.state / 2**20:.2f} MiB "
                f"| {row.peak / 2**20:.1f} MiB | {row.loss:.3f} |"
            )
    return "\n".join(lines) + "\n"


def measure(options: argparse.Namespace, place: Path) -> str:
    """Train and measure every row in the directory ``place``; the table."""
    dense, sparse = options.model, place / "8-experts"
    upcycle(dense, derive(find_spec(dense), experts=8, top_k=2), sparse)
    tokenizer = Tokenizer.load(dense)
    build([Source(str(options.text), separator="\n")], tokenizer, place / "data", validation_fraction=0.05)
    data = TokenDataModule(place / "data", options.sequence, options.batch)
    bases = {"dense": dense, "8 experts": sparse}
    losses = [held_out_loss(load(base), data, options.batches) for base in bases.values()]
    assert abs(losses[0] - losses[1]) < 1e-4, f"the upcycled model begins elsewhere: {losses}"
    work = [(name, section, lr) for name, of_model in STRATEGIES.items() for section, lr in of_model]
    rows: dict[str, list[Row]] = {name: [] for name in bases}
    for i, (name, section, lr) in enumerate(track(work, "fine-tuning", console=Console(stderr=True))):
        final = fine_tune(bases[name], section, lr, place / "data", place / f"run-{i}", options)
        row = Row(section, *memory(bases[name], section, data), held_out_loss(load(final), data, options.batches))
        rows[name].append(row)
    return table(rows, losses[0], options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DATA / "models" / "stories260K_hf", help="dense checkpoint")
    parser.add_argument("--text", type=Path, default=DATA / "text" / "jane_austen.txt", help="to fine-tune on")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each run")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--sequence", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--batches", type=int, default=16, help="held-out batches")
    parser.add_argument("--out", type=Path, default=PAGE, help="page to write the table into, or a file for it alone")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        text = measure(options, Path(place))
    if options.out == PAGE:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        text = before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1]
    options.out.write_text(text, encoding="utf-8")
    print(f"{time.monotonic() - start:.0f} s; written to {options.out}")


if __name__ == "__main__":
    main()
