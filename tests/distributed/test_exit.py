"""Programs that have communicated end with their own status."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, sys
import torch
import torch.distributed as dist
from zoo.parallel.mesh import MeshSizes, build_meshes

for _ in range(8):
    child = os.fork()
    if child == 0:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        meshes = build_meshes("cpu", MeshSizes())
        sys.setswitchinterval(1000)  # seconds for which other threads wait for the interpreter, unless it is given up
        for _ in range(200):
            dist.all_reduce(torch.ones(4), async_op=True)
        sys.exit()
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status))
"""


def test_the_interpreter_ends_while_threads_of_gloo_let_go_of_tensors() -> None:
    """Nine in ten of these programs were aborted without the wait of ``build_meshes``."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0"] * 8, done.stderr
