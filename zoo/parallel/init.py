"""The same weights for every layout: those of ``zoo.model.initialize`` on one process."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from zoo.model import Decoder, initial_values
from zoo.parallel.torch_private import local_slices


@torch.no_grad()
def initialize(model: Decoder, seed: int) -> None:
    """Fill this rank's part of every parameter and buffer of a parallelized ``model``, without communication.

    Every value depends on (seed, parameter name, expert index) only: the whole matrix is drawn and the local slice of
    it is kept, one expert at a time. The weights are bit-equal to ``zoo.model.initialize`` in any layout.
    """
    std = model.config.initializer_range
    with torch.device("cpu"):
        for name, parameter in model.named_parameters():
            slices = local_slices(parameter)
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            experts = range(slices[0].start, slices[0].stop)
            for index, values in initial_values(name, parameter.shape, seed, std, experts):
                if isinstance(index, int):
                    local[index - experts.start].copy_(values[slices[1:]])
                else:
                    local.copy_(values[slices])
    for buffer in model.buffers():
        buffer.zero_()
