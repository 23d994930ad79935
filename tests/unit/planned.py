"""What the planner's tests plan."""

from __future__ import annotations

import dataclasses

from zoo.config import ModelConfig
from zoo.parallel.estimate import Workload
from zoo.parallel.footprint import Units, resolve_units
from zoo.parallel.hardware import find_gpu
from zoo.parallel.plan import load_plan
from zoo.registry import find_spec


def model_of(name: str) -> ModelConfig:
    """Without MTP modules, which are not planned."""
    return dataclasses.replace(find_spec(name).model, mtp_depth=0)


MIXTRAL, DEEPSEEK = model_of("mixtral-8x7b"), model_of("deepseek-v3")
H100 = find_gpu("h100")


def units_of(name: str, plan: str) -> Units:
    return resolve_units(model_of(name), load_plan(plan), "bf16-mixed")[0]


MIXTRAL_UNITS, DEEPSEEK_UNITS = units_of("mixtral-8x7b", "tp_ep_fsdp"), units_of("deepseek-v3", "tp_ep_fsdp")


def work(name: str = "mixtral-8x7b", gpus: int = 64, batch: int = 64, length: int = 4096) -> Workload:
    config = model_of(name)
    return Workload(config=config, gpu=H100, gpus=gpus, sequence_length=length, global_batch=batch)
