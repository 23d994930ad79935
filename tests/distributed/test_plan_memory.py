"""The fullest moment of a real step on every rank, against the planner's figure.

The sizes are such that parameters, their gathered copies, unreduced gradients and activations all count.
"""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from layouts import LAYOUTS, MODELS, Layout
from live_bytes import LiveBytes, fused_norms
from pool import Pools

from zoo.config import ModelConfig
from zoo.model import Decoder
from zoo.moe.dispatch import LocalDispatcher
from zoo.parallel import init
from zoo.parallel.apply import ParallelOptions, moe_layers, parallelize
from zoo.parallel.estimate import Setting, Workload
from zoo.parallel.footprint import Precision, Recompute, holdings, resolve_units
from zoo.parallel.grads import set_last_micro_batch
from zoo.parallel.hardware import find_gpu
from zoo.parallel.memory import peak_memory
from zoo.parallel.mesh import MeshSizes, build_meshes
from zoo.parallel.plan import load_plan

SIZES = {"hidden_size": 64, "num_layers": 4, "intermediate_size": 160, "initializer_range": 0.01}
EXPERTS = {
    "mixtral": {"num_experts": 8, "moe_intermediate_size": 96},
    "deepseek-v3": {"num_experts": 16, "moe_intermediate_size": 48},
    "qwen2": {"num_experts": 12, "moe_intermediate_size": 48},
}
LENGTH = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    model: str
    layout: str
    precision: Precision = "32-true"
    recompute: Recompute = "none"
    reshard: bool = True
    reduce_each: bool = False
    micro_batches: int = 1
    rows: int = 8
    vocab_size: int = 64

    @property
    def config(self) -> ModelConfig:
        """Wide enough for routers that are close to balanced, and heads that the CPU has a flash kernel for."""
        config = dataclasses.replace(MODELS[self.model], vocab_size=self.vocab_size, **SIZES)
        if config.mla is not None:
            size = config.mla.qk_nope_head_dim + config.mla.qk_rope_head_dim
            config = dataclasses.replace(config, mla=dataclasses.replace(config.mla, v_head_dim=size))
        if config.moe is None:
            return config
        return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **EXPERTS[self.model]))

    @property
    def sizes(self) -> MeshSizes:
        """Of the layout."""
        layout = LAYOUTS[self.layout]
        plan = load_plan(layout.plan)
        return plan.sizes(layout.world, tensor=layout.tensor, expert=layout.expert, replicate=layout.replicate)


def peak_of_two_steps(case: Case, layout: Layout) -> int:
    """Bytes on this rank: the second step finds the optimizer's moments and the gradients of the first."""
    meshes = build_meshes("cpu", case.sizes)
    with torch.device("meta"):
        model = Decoder(case.config)
    options = ParallelOptions(
        param_dtype=None if case.precision == "32-true" else torch.bfloat16,
        recompute=case.recompute,
        reshard_after_forward=case.reshard,
    )
    parallelize(model, meshes, load_plan(layout.plan), options)
    for _, moe in moe_layers(model):  # rows are sorted and kept, as on a GPU; the CPU's own way keeps fewer
        moe.dispatcher = moe.dispatcher or LocalDispatcher()
    model.to_empty(device="cpu")
    init.initialize(model, seed=1)
    generator = torch.Generator().manual_seed(meshes.data.get_local_rank())
    ids = torch.randint(case.vocab_size, (case.rows, LENGTH), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    gc.collect()
    live = LiveBytes()
    for tensor in (*model.parameters(), *model.buffers()):
        live.watch(tensor)
    with live, fused_norms():
        for _ in range(2):
            for micro in range(case.micro_batches):
                set_last_micro_batch(model, case.reduce_each or micro == case.micro_batches - 1)
                loss = model.nll(model(ids, logits_to_keep=None).hidden, ids.roll(-1, 1))
                if micro == 0:  # when Lightning does
                    optimizer.zero_grad()
                loss.backward()
            optimizer.step()
    return live.peak


CASES = [
    Case("mixtral", "dp2", rows=4, vocab_size=512),
    Case("mixtral", "fsdp2"),
    Case("deepseek-v3", "fsdp2", "bf16-mixed", "block", rows=4, vocab_size=512),
    Case("mixtral", "ep2", recompute="experts"),
    Case("qwen2", "ep2", "bf16-mixed", rows=4, vocab_size=512),
    Case("deepseek-v3", "fsdp2_ep2", recompute="block"),
    Case("mixtral", "fsdp2_ep2", micro_batches=2, rows=4),
    Case("deepseek-v3", "fsdp2_ep2", "bf16-mixed", reduce_each=True, micro_batches=2, rows=4),
    Case("mixtral", "tp2_ep2", "bf16-mixed", micro_batches=2, rows=4),
    Case("deepseek-v3", "tp2_ep2", reshard=False, rows=4, vocab_size=512),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.layout}-{case.precision}")
def test_peak_of_a_step(pools: Pools, case: Case) -> None:
    layout, config, sizes = LAYOUTS[case.layout], case.config, case.sizes
    measured = max(pools[layout.world].run(peak_of_two_steps, case, layout))
    units, _ = resolve_units(config, load_plan(layout.plan), case.precision)
    work = Workload(
        config=config,
        gpu=find_gpu("h100"),
        gpus=layout.world,
        sequence_length=LENGTH,
        global_batch=case.rows * case.micro_batches * sizes.data,
        precision=case.precision,
    )
    setting = Setting(case.rows, case.micro_batches, case.recompute, case.reshard, case.reduce_each)
    memory = peak_memory(work, sizes, holdings(config, units, sizes, case.precision), setting)
    total = sum(memory.values())
    assert total == pytest.approx(measured, rel=0.1)
    assert memory["parameters"] + memory["gradients"] + memory["optimizer"] < 0.7 * total
    assert memory["activations"] > 0.15 * total
