"""Fixtures that every test may use. Threads and network are fixed here, once, before anything imports torch."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

# One thread a process: tests run side by side, and results on CPU must not depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# With AMX oneDNN would round products of fp32, and none would be left to it: tests are of a CPU without.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
# No test may reach a hub: what a test needs is in the repository, made by the test, or in `shared_data`.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Register what ``scripts/test`` selects by what the machine has."""
    config.addinivalue_line("markers", "browser: needs Chromium or Chrome")


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets, tokenizers and small trained weights that stand beside the checkout."""
    directory = REPOSITORY.parent / "shared" / "data"
    if not directory.is_dir():
        pytest.skip(f"real data is not at {directory}")
    return directory


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same state of torch's generator, whatever ran before it."""
    torch.manual_seed(0)


LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


@pytest.fixture(autouse=True)
def unlaunched() -> Iterator[None]:
    """Forget which rank a test made of this process: a later ``zoo fit`` would wait for others to be started."""
    before = {name: os.environ.get(name) for name in LAUNCHED}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def token_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory of short documents, so that labels are missing in every window, and 300 pieces."""
    from zoo.training.data.builder import build
    from zoo.training.data.sources import Source
    from zoo.training.data.tokenizer_training import train_tokenizer

    directory = tmp_path_factory.mktemp("token_data")
    words = ("the", "a", "red", "blue", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "big", "small", "was")
    draw = random.Random(0)
    documents = [" ".join(draw.choices(words, k=draw.randint(5, 40))) for _ in range(400)]
    (directory / "text.txt").write_text("\n".join(documents), encoding="utf-8")
    source = Source(str(directory / "text.txt"), separator="\n")
    tokenizer = train_tokenizer([source], 300, directory / "tokenizer")
    build([source], tokenizer, directory / "data", validation_fraction=0.05)
    return directory / "data"


@pytest.fixture
def fit_config(tmp_path: Path, token_data: Path) -> Path:
    """A config for ``zoo fit``: 24 quick steps in ``tmp_path / "run"``, a selection bias and both balance losses."""
    path = tmp_path / "fit.yaml"
    path.write_text(
        f"""\
model:
  name: deepseek-v3-tiny
  overrides:
    vocab_size: 300
    hidden_size: 32
    num_layers: 2
    intermediate_size: 64
    mla: {{num_heads: 2, kv_lora_rank: 16, q_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8}}
    moe: {{num_experts: 8, moe_intermediate_size: 16}}
  load_balance_coef: 0.01
  z_loss_coef: 0.001
  bias_update_rate: 0.001
  optimizer: {{lr: 3.0e-3}}
  schedule: {{warmup_steps: 4}}
data: {{data_dir: {token_data}, sequence_length: 48, batch_size: 4}}
trainer:
  default_root_dir: {tmp_path / "run"}
  accelerator: cpu
  max_steps: 24
  log_every_n_steps: 1
  val_check_interval: 12
checkpoint: {{every_n_steps: 5}}
""",
        encoding="utf-8",
    )
    return path
